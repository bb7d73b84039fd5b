"""The heads that carry a context's answer: their flow, and what turning them does."""

import numpy as np

from hijack_lens.core.carriers import Carriers
from hijack_lens.core.tables import Report, Table, picture_of, report_of
from hijack_lens.show.style import COLOURS, GREY, Picture, frameless

_HEADS_SHOWN = 12


@report_of.register
def carriers_report(found: Carriers) -> Report:
    """The carriers; the heads with the largest flow, and what was tried."""
    heads = found.to_pandas().head(max(_HEADS_SHOWN, len(found.heads)))
    flows = [
        (row.head, f"{row.flow:+.3f} ± {row.interval:.3f}", "carrier" if row.named else "")
        for row in heads.itertuples()
    ]
    tried = [
        (str(row.heads), f"{row.strength:g}", f"{row.context:.0%}", f"{row.weights:.0%}")
        for row in found.tried().itertuples()
    ]
    title = f"Carriers: {', '.join(map(str, found.heads))}; strength {found.strength:g}"
    return Report(
        title,
        [],
        [
            Table(
                ("head", "brings", ""), flows, "lrl", f"from the context's answer, mean of {len(found.flow)} prompts"
            ),
            Table(("heads", "strength", "context's", "weights'"), tried, "r", "prompts that say each memory's answer"),
        ],
        [f"By chance, the largest mean of all heads exceeds {found.chance:.3g} in 1% of cases."],
    )


@picture_of.register
def carriers_picture(found: Carriers) -> Picture:
    """The flow of the largest heads, with intervals; and the shares of prompts against the strength."""
    picture = Picture(10.0, 4.0)
    left, right = picture.figure.subplots(1, 2)
    heads = found.to_pandas().head(max(_HEADS_SHOWN, len(found.heads)))
    colours = [COLOURS["context"] if named else GREY for named in heads["named"]]
    places = np.arange(len(heads))
    left.barh(places, heads["flow"], xerr=heads["interval"], color=colours, error_kw={"linewidth": 1})
    left.axvline(found.chance, color="black", linestyle=":", linewidth=1)
    left.set_yticks(places, heads["head"])
    left.invert_yaxis()
    left.set_xlabel("brings from the context's answer, in logits\n(dotted: chance; blue: carriers)")
    for memory, shares in zip(("context", "weights"), found.by_strength.T, strict=True):
        right.plot(
            found.strengths,
            shares,
            "o-",
            color=COLOURS[memory],
            label="what the context says" if memory == "context" else "what the weights say",
        )
    right.axvline(found.strength, color="black", linestyle=":", linewidth=1)
    right.set_ylim(-0.03, 1.03)
    right.set_xlabel("strength (dotted: chosen)")
    right.set_ylabel("share of prompts that say it")
    right.legend(frameon=False)
    for ax in (left, right):
        frameless(ax)
    return picture
