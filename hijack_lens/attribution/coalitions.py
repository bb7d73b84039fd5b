"""What every coalition of components is worth: the metric of runs in which all others are ablated."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.hooks.intervention import HookFunction, Intervention
from hijack_lens.hooks.site import Site, read_source
from hijack_lens.hooks.sweep.forward import runs_at_once
from hijack_lens.hooks.sweep.reader import Reader

How = Literal["zero", "mean", "resample", "patch"]
Outputs = Mapping[Site, Tensor | None]
"""What is written where a component is absent, [batch or 1, pos, ...]; `None` for zeros."""


def outputs_when_absent(
    model: Any,
    present: Mapping[Site, Tensor],
    how: How,
    reference: object,
    generator: torch.Generator,
) -> Outputs:
    """What is written where a component is absent.

    Args:
        model: whose components they are.
        present: what the components write in the run itself, [batch, pos, ...].
        how: as for `shapley`.
        reference: prompts or a cache; `None` for zeros.
        generator: for the draws of "resample".

    Raises:
        ValueError: for a reference of another length; and with "patch" of another number of prompts.
    """
    if how == "zero":
        return dict.fromkeys(present)
    stored = read_source(model, reference, list(dict.fromkeys(site.name for site in present)), "reference")
    drawn: Tensor | None = None
    outputs = {}
    for site, current in present.items():
        values = site.read(stored[site.name])
        if values.shape[1:] != current.shape[1:]:
            raise ValueError(
                f"reference must be as long as the prompt: at {site.name!r} it has shape {tuple(values.shape)}, "
                f"the prompt's run {tuple(current.shape)}"
            )
        if how == "patch" and len(values) not in (1, len(current)):
            raise ValueError(
                f"reference must hold one prompt, or one for each of the {len(current)}, got {len(values)}"
            )
        if how == "mean":
            values = values.mean(0, keepdim=True)
        elif how == "resample":
            if drawn is None:  # the same for all components and coalitions
                drawn = torch.randint(len(values), (len(current),), generator=generator)
            values = values[drawn.to(values.device)]
        outputs[site] = values
    return outputs


class CoalitionRuns:
    """Runs of a model with some of its components absent, many in one forward pass.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: of the prompts, the same in all runs.
        players: where each player's outputs are, by its label.
        outputs: what is written there while it is absent.
        reader: of the metric.
        memory: in bytes; `None` for one run at a time, since hooks of the user's must see no batch but theirs.
    """

    def __init__(
        self,
        model: Any,
        tokens: Int[Tensor, "batch pos"],
        players: Mapping[str, Sequence[Site]],
        outputs: Outputs,
        reader: Reader,
        memory: float | None,
    ):
        self.model = model
        self.tokens = tokens
        self.players = players
        self.outputs = outputs
        self.reader = reader
        self.at_once = 1 if memory is None else runs_at_once(model, tokens, memory)

    def worth(self, coalitions: Bool[Tensor, "coalition player"]) -> Float[Tensor, "coalition"]:
        """The metric's mean over prompts with only these players present; in float64, on the CPU.

        Raises:
            ValueError: where the metric is not finite, since nothing could be shared out.
        """
        worth = []
        with tqdm(total=len(coalitions), disable=None, unit="run") as bar:
            for chunk in coalitions.split(self.at_once):
                with Intervention(self.model, edit=self._edits(chunk)):
                    logits = self.model(self.tokens.repeat(len(chunk), 1))
                worth.append(self.reader.each(logits.unflatten(0, (len(chunk), -1))).double().cpu())
                bar.update(len(chunk))
        found = torch.cat(worth)
        if not bool(found.isfinite().all()):
            first = int((~found.isfinite()).nonzero()[0])
            absent = [label for label, here in zip(self.players, coalitions[first].tolist(), strict=True) if not here]
            raise ValueError(
                f"metric must be finite whichever components are absent, got {float(found[first])} without "
                f"{', '.join(absent) or 'any absent'}"
            )
        return found

    def _edits(self, coalitions: Bool[Tensor, "coalition player"]) -> list[tuple[str, HookFunction]]:
        """Hooks that write over absent players, where any are absent. The model's order makes later ones see it."""
        absent: dict[str, list[tuple[Site, Tensor]]] = {}
        for sites, present in zip(self.players.values(), coalitions.T, strict=True):
            for site in sites:
                if not bool(present.all()):
                    absent.setdefault(site.name, []).append((site, ~present))
        return [(name, self._overwrite(at, len(coalitions))) for name, at in absent.items()]

    def _overwrite(self, absent: list[tuple[Site, Tensor]], count: int) -> HookFunction:
        n_rows = count * len(self.tokens)

        def overwrite(activation: Tensor, hook: Any) -> Tensor:
            edited = activation.clone()
            for site, runs in absent:
                # Rotary angles, say: with one copy for all prompts, they cannot be absent from some.
                if len(edited) != n_rows:
                    raise ValueError(
                        f"components must have an output for each prompt; {site.name!r} has {len(edited)} for {n_rows}"
                    )
                view, value = site.read(edited).unflatten(0, (count, -1)), self.outputs[site]
                view[runs.to(view.device)] = 0 if value is None else value.to(view)
            return edited

        return overwrite
