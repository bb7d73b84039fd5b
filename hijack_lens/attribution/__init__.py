"""From logits to the paths that wrote them."""

from hijack_lens.attribution.logits import attribute
from hijack_lens.attribution.paths import Path
from hijack_lens.attribution.result import LogitAttribution

__all__ = ["LogitAttribution", "Path", "attribute"]
