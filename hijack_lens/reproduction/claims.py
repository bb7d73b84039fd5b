"""The papers' claims, and a run of them: a table and a figure for each, as an offline HTML page and as JSON."""

import functools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from hijack_lens.core.checks import check_choice, check_count, check_list, check_type, shown
from hijack_lens.core.files import make_folder, write_atomically
from hijack_lens.core.tables import Report, Shown, Table, report_of, table_of
from hijack_lens.grid.journal import Journal
from hijack_lens.grid.running import run_grid
from hijack_lens.reproduction.causal_agreement import causal_agreement
from hijack_lens.reproduction.closed_form_logits import closed_form
from hijack_lens.reproduction.comparison import comparison
from hijack_lens.reproduction.competing_continuations import competing_continuations
from hijack_lens.reproduction.data_matters import data_matters
from hijack_lens.reproduction.denied_facts import facts
from hijack_lens.reproduction.feed_forward_memory import feed_forward_memory
from hijack_lens.reproduction.findings import Result
from hijack_lens.reproduction.flip_window import flip_window
from hijack_lens.reproduction.in_context_learners import Settings as OfTask
from hijack_lens.reproduction.in_context_learners import in_context_learner
from hijack_lens.reproduction.learning_order import learning_order
from hijack_lens.reproduction.memory_order import memory_order
from hijack_lens.reproduction.no_positions import no_positions
from hijack_lens.reproduction.page import findings_of, page, tally
from hijack_lens.reproduction.phase_diagram import phase_diagram
from hijack_lens.reproduction.positions_and_length import positions_and_length
from hijack_lens.reproduction.stronger_memories import stronger_memories
from hijack_lens.reproduction.winner_prediction import winner_prediction
from hijack_lens.tasks import (
    AffineRecurrence,
    AlgorithmSelection,
    BigramMemories,
    CompressedDigits,
    LatentConcepts,
    LinearPrompts,
    LogisticPrompts,
    RelevantPatterns,
    Representations,
    shortened,
)


@dataclass(frozen=True, repr=False)
class Claim(Shown):
    """A claim, and the experiment that tests it.

    Attributes:
        statement: the claim in a sentence.
        source: where it is made.
        experiment: the function that tests it, given settings.
        full: settings of the full run.
        quick: settings of a run that takes seconds, or a minute or two.

    Examples:
        >>> claim = hl.reproduction.CLAIMS["closed-form"]
        >>> claim.statement[:54]
        'The closed form predicts the logits of the associative'
        >>> claim.experiment(claim.quick).verdict
        'reproduced'
    """

    statement: str
    source: str
    experiment: Callable[[Any], Result]
    full: Any
    quick: Any

    def to_pandas(self) -> pd.DataFrame:
        """A row per kind of run, full and quick: statement, source, experiment, run, settings."""
        runs = {"full": repr(self.full), "quick": repr(self.quick)}
        said = {"statement": self.statement, "source": self.source, "experiment": self.experiment.__name__}
        return pd.DataFrame({**said, "run": run, "settings": settings} for run, settings in runs.items())


@report_of.register
def claim_report(claim: Claim) -> Report:
    """What is claimed, where, and at which settings it is tested."""
    settings = table_of(claim.to_pandas()[["run", "settings"]])
    return Report(
        f"Claim: {claim.statement}", [f"made in {claim.source}; tested by {claim.experiment.__name__}"], [settings]
    )


def _claim(experiment: Callable[..., Result]) -> Claim:
    module: Any = sys.modules[experiment.__module__]
    return Claim(module.STATEMENT, module.SOURCE, experiment, module.Settings(), module.QUICK)


_QUICK_SEEDS = (0, 1)
"""Of the tasks that take longest, so that all quick forms together take minutes."""

_LABELS = AlgorithmSelection(n_pairs=8, kinds=(LinearPrompts(0.3), LogisticPrompts(3.0)))
_SPARSE = AlgorithmSelection(n_pairs=8, kinds=(LinearPrompts(0.3, nonzero=1), LinearPrompts(1.0, nonzero=1)))

