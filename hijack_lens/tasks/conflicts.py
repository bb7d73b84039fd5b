"""How far predictions follow a context that denies what the weights hold: one number for all tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.core.analysis import without_autocast
from hijack_lens.core.checks import check_count, check_fields, check_list, check_number, check_shapes, fixed_seed
from hijack_lens.core.files import Saved
from hijack_lens.core.tables import Drawn, tidy
from hijack_lens.hooks.intervention import logits_of
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.task import Predictions, Task, check_fits, check_task
from hijack_lens.training.data import mixed_seed


@dataclass(frozen=True, repr=False)
class ContextShare(Saved, Drawn):
    """The context's share of predictions, by the dose of a conflict.

    Attributes:
        task: the task's name.
        dose: what the strengths are.
        strengths: those that were tried.
        share: the model's, 1 where it says what the context says, 0 where what the weights say.
        bayes: that of the exact Bayes predictor, which takes the prompts for ordinary ones; NaN where it is not known.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> found = hl.tasks.context_share(task, task.model(0), [2, 4, 6], n=100)
        >>> found.task, found.dose
        ('latent concepts', 'last steps that follow another table')
        >>> found.to_pandas().columns.tolist()
        ['task', 'strength', 'share', 'bayes']
    """

    task: str
    dose: str
    strengths: tuple[float, ...]
    share: Float[Tensor, "dose"]
    bayes: Float[Tensor, "dose"]

    def __post_init__(self) -> None:
        check_fields(self)
        check_shapes(self, dict.fromkeys(("share", "bayes"), (len(self.strengths),)))

    def to_pandas(self) -> pd.DataFrame:
        """A row per strength: task, strength, share and bayes."""
        axes = {"task": [self.task], "strength": self.strengths}
        return tidy(axes, share=self.share[None], bayes=self.bayes[None])


def context_share(
    task: Task, model: RealTransformer, strengths: Sequence[float] | None = None, n: int = 1000, seed: int = 0
) -> ContextShare:
    """How far a model follows a context that denies its weights, by the strength of the denial.

    At the last position, with p what is predicted, c the context's answer and w the weights', the share is the slope of
    p - w on c - w over prompts and values, through 0: sum (p - w)(c - w) / sum (c - w)^2.

    Args:
        task: gives the prompts and the answers.
        model: a model of the task.
        strengths: of the conflict; by default the task's.
        n: prompts per strength.
        seed: of the prompts.

    Raises:
        TypeError, ValueError: for what is no task, model, or strength.

    Examples:
        >>> task = hl.tasks.LatentConcepts(d_vocab=6, n_tables=2, length=8, d_model=16, n_heads=2)
        >>> run = hl.tasks.train(hl.tasks.shortened(task, steps=2))
        >>> found = hl.tasks.context_share(task, run.model, strengths=[2, 4, 6], n=1000)
        >>> found.bayes
        tensor([0.1597, 0.6776, 0.9877], dtype=torch.float64)
    """
    check_task(task)
    n, seed = check_count("n", n, minimum=1), fixed_seed(seed)
    given = task.doses if strengths is None else check_list("strengths", strengths, "numbers")
    doses = tuple(check_number("strengths", one) for one in given)
    if not doses:
        raise ValueError("strengths must hold at least one number, got none")
    shares = list[tuple[float, float]]()
    for index, strength in enumerate(tqdm(doses, desc="context_share", unit="dose", disable=None, delay=1)):
        batch = task.conflict(strength, n, mixed_seed(seed, "conflict", index))
        check_fits(model, batch, task)
        answers = task.references(batch)
        with torch.no_grad(), without_autocast():
            said = task.predictions(logits_of(model, batch.inputs))
        sides = answers["context"], answers["weights"]
        bayes = share_of(answers["bayes"], *sides) if "bayes" in answers else math.nan
        shares.append((share_of(said, *sides), bayes))
    ours, bayes = torch.tensor(shares, dtype=torch.float64).T
    return ContextShare(task.name, task.dose, doses, ours, bayes)


def share_of(said: Predictions, context: Predictions, weights: Predictions) -> float:
    """The context's share at the last position: see `context_share`."""
    away, asked = (one[:, -1].double() - weights[:, -1].double() for one in (said, context))
    return float((away * asked).sum() / (asked**2).sum())
