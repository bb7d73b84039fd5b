"""What the closed form knows about a model: how strong its memories are, and what its heads can tell apart."""

from dataclasses import dataclass, fields
from typing import Any

from hijack_lens.core.checks import check_choice, check_count, check_type, shown
from hijack_lens.core.circuit import Positions, Strengths
from hijack_lens.language.vocabulary import Triggers, listed_triggers


@dataclass(frozen=True)
class Setting:
    """A two-layer model, as the theory sees it.

    Attributes:
        strengths: the strengths of the memories.
        triggers: the tokens that the induction head matches, as a tuple; `None` means all.
        positions: "relative" if layer 0 has a key per offset; "absolute" if it has learned the pairs of
            neighbouring positions up to `n_ctx_train`.
        n_ctx_train: with absolute positions, the last position with a learned pair; `None` for no limit.

    Raises:
        TypeError, ValueError: for anything else.

    Examples:
        >>> hl.theory.Setting.of(model).strengths
        Strengths(previous_token=20.0, match=6.0, copy=10.0, bigram=1.0)
        >>> print(hl.theory.margin(prompt, language, hl.theory.Setting(hl.Strengths(copy=5.0))))
        Margin(context=+4.9269, weights=-6.5806, rest=+0.0000, total=-1.6537)
    """

    strengths: Strengths = Strengths()
    triggers: Triggers = None
    positions: Positions = "relative"
    n_ctx_train: int | None = None

    def __post_init__(self) -> None:
        check_type("strengths", self.strengths, Strengths)
        object.__setattr__(self, "triggers", listed_triggers(self.triggers))
        check_choice("positions", self.positions, ("relative", "absolute"))
        if (last := self.n_ctx_train) is None:
            return
        if self.positions == "relative":
            raise ValueError(f"n_ctx_train is for absolute positions; relative ones have no end, got {shown(last)}")
        object.__setattr__(self, "n_ctx_train", check_count("n_ctx_train", last, minimum=1))

    @classmethod
    def of(cls, model: Any) -> "Setting":
        """The setting of a `BigramTransformer` that was written by hand.

        Raises:
            TypeError: for other models.
            ValueError: for one that was trained (`fit_strengths` reads off its setting), and for one without positions.
        """
        names = [one.name for one in fields(cls)]
        try:
            found = {name: getattr(model, name) for name in names}
        except Exception as error:  # an AttributeError, or whatever an object's own __getattr__ raises
            raise TypeError(f"model must be a BigramTransformer, got {shown(model)}") from error
        if model.strengths is None:
            raise ValueError("model.strengths is None: it was not written by hand; take fit_strengths(model).setting")
        return cls(**found)