_TASKS = {
    "bigram-memories": Claim(
        "A model of bigrams that any context may overrule weighs the two nearly as exact Bayes does; the context's "
        "answer comes by a head of the first layer and one of the second, which writes it.",
        BigramMemories.source,
        in_context_learner,
        OfTask(BigramMemories()),
        OfTask(shortened(BigramMemories(d_vocab=8, length=24), 600), (0, 1, 2)),
    ),
    "latent-concepts": Claim(
        "A model whose prompts each follow one of a few hidden bigram tables predicts as exact Bayes does; attention "
        "writes which table it is, and the last MLP's weights hold the tables.",
        LatentConcepts.source,
        in_context_learner,
        OfTask(LatentConcepts(), (5, 6, 7, 8, 9)),  # at 0 to 4, the schedule was found wanting
        OfTask(shortened(LatentConcepts(length=20), 700), _QUICK_SEEDS),
    ),
    "algorithm-selection": Claim(
        "A model that learns regression at several noise levels beats every single ridge: it selects by the prompt.",
        AlgorithmSelection.source,
        in_context_learner,
        OfTask(AlgorithmSelection()),
        OfTask(shortened(AlgorithmSelection(n_pairs=8, n_layers=2), 1000), _QUICK_SEEDS),
    ),
    "algorithm-selection-wide": Claim(
        "It does so in more dimensions.",
        AlgorithmSelection.source,
        in_context_learner,
        OfTask(AlgorithmSelection(d=5, n_pairs=20)),
        OfTask(shortened(AlgorithmSelection(d=3, n_pairs=8, n_layers=2), 800), _QUICK_SEEDS),
    ),
    "algorithm-selection-labels": Claim(
        "One model does linear and logistic regression, each where the prompt is of its kind.",
        AlgorithmSelection.source,
        in_context_learner,
        OfTask(shortened(_LABELS, 4000)),
        OfTask(shortened(replace(_LABELS, n_pairs=5, n_layers=2), 800), _QUICK_SEEDS),
    ),
    "algorithm-selection-sparse": Claim(
        "Where few weights are not 0, a model does better than Lasso, at either of two noise levels.",
        AlgorithmSelection.source,
        in_context_learner,
        OfTask(shortened(_SPARSE, 4000)),
        OfTask(shortened(replace(_SPARSE, n_layers=2), 800), _QUICK_SEEDS),
    ),
    "affine-recurrence": Claim(
        "A model of attention alone that continues affine recurrences copies the last number first and corrects it in "
        "its last layer; slopes beyond those of its training it takes for smaller.",
        AffineRecurrence.source,
        in_context_learner,
        OfTask(AffineRecurrence()),
        OfTask(shortened(AffineRecurrence(n_transitions=8), 1000), _QUICK_SEEDS),
    ),
    "representations": Claim(
        "Where labels are linear in a fixed nonlinear representation, a model's lower layers compute it, and its upper "
        "ones do ridge regression on it.",
        Representations.source,
        in_context_learner,
        OfTask(Representations()),
        OfTask(shortened(Representations(d=2, n_pairs=6), 700), _QUICK_SEEDS),
    ),
    "relevant-patterns": Claim(
        "Attention and an MLP, without residual paths, label by whichever two patterns the examples are about, also by "
        "pairs and mixed patterns never trained; few neurons, those of the largest weights, do it.",
        RelevantPatterns.source,
        in_context_learner,
        OfTask(RelevantPatterns()),
        OfTask(shortened(RelevantPatterns(), 200), _QUICK_SEEDS),
    ),
    "relevant-patterns-from-noise": Claim(
        "What makes it general is where W_Q and W_K start: from random ones, with all else the same, it learns the "
        "trained pairs.",
        RelevantPatterns.source,
        in_context_learner,
        OfTask(RelevantPatterns(delta=None)),
        OfTask(RelevantPatterns(delta=None), _QUICK_SEEDS),
    ),
    "digits-few-labels": Claim(
        "A student that sees digits through 2 x 2 measurements, and has labels of few, names them better with the "
        "prior of a teacher whose sensing is a network.",
        CompressedDigits.source,
        in_context_learner,
        OfTask(CompressedDigits()),
        OfTask(CompressedDigits(), (0, 1, 2)),
    ),
    "digits": Claim(
        "With all labels it hardly does.",
        CompressedDigits.source,
        in_context_learner,
        OfTask(CompressedDigits(labels=1197)),
        OfTask(CompressedDigits(labels=1197), (0, 1, 2)),
    ),
    "digits-finer": Claim(
        "Nor does it with 3 x 3 measurements, which nearly suffice.",
        CompressedDigits.source,
        in_context_learner,
        OfTask(CompressedDigits(3, 3, labels=1197)),
        OfTask(CompressedDigits(3, 3, labels=1197), (0, 1, 2)),
    ),
}

