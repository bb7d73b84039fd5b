"""hijack-lens: which memory wrote each output logit, the context or the weights?

A model that has seen "q c" in its context and "q g" all through its training must choose at the next "q". The
context speaks through the induction circuit, the weights through the bigram memory; this package attributes
every logit to them, switches either one off, and predicts which one hijacks the other.
"""

import lazy_loader

from hijack_lens.core import installed  # noqa: F401  # says at once if TransformerLens is too old, too new or missing
from hijack_lens.core.showing import shown_by

__version__ = "1.0.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

shown_by("hijack_lens.show")  # the result classes do not import this module
