"""From logits to the paths that wrote them."""

from hijack_lens.attribution.carriers import find_carriers
from hijack_lens.attribution.logit_attribution import LogitAttribution, Path
from hijack_lens.attribution.logits import attribute
from hijack_lens.attribution.score_attribution import LogOdds, ScoreAttribution
from hijack_lens.attribution.scores import attribute_scores
from hijack_lens.attribution.shapley_values import ShapleyValues, shapley
from hijack_lens.attribution.source_attribution import SourceAttribution
from hijack_lens.attribution.sources import attribute_sources

__all__ = [
    "LogOdds",
    "LogitAttribution",
    "Path",
    "ScoreAttribution",
    "ShapleyValues",
    "SourceAttribution",
    "attribute",
    "attribute_scores",
    "attribute_sources",
    "find_carriers",
    "shapley",
]