CLAIMS: dict[str, Claim] = {
    "closed-form": _claim(closed_form),
    "phase-diagram": _claim(phase_diagram),
    "stronger-memories": _claim(stronger_memories),
    "competing-continuations": _claim(competing_continuations),
    "flip-window": _claim(flip_window),
    "positions": _claim(positions_and_length),
    "no-positions": _claim(no_positions),
    "facts": _claim(facts),
    "learning-order": _claim(learning_order),
    "memory-order": _claim(memory_order),
    "feed-forward": _claim(feed_forward_memory),
    "data": _claim(data_matters),
    "winner-prediction": _claim(winner_prediction),
    "causal-agreement": _claim(causal_agreement),
    **_TASKS,
}
"""The claims by name: of the two papers that this library is about, in their order; then of other learners."""

Group = Literal["papers", "tasks"]


def claims_of(group: Group) -> list[str]:
    """The names of the claims of the two papers, or of those on other in-context learners.

    Raises:
        ValueError: for another group.

    Examples:
        >>> hl.reproduction.claims_of("tasks")[:3]
        ['bigram-memories', 'latent-concepts', 'algorithm-selection']
    """
    check_choice("group", group, ("papers", "tasks"))
    return [name for name in CLAIMS if (name in _TASKS) == (group == "tasks")]


@dataclass(frozen=True, repr=False)
class Reproduction(Shown):
    """The outcome of each claim.

    Attributes:
        outcomes: for each claim, what `run_claim` found, the "claim"'s name, "statement", "source" and "settings", the
            "seconds" it took, and the "error" and "traceback", empty where there was none.
        report: the HTML page, on all claims that the folder knows at these settings.
        data: the same as JSON, without figures.

    Examples:
        >>> found = hl.reproduction.reproduce("claims", quick=True, claims=["stronger-memories"])
        >>> found.verdicts
        {'stronger-memories': 'reproduced'}
        >>> found.to_pandas()["holds"].all()
        np.True_
    """

    outcomes: tuple[dict[str, Any], ...]
    report: Path
    data: Path

    @property
    def verdicts(self) -> dict[str, str]:
        """For each claim, its `Result`'s verdict; "failed" where its experiment raised."""
        return {outcome["claim"]: outcome["verdict"] for outcome in self.outcomes}

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding: claim, source, setting, predicted, measured, whether it holds, and the claim's verdict.

        A finding that the seeds leave undecided has `None` for whether it holds. So has the one row of a claim that
        failed, with its error as what was measured.
        """
        return pd.DataFrame(
            {"claim": outcome["claim"], "source": outcome["source"], **finding, "verdict": outcome["verdict"]}
            for outcome in self.outcomes
            for finding in findings_of(outcome)
        )


@report_of.register
def reproduction_report(found: Reproduction) -> Report:
    """How many claims hold; each one's verdict, and its findings."""
    verdicts = Table(("verdict", "claim"), [(one["verdict"], one["statement"]) for one in found.outcomes], "ll")
    findings = found.to_pandas()[["claim", "setting", "predicted", "measured", "holds"]]
    tables = [verdicts, table_of(findings, "findings", len(findings))]
    return Report(f"Reproduction of {tally(found.outcomes)}", [f"Report: {found.report}"], tables)


