"""From logits to the paths that wrote them."""

from hijack_lens.attribution.log_odds import LogOdds
from hijack_lens.attribution.logits import attribute
from hijack_lens.attribution.paths import Path
from hijack_lens.attribution.result import LogitAttribution
from hijack_lens.attribution.score_result import ScoreAttribution
from hijack_lens.attribution.scores import attribute_scores
from hijack_lens.attribution.shapley import shapley
from hijack_lens.attribution.shapley_result import ShapleyValues

__all__ = [
    "LogOdds",
    "LogitAttribution",
    "Path",
    "ScoreAttribution",
    "ShapleyValues",
    "attribute",
    "attribute_scores",
    "shapley",
]
