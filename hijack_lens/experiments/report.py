"""Claims and what became of them, as one HTML file that opens offline."""

from collections.abc import Sequence
from html import escape
from typing import Any

from hijack_lens.visual.report import STYLE

_MOST_ROWS = 60
"""Of a claim's measurements; the JSON file has them all."""

_COLOURS = {"reproduced": "#009E73", "in part": "#E69F00", "not reproduced": "#D55E00", "failed": "#000000"}


def page(outcomes: Sequence[dict[str, Any]], heading: str) -> str:
    """The report on some claims, each as `run_claim` returns it."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hijack-lens: the papers' claims</title>
<style>{STYLE}
td, th {{ text-align: left; vertical-align: top }} td {{ border-bottom: 1px solid #ddd }}
.verdict-of {{ font-weight: 600; white-space: nowrap }} details table {{ font-size: 85% }}</style></head><body>
<h1>The papers' claims, put to the test</h1>
<p>{escape(heading)} Verdicts follow from the measurements; what counts as seen stands beside each prediction. Of
trained models, the mean over seeds is given with its standard error. It meets a threshold where it does so by two of
these; or every seed must, where that is said. Seeds are of weights and sequences: the language is the same for all.</p>
{_summary(outcomes)}
{"".join(map(_section, outcomes))}
</body></html>
"""


def _summary(outcomes: Sequence[dict[str, Any]]) -> str:
    rows = []
    for outcome in outcomes:
        broken = {"setting": "", "predicted": "", "measured": outcome["error"], "holds": False}
        findings = outcome["findings"] or [broken]
        for index, finding in enumerate(findings):
            first = (
                f"<td rowspan='{len(findings)}'><a href='#{outcome['claim']}'>{escape(outcome['statement'])}</a></td>"
                f"<td rowspan='{len(findings)}'>{escape(outcome['source'])}</td>"
                if index == 0
                else ""
            )
            verdict = f"<td rowspan='{len(findings)}'>{_verdict(outcome)}</td>" if index == 0 else ""
            cells = "".join(f"<td>{escape(finding[column])}</td>" for column in ("setting", "predicted"))
            mark = "✓" if finding["holds"] else "✗"
            rows.append(f"<tr>{first}{cells}<td>{mark} {escape(finding['measured'])}</td>{verdict}</tr>")
    columns = "".join(f"<th>{name}</th>" for name in ("claim", "source", "setting", "predicted", "measured", "verdict"))
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _section(outcome: dict[str, Any]) -> str:
    head = (
        f"<h2 id='{outcome['claim']}'>{escape(outcome['statement'])}</h2>"
        f"<p>{_verdict(outcome)} · {escape(outcome['source'])} · {outcome['seconds']:.0f} s</p>"
    )
    if outcome["error"]:
        return f"{head}<pre>{escape(outcome['error'])}</pre>"
    note = f"<p>{escape(outcome['note'])}</p>" if outcome["note"] else ""
    return f"{head}{outcome['figure']}{note}{_table(outcome['table'])}"


def _verdict(outcome: dict[str, Any]) -> str:
    verdict = outcome["verdict"]
    return f"<span class='verdict-of' style='color:{_COLOURS[verdict]}'>{verdict}</span>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_shown(row[column]))}</td>" for column in columns) + "</tr>"
        for row in rows[:_MOST_ROWS]
    )
    more = f"<p>{len(rows) - _MOST_ROWS} more rows are in the JSON file.</p>" if len(rows) > _MOST_ROWS else ""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    return (
        f"<details><summary>{len(rows)} measurements</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</details>"
    )


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
