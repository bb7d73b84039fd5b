"""The weights' memories as tables: text for a terminal, HTML for a notebook."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.table import Table

from hijack_lens.memories.capacity import MemoryCapacity
from hijack_lens.memories.matrix import MemoryMatrix
from hijack_lens.memories.neurons import MemoryNeurons
from hijack_lens.show.style import Picture

_ROWS = 20
_TOKENS = 3


@dataclass(frozen=True)
class Report:
    """A headline, a table, and a picture that is drawn when it is asked for.

    Attributes:
        kind: what the result is.
        lines: that say what it holds.
        columns: of the table; all but the first `n_text` are numbers.
        rows: of the table.
        n_text: how many columns are text.
        picture: draws it.
    """

    kind: str
    lines: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_text: int
    picture: Callable[[], Picture]

    def text(self) -> str:
        """As plain text."""
        table = Table()
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="left" if place < self.n_text else "right")
        for row in self.rows:
            table.add_row(*row)
        # In a notebook a console would display the table at once, beside returning it.
        buffer = io.StringIO()
        Console(file=buffer, width=120, color_system=None, force_jupyter=False, markup=False).print(table)
        return "\n".join([self.kind, *self.lines, buffer.getvalue().rstrip()])

    def html(self) -> str:
        """The picture over the table."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "".join(
                f"<{tag} style='text-align:{'left' if place < self.n_text else 'right'}'>{escape(cell)}</{tag}>"
                for place, cell in enumerate(cells)
            )

        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows)
        return (
            f"<div class='hijack-lens'><p><b>{escape(self.kind)}</b><br>{'<br>'.join(map(escape, self.lines))}</p>"
            f"{self.picture().svg()}"
            f"<table><thead><tr>{row(self.columns, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def neurons_report(result: MemoryNeurons) -> Report:
    """The strongest neurons, a row each."""
    rows = []
    for i in result.strongest(_ROWS):
        turned_on = [
            f"{result.token_text(token)!r} {post:+.3g}"
            for token, post in zip(result.keys[i].tolist(), result.post[i].tolist(), strict=True)
            if post != 0
        ]
        written = [
            f"{result.token_text(token)!r} {logit:+.3g}"
            for token, logit in zip(result.values[i].tolist(), result.value_logits[i].tolist(), strict=True)
        ]
        rows.append(
            [
                str(int(result.neurons[i])),
                "  ".join(turned_on[:_TOKENS]) or "none",
                "  ".join(written[:_TOKENS]),
                f"{float(result.on[i]):.1%}",
                f"{float(result.strength[i]):.3g}",
            ]
        )
    return Report(
        f"MemoryNeurons(neuron={len(result.neurons)}) of {result.component}, by {result.n_keys} tokens as keys",
        ["strength: root mean square of the logits that a neuron writes for its strongest key", _shown(result)],
        ["neuron", "turned on by (activation)", "writes for the first of them (logits)", "on for", "strength"],
        rows,
        3,
        result.picture,
    )


def matrix_report(result: MemoryMatrix) -> Report:
    """The keys with the most cross-talk, or without a language the strongest; a row each."""
    scored = result.log_pi_b is not None
    by_row = (result.crosstalk if scored else result.values).square().mean(1).sqrt()
    rows = []
    for i in by_row.argsort(descending=True, stable=True)[:_ROWS].tolist():
        row = [result.token_text(result.key_tokens[i]), _largest(result, result.values[i].tolist())]
        if result.log_pi_b is not None:
            row.append(_largest(result, result.log_pi_b[i].tolist()))
        rows.append([*row, f"{float(by_row[i]):.3g}"])
    n_keys, n_values = result.values.shape
    wrote = "all that the weights say" if result.part == "weights" else ", ".join(map(str, result.components))
    lines = [f"rank {result.rank}, effective rank {result.effective_rank:.3g}"]
    if scored:
        lines += [
            f"recall {result.recall():.1%} of the likeliest value, {result.recall(5):.1%} within five",
            f"{result.slope:.4g} × log pi_b, R² {result.r2:.4g}; cross-talk {result.crosstalk_rms:.3g} (RMS, logits)",
        ]
    columns = ["key", "memory's largest (logits)", *(["log pi_b's"] if scored else [])]
    return Report(
        f"MemoryMatrix(key={n_keys}, value={n_values}) of {wrote}",
        lines,
        [*columns, "cross-talk" if scored else "RMS"],
        rows,
        len(columns),
        result.picture,
    )


def capacity_report(result: MemoryCapacity) -> Report:
    """A row per memory and d_model."""
    rows = [
        [
            str(row.memory),
            str(row.d_model),
            f"{row.recall:.3f} ± {row.stderr:.3f}",
            f"{row.expected_recall:.3f}",
            f"{row.crosstalk:.3g}",
            f"{row.expected_crosstalk:.3g}",
        ]
        for row in result.to_pandas().itertuples()
    ]
    return Report(
        f"MemoryCapacity(d_model={len(result.d_models)}, seed={len(result.seeds)}), {result.d_vocab} tokens",
        [f"orthonormal directions need d_model = {3 * result.d_vocab}; below, theory takes cross-talk as independent"],
        ["memory", "d_model", "recall", "theory", "cross-talk (logits)", "theory"],
        rows,
        1,
        result.picture,
    )


def _largest(result: MemoryMatrix, logits: list[float]) -> str:
    best = sorted(range(len(logits)), key=lambda j: -logits[j])[:_TOKENS]
    return "  ".join(f"{result.token_text(result.value_tokens[j])!r} {logits[j]:+.3g}" for j in best)


def _shown(result: MemoryNeurons) -> str:
    hidden = max(0, len(result.neurons) - _ROWS)
    total = math.fsum(result.strength.square().tolist())
    kept = math.fsum(result.strength[result.strongest(_ROWS)].square().tolist())
    share = kept / total if total else 1.0
    return f"the {len(result.neurons) - hidden} strongest, with {share:.0%} of all squared strength; {hidden} more"
