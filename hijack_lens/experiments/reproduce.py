"""All claims in one run: a table with a figure each, as an offline HTML page and as JSON."""

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

from hijack_lens._checks import check_choice, check_count
from hijack_lens._files import write_atomically
from hijack_lens.experiments.claims import CLAIMS, run_claim
from hijack_lens.experiments.report import page
from hijack_lens.experiments.sweep import sweep


@dataclass(frozen=True, repr=False)
class Reproduction:
    """What became of each claim.

    Attributes:
        outcomes: by claim: what `run_claim` found, the "claim"'s name, and an "error", empty where there was none.
        report: the HTML page.
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
        """A row per finding: claim, source, setting, predicted, measured, whether it holds, and the claim's verdict."""
        rows = [
            {
                "claim": outcome["claim"],
                "source": outcome["source"],
                **finding,
                "verdict": outcome["verdict"],
            }
            for outcome in self.outcomes
            for finding in outcome["findings"]
        ]
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
    not run again. That an experiment has been edited since is not noticed: give another folder then.

    Args:
        out: a folder, made if need be: `report.html` and `report.json`, and what has been run so far.
        quick: small settings, for a first look.
        claims: names from `CLAIMS`; by default all.
        workers: processes to run claims in, each with one thread; by default as many as there are cores. With one, or
            for one claim, it is this process.

    Raises:
        TypeError, ValueError: for names of no claim, and an `out` that is a file.
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

    grid = [{"claim": name, "settings": repr(CLAIMS[name].quick if quick else CLAIMS[name].full)} for name in chosen]
    done: dict[str, Any] = {"out": folder / "claims.jsonl", "retry_failed": True}
    if count == 1 or len(chosen) == 1:
        table = sweep(run_claim, grid, **done)
    else:
        # Not forked: PyTorch's threads do not survive that.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            table = sweep(run_claim, grid, pool, **done, in_flight=count)
    outcomes = tuple(map(_outcome, table.to_dict(orient="records")))

    without_figures = [{key: value for key, value in one.items() if key != "figure"} for one in outcomes]
    data = write_atomically(folder / "report.json", json.dumps(without_figures, indent=2).encode())
    heading = "Quick settings: small models, few seeds." if quick else "Full settings."
    return Reproduction(outcomes, write_atomically(folder / "report.html", page(outcomes, heading).encode()), data)


def _outcome(row: dict[str, Any]) -> dict[str, Any]:
    claim = row["claim"]
    found = {"claim": claim, "statement": CLAIMS[claim].statement, "source": CLAIMS[claim].source}
    if isinstance(row.get("error"), str):
        nothing = {"findings": [], "table": [], "note": "", "figure": ""}
        return {**found, "verdict": "failed", **nothing, "seconds": row["seconds"], "error": row["error"]}
    return {**found, **json.loads(row["outcome"]), "seconds": row["seconds"], "error": ""}
