"""The weights' memory: its neurons, its table beside the bigrams', and how much it holds."""

import math
from collections.abc import Callable
from typing import Any

import torch

from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.memories.capacity import MEMORIES, MemoryCapacity
from hijack_lens.memories.matrix import MemoryMatrix
from hijack_lens.memories.neurons import MemoryNeurons
from hijack_lens.show.style import COLOURS, PLAIN, Picture, frameless, heatmap, name_rows, whole_ticks

_ROWS = 20
_TOKENS = 3
_RANKS, _LETTERS = 6, 9
_NAMED, _MAP = 45, 3.8


@report_of.register
def neurons_report(result: MemoryNeurons) -> Report:
    """The strongest neurons, a row each."""
    rows, strongest = [], result.strongest(_ROWS)
    for i in strongest:
        post = result.post[i].tolist()
        rows.append(
            [
                str(int(result.neurons[i])),
                _tokens(
                    result.token_text,
                    [pair for pair in zip(result.key_tokens[i].tolist(), post, strict=True) if pair[1]],
                )
                or "none",
                _tokens(
                    result.output_text,
                    zip(result.value_tokens[i].tolist(), result.value_logits[i].tolist(), strict=True),
                ),
                f"{float(result.on[i]):.1%}",
                f"{float(result.strength[i]):.3g}",
            ]
        )
    total, kept = (math.fsum(s.square().tolist()) for s in (result.strength, result.strength[strongest]))
    share, hidden = kept / total if total else 1.0, len(result.neurons) - len(rows)
    return Report(
        f"MemoryNeurons(neuron={len(result.neurons)}) of {result.component}, by {result.n_keys} tokens as keys",
        [
            "strength: root mean square of the logits that a neuron writes for its strongest key",
            f"the {len(rows)} strongest, with {share:.0%} of all squared strength; {hidden} more",
        ],
        [
            Table(
                ["neuron", "turned on by (activation)", "writes for the first of them (logits)", "on for", "strength"],
                rows,
                align="lllr",
            )
        ],
    )


@picture_of.register
def neuron_map(result: MemoryNeurons, most: int = 12) -> Picture:
    """The strongest neurons: their keys, shaded by activation, and what they write for the first key, shaded by logit.

    Args:
        result: what to show.
        most: how many neurons to show.
    """
    rows = result.strongest(most)
    sides = (
        ("turned on by", "activation (post)", result.key_tokens, result.post, result.token_text),
        (
            "writes for the first of them",
            "logits, relative to their mean",
            result.value_tokens,
            result.value_logits,
            result.output_text,
        ),
    )
    picture = Picture(12.0, 1.7 + 0.36 * len(rows))
    axes = picture.figure.subplots(1, 2, sharey=True)
    name_rows(*axes)
    for ax, (title, label, tokens, numbers, text) in zip(axes, sides, strict=True):
        image, chosen = numbers[rows, :_RANKS], tokens[rows, :_RANKS].tolist()
        # Tokens that leave a neuron off are not its keys.
        texts = [
            [_short(text(token)) if value else "·" for token, value in zip(*pair, strict=True)]
            for pair in zip(chosen, image.tolist(), strict=True)
        ]
        ranks = [str(rank + 1) for rank in range(image.shape[1])]
        drawn = heatmap(ax, image, columns=ranks, texts=texts)
        ax.set_xlabel("rank")
        ax.set_title(title, fontsize=11)
        picture.figure.colorbar(drawn, ax=ax, label=label, pad=0.02)
    axes[0].set_yticks(range(len(rows)), [str(int(result.neurons[row])) for row in rows])
    axes[0].set_ylabel(f"neuron of {result.component}")
    return picture


@report_of.register
def matrix_report(result: MemoryMatrix) -> Report:
    """The keys with the most cross-talk (without a language, the strongest), a row each."""
    scored = result.log_pi_b is not None
    by_row = (result.crosstalk if scored else result.values).square().mean(1).sqrt()
    tables = [result.values] if result.log_pi_b is None else [result.values, result.log_pi_b]
    rows = []
    for i in by_row.argsort(descending=True, stable=True)[:_ROWS].tolist():
        largest = [
            sorted(zip(result.value_tokens, table[i].tolist(), strict=True), key=lambda pair: -pair[1])
            for table in tables
        ]
        key = result.token_text(result.key_tokens[i])
        rows.append([key, *(_tokens(result.output_text, pairs) for pairs in largest), f"{float(by_row[i]):.3g}"])
    n_keys, n_values = result.values.shape
    wrote = "all that the weights say" if result.part == "weights" else ", ".join(map(str, result.components))
    lines = [f"rank {result.rank}, effective rank {result.effective_rank:.3g}"]
    if scored:
        lines += [
            f"recall {result.recall():.1%} of the likeliest value, {result.recall(5):.1%} within five",
            f"{result.slope:.4g} × log pi_b, R² {result.r2:.4g}; cross-talk {result.crosstalk_rms:.3g} (RMS, logits)",
        ]
    columns = ["key", "memory's largest (logits)", *(["log pi_b's"] if scored else [])]
    align = "l" * len(columns) + "r"
    return Report(
        f"MemoryMatrix(key={n_keys}, value={n_values}) of {wrote}",
        lines,
        [Table([*columns, "cross-talk" if scored else "RMS"], rows, align)],
    )


