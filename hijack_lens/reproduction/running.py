"""All claims in one run: a table with a figure each, as an offline HTML page and as JSON."""

import functools
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hijack_lens.core.checks import check_choice, check_count
from hijack_lens.core.files import write_atomically
from hijack_lens.grid.journal import Journal
from hijack_lens.grid.running import run_grid
from hijack_lens.reproduction.claims import CLAIMS, run_claim
from hijack_lens.reproduction.page import page, unmeasured


@dataclass(frozen=True, repr=False)
class Reproduction:
    """What became of each claim.

    Attributes:
        outcomes: by claim: what `run_claim` found, the "claim"'s name, "statement", "source" and "settings", the
            "seconds" it took, and the "error" and "traceback", empty where there was none.
        report: the HTML page; on all claims that the folder knows at these settings.
        data: the same as JSON, figures aside.
    """

    outcomes: tuple[dict[str, Any], ...]
    report: Path
    data: Path

    @property
    def verdicts(self) -> dict[str, str]:
        """Each claim's: "reproduced", "in part", "not reproduced"; "failed" where its experiment raised."""
        return {outcome["claim"]: outcome["verdict"] for outcome in self.outcomes}

    def to_pandas(self) -> pd.DataFrame:
        """A row per finding: claim, source, setting, predicted, measured, whether it holds, and the claim's verdict.

        A claim that failed has one row, its error standing for what was measured, and `None` for whether it holds.
        """
        rows = []
        for outcome in self.outcomes:
            for finding in outcome["findings"] or [unmeasured(outcome)]:
                row = {"claim": outcome["claim"], "source": outcome["source"], **finding, "verdict": outcome["verdict"]}
                rows.append(row)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [f"{outcome['verdict']:>14}  {outcome['statement']}" for outcome in self.outcomes]
        return "\n".join([*lines, f"Report: {self.report}"])

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(index=False)


def reproduce(
    out: str | os.PathLike[str],
    quick: bool = False,
    claims: Sequence[str] | None = None,
    workers: int | None = None,
) -> Reproduction:
    """Puts the papers' claims to the test, and says which hold, how far, and where they do not.

    A run that was stopped goes on when called again with the same `out`: claims that it holds at the same settings are
    not run again, and those that failed are. That an experiment has been edited since is not noticed: give another
    folder then. The report is on every claim that the folder knows at the settings asked for, quick or full, whether
    it was asked for this time or before.

    A claim whose experiment raises is reported as failed, and so is one that takes its process down, where that is a
    worker's; the others run on.

    Args:
        out: a folder, made if need be: `report.html` and `report.json`, and what has been run so far.
        quick: small settings, for a first look.
        claims: names from `CLAIMS`; by default all.
        workers: processes to run claims in, each with one thread; by default as many as there are cores. With one, or
            for one claim, it is this process. A script that asks for more must guard its own code with
            `if __name__ == "__main__":`, since each of them imports it.

    Returns:
        What became of the claims asked for.

    Raises:
        TypeError, ValueError: for names of no claim, and an `out` that is a file.
        RuntimeError: where no worker can start.
    """
    chosen = tuple(CLAIMS) if claims is None else tuple([claims] if isinstance(claims, str) else claims)
    for name in chosen:
        check_choice("claims", name, CLAIMS)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"claims must be one or several different ones, got {claims!r}")
    count = check_count("workers", (os.cpu_count() or 1) if workers is None else workers, minimum=1)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)

    points = {name: {"claim": name, "settings": repr(one.quick if quick else one.full)} for name, one in CLAIMS.items()}
    pool = functools.partial(
        ProcessPoolExecutor,
        count,
        mp_context=multiprocessing.get_context("spawn"),  # not forked: PyTorch's threads do not survive that
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    executor = None if count == 1 or len(chosen) == 1 else pool
    kept = folder / "claims.jsonl"
    run_grid(run_claim, [points[name] for name in chosen], executor, kept, retry_failed=True, in_flight=count)
    known = Journal(kept, run_claim, seed=0).table(list(points.values()))
    outcomes = {row["claim"]: _outcome(row) for row in known.to_dict(orient="records")}

    without_figures = [{key: value for key, value in one.items() if key != "figure"} for one in outcomes.values()]
    data = write_atomically(folder / "report.json", json.dumps(without_figures, indent=2).encode())
    heading = "Quick settings: small models, few seeds." if quick else "Full settings."
    report = write_atomically(folder / "report.html", page(tuple(outcomes.values()), heading).encode())
    return Reproduction(tuple(outcomes[name] for name in chosen), report, data)


def _outcome(row: dict[str, Any]) -> dict[str, Any]:
    claim = row["claim"]
    found = {
        "claim": claim,
        "statement": CLAIMS[claim].statement,
        "source": CLAIMS[claim].source,
        "settings": row["settings"],
        # Nobody knows how long a process took that died.
        "seconds": None if pd.isna(row["seconds"]) else row["seconds"],
    }
    if isinstance(row["error"], str):
        nothing = {"findings": [], "note": "", "table": [], "figure": ""}
        return {**found, "verdict": "failed", **nothing, "error": row["error"], "traceback": row["traceback"]}
    return {**found, **json.loads(row["outcome"]), "error": "", "traceback": ""}