def reproduce(
    out: str | os.PathLike[str], quick: bool = False, claims: Sequence[str] | None = None, workers: int | None = None
) -> Reproduction:
    """Tests the papers' claims, and says which hold, how far, and where they do not.

    A run that was stopped resumes when called again with the same `out`: claims already tested at the same settings are
    not run again, unless they failed. Changes in an experiment's code are not noticed: use another folder after one.
    The report covers every claim that the folder holds at these settings, quick or full, including earlier calls'. A
    comparison ends it where several of them are on other in-context learners.

    A claim whose experiment raises, or takes its worker process down, is reported as failed; the others still run.

    Args:
        out: a folder, made if need be, for `report.html`, `report.json` and what has been run so far.
        quick: small settings, for a first look.
        claims: names from `CLAIMS`; by default those of the two papers.
        workers: processes to run claims in, each with one thread; by default as many as there are cores. With one
            worker or one claim, it is this process. A script that asks for more must guard its own code with
            `if __name__ == "__main__":`, since each worker imports it.

    Raises:
        TypeError, ValueError: for names that no claim has, and for an `out` that is a file.
        RuntimeError: where no worker can start.

    Examples:
        >>> found = hl.reproduction.reproduce("claims", quick=True, claims=["stronger-memories"])
        >>> found.verdicts
        {'stronger-memories': 'reproduced'}
        >>> found.report.name
        'report.html'
    """
    chosen = (
        tuple(claims_of("papers"))
        if claims is None
        else tuple([claims] if isinstance(claims, str) else check_list("claims", claims, "names of claims"))
    )
    for name in chosen:
        check_choice("claims", name, CLAIMS)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"claims must be one or several different ones, got {shown(claims)}")
    count = check_count("workers", (os.cpu_count() or 1) if workers is None else workers, minimum=1)
    check_type("quick", quick, bool)
    folder = make_folder("out", out)

    points = {name: {"claim": name, "settings": repr(one.quick if quick else one.full)} for name, one in CLAIMS.items()}
    pool = functools.partial(
        ProcessPoolExecutor,
        count,
        mp_context=multiprocessing.get_context("spawn"),  # not forked: PyTorch's threads do not survive a fork
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    executor = None if count == 1 or len(chosen) == 1 else pool
    kept = folder / "claims.jsonl"
    # The last claims train the most models: begun first, they leave no worker idle in the end.
    order = chosen if executor is None else chosen[::-1]
    run_grid(run_claim, [points[name] for name in order], executor, kept, retry_failed=True, in_flight=count)
    with Journal(kept, run_claim, seed=0).opened() as journal:
        known = journal.table(list(points.values()))
    outcomes = {row["claim"]: _outcome(row) for row in known.to_dict(orient="records")}

    without_figures = [{key: value for key, value in one.items() if key != "figure"} for one in outcomes.values()]
    data = write_atomically(folder / "report.json", json.dumps(without_figures, indent=2).encode())
    heading = "Quick settings: small models, few seeds." if quick else "Full settings."
    report = write_atomically(
        folder / "report.html", page(tuple(outcomes.values()), heading, _compared(outcomes)).encode()
    )
    return Reproduction(tuple(outcomes[name] for name in chosen), report, data)


def _compared(outcomes: Mapping[str, dict[str, Any]]) -> str:
    """The learners among the outcomes in one figure, if there are several; each by its first claim there."""
    kinds, learners = set[type](), dict[str, tuple[str, pd.DataFrame]]()
    for name, one in outcomes.items():
        if name in _TASKS and one["table"] and type(task := _TASKS[name].full.task) not in kinds:
            kinds.add(type(task))
            learners[name] = task.dose, pd.DataFrame(one["table"])
    return comparison(learners).html() if len(learners) > 1 else ""


def run_claim(claim: str, settings: str) -> dict[str, str]:
    """Tests one claim, as a point of a grid; settings with another repr make another point.

    Returns:
        The "verdict", and as JSON the "outcome": verdict, findings, note, table and figure (SVG).
    """
    chosen = CLAIMS[claim]
    known = {repr(one): one for one in (chosen.quick, chosen.full)}
    result = chosen.experiment(known[settings])
    rows = result.table.to_dict(orient="records")
    outcome = {
        "verdict": result.verdict,
        "findings": result.to_pandas().to_dict(orient="records"),
        "note": result.note,
        "table": [{str(name): _plain(value) for name, value in row.items()} for row in rows],
        "figure": result.figure.svg(),
    }
    return {"verdict": result.verdict, "outcome": json.dumps(outcome)}


def _plain(value: Any) -> Any:
    """A table's value in JSON's types: null where there is none, a string where it is infinite."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (str, bool)):
        return value
    if pd.isna(value):
        return None
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _outcome(row: dict[str, Any]) -> dict[str, Any]:
    claim = CLAIMS[row["claim"]]
    found = {
        "claim": row["claim"],
        "statement": claim.statement,
        "source": claim.source,
        "settings": row["settings"],
        "seconds": None if pd.isna(row["seconds"]) else row["seconds"],  # unknown if its process died
    }
    if isinstance(row["error"], str):
        nothing = {"verdict": "failed", "findings": [], "note": "", "table": [], "figure": ""}
        return {**found, **nothing, "error": row["error"], "traceback": row["traceback"]}
    return {**found, **json.loads(row["outcome"]), "error": "", "traceback": ""}