@picture_of.register
def matrix_maps(result: MemoryMatrix) -> Picture:
    """Heat maps of the memory and of g * log pi_b on one scale, and the singular values of both."""
    what = "what the weights say" if result.part == "weights" else "what the memory writes"
    maps = {what: result.values}
    spectra = {what: (result.singular_values, COLOURS["weights"], "o-")}
    if result.log_pi_b is not None:
        scaled = result.slope * result.log_pi_b
        maps[f"{result.slope:.3g} × log pi_b"] = scaled
        spectra["g × log pi_b"] = (torch.linalg.svdvals(scaled), "black", "--")
    n_maps = len(maps)
    picture = Picture(_MAP * n_maps + 5.2, _MAP + 0.6)
    axes = picture.figure.subplots(1, n_maps + 1, width_ratios=[1.0] * n_maps + [0.85])
    spread = max(float(table.abs().max()) for table in maps.values()) or 1.0
    keys, values = list(map(result.token_text, result.key_tokens)), list(map(result.output_text, result.value_tokens))
    rotation = 90 if max(map(len, values)) > 2 else 0
    for ax, (title, table) in zip(axes, maps.items(), strict=False):
        drawn = heatmap(
            ax, table, keys, values, spread=spread, named=_NAMED, fontsize=6, family="monospace", rotation=rotation
        )
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("value: next token")
    axes[0].set_ylabel("key: current token")
    picture.figure.colorbar(drawn, ax=axes[:n_maps].tolist(), label="logit, relative to its row's mean", pad=0.02)

    ax, largest = axes[-1], float(result.singular_values.max()) or 1.0
    for label, (found, colour, style) in spectra.items():
        above = found[found > 1e-6 * largest]
        ax.plot(range(1, len(above) + 1), above.numpy(), style, color=colour, label=label, markersize=3)
    ax.set_yscale("log")
    whole_ticks(ax.xaxis)
    ax.set_xlabel("rank")
    ax.set_ylabel("singular value (logits)")
    rank = f"rank {result.rank}, effectively {result.effective_rank:.0f}"
    scores = "" if result.log_pi_b is None else f"recall {result.recall():.0%}, R² {result.r2:.3f}\n"
    ax.set_title(scores + rank, fontsize=11)
    ax.legend(frameon=False, loc="lower left")
    frameless(ax)
    return picture


@report_of.register
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
        [Table(["memory", "d_model", "recall", "theory", "cross-talk (logits)", "theory"], rows)],
    )


@picture_of.register
def capacity_curves(result: MemoryCapacity) -> Picture:
    """Recall and cross-talk against d_model: points are measured, with standard errors over seeds; lines are theory."""
    picture = Picture(11.0, 4.4)
    axes = picture.figure.subplots(1, 2)
    errors = result.crosstalk.std(-1) / len(result.seeds) ** 0.5
    panels = (
        ("recall: fraction of keys", result.recall, result.recall_stderr, result.expected_recall),
        ("cross-talk: root mean square, in logits", result.crosstalk, errors, result.expected_crosstalk),
    )
    for ax, (label, measured, error, expected) in zip(axes, panels, strict=True):
        looks = ((COLOURS["weights"], "o"), (COLOURS["context"], "s"))
        for i, (memory, (colour, marker)) in enumerate(zip(MEMORIES, looks, strict=True)):
            points = {"fmt": marker, "color": colour, "capsize": 3, "markersize": 6, "label": f"{memory}, measured"}
            ax.plot(result.d_models, expected[i].numpy(), color=colour, linewidth=1.5, label=f"{memory}, theory")
            ax.errorbar(result.d_models, measured[i].mean(-1).numpy(), error[i].numpy(), **points)
        ax.axvline(3 * result.d_vocab, color=PLAIN, linewidth=1, linestyle=":", label="orthonormal directions")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_xlabel("d_model")
        ax.set_ylabel(label)
    frameless(*axes)
    axes[0].set_ylim(-0.02, 1.04)
    axes[1].legend(frameon=False)
    axes[0].set_title(f"{result.d_vocab} tokens, three directions each; {len(result.seeds)} seeds", fontsize=11)
    return picture


def _tokens(text: Callable[[int], str], pairs: Any) -> str:
    """The first few tokens, each with its number."""
    return "  ".join(f"{text(token)!r} {number:+.3g}" for token, number in list(pairs)[:_TOKENS])


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"
