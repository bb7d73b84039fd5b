"""The claims and their outcomes, as one HTML file that opens offline."""

import itertools
from collections import Counter
from collections.abc import Sequence
from html import escape
from operator import itemgetter
from typing import Any

from hijack_lens.core.tables import Table, escaped
from hijack_lens.show.style import PAGE_STYLE

_MOST_ROWS = 60  # of a claim's measurements; the JSON file has them all
# Dark enough to be read on white.
_COLOURS = {
    "reproduced": "#00664B",
    "in part": "#7A5200",
    "not reproduced": "#A33C00",
    "undecided": "#4A4A8A",
    "failed": "#222",
}
_MARKS = {True: "✓ ", False: "<span class='missed'>✗</span> ", None: "? "}


def page(outcomes: Sequence[dict[str, Any]], heading: str, compared: str = "") -> str:
    """The report on the outcomes of some claims, each as in `Reproduction`; at its end, a comparison of learners."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>hijack-lens: the papers' claims</title>
<style>{PAGE_STYLE}
:root {{ color-scheme: light }} body {{ max-width: 1240px }}
td, th {{ text-align: left; vertical-align: top }} td {{ border-bottom: 1px solid #ddd }}
.summary table {{ min-width: 960px }} .summary th:nth-child(4), .summary th:nth-child(5) {{ width: 20% }}
.verdict-of {{ font-weight: 600; white-space: nowrap }}
.missed {{ color: {_COLOURS["not reproduced"]}; font-weight: 600 }}
details table {{ font-size: 85%; font-variant-numeric: tabular-nums }} pre {{ overflow-x: auto }}</style></head><body>
<h1>The papers' claims, tested</h1>
<p><strong>{tally(outcomes)}</strong></p>
<p>{escape(heading)} Verdicts follow from the measurements; each prediction states what counts as seen. For trained
models, means over seeds are given with their 95% intervals (Student's t). A threshold is met if all of the interval
meets it or, where that is said, if every seed does; where the interval straddles it, the seeds decide nothing. Each
seed has its own language (except for the language of facts), weights and sequences.</p>
{_summary(outcomes)}
{"".join(map(_section, outcomes))}{_comparison(compared)}
</body></html>
"""


def _comparison(figure: str) -> str:
    if not figure:
        return ""
    return f"""
<h2 id='comparison'>The learners beside each other</h2>
<p>Means over seeds with their 95% intervals. Blue: the trained model; grey: the same of the untrained one, or of a step
as long in a random direction; dashed: exact Bayes. A share of 1 follows the context, 0 the weights. Patching moves the
answer all the way at 1. A2: after the attention of layer 2; M2: after its MLP; L2H1: its head 1.</p>
<div class='wide'>{figure}</div>"""


def findings_of(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """A claim's findings; for a claim that failed, its error in place of a finding."""
    return outcome["findings"] or [{"setting": "", "predicted": "", "measured": outcome["error"], "holds": None}]


def tally(outcomes: Sequence[dict[str, Any]]) -> str:
    """How many claims there are, and how many of each verdict."""
    counts = Counter(outcome["verdict"] for outcome in outcomes)
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS if counts[verdict])
    return f"{len(outcomes)} claim{'s' if len(outcomes) > 1 else ''}: {parts}."


def _summary(outcomes: Sequence[dict[str, Any]]) -> str:
    columns = "".join(f"<th>{name}</th>" for name in ("claim", "source", "setting", "predicted", "measured", "verdict"))
    bodies = "".join(f"<tbody>{_rows(outcome)}</tbody>" for outcome in outcomes)
    return f"<div class='wide summary'><table><thead><tr>{columns}</tr></thead>{bodies}</table></div>"


def _rows(outcome: dict[str, Any]) -> str:
    """A row per finding; what several share is shown once."""
    findings = findings_of(outcome)
    every = f"rowspan='{len(findings)}'"
    rows = []
    for setting, group in itertools.groupby(findings, key=itemgetter("setting")):
        alike = [
            f"<td>{escaped(one['predicted'])}</td><td>{_mark(one)}{escaped(one['measured'])}</td>" for one in group
        ]
        rows += [f"<td rowspan='{len(alike)}'>{escaped(setting)}</td>{alike[0]}", *alike[1:]]
    link = f"<a href='#{outcome['claim']}'>{escape(outcome['statement'])}</a>"
    rows[0] = (
        f"<td {every}>{link}</td><td {every}>{escape(outcome['source'])}</td>{rows[0]}"
        f"<td {every}>{_verdict(outcome)}</td>"
    )
    return "".join(f"<tr>{row}</tr>" for row in rows)


def _mark(finding: dict[str, Any]) -> str:
    return _MARKS[finding["holds"]] if finding["predicted"] else ""  # a claim that failed predicts nothing


def _section(outcome: dict[str, Any]) -> str:
    took = "" if outcome["seconds"] is None else f" · {outcome['seconds']:.0f} s"
    head = (
        f"<h2 id='{outcome['claim']}'>{escape(outcome['statement'])}</h2>"
        f"<p>{_verdict(outcome)} · {escape(outcome['source'])}{took}</p>"
    )
    settings = f"<details><summary>settings</summary><code>{escape(outcome['settings'])}</code></details>"
    if outcome["error"]:
        trace = f"<details><summary>traceback</summary><pre>{escape(outcome['traceback'])}</pre></details>"
        return f"{head}<p>{escape(outcome['error'])}</p>{settings}{trace}"
    note = f"<p>{escape(outcome['note'])}</p>" if outcome["note"] else ""
    return f"{head}{outcome['figure']}{note}{settings}{_table(outcome['table'])}"


def _verdict(outcome: dict[str, Any]) -> str:
    verdict = outcome["verdict"]
    return f"<span class='verdict-of' style='color:{_COLOURS[verdict]}'>{verdict}</span>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [[_shown(value) for value in row.values()] for row in rows[:_MOST_ROWS]]
    more = f"<p>{len(rows) - _MOST_ROWS} more rows are in the JSON file.</p>" if len(rows) > _MOST_ROWS else ""
    return (
        f"<details><summary>{len(rows)} measurements</summary>"
        f"<div class='wide'>{Table(list(rows[0]), cells, align='l').html()}</div>{more}</details>"
    )


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
