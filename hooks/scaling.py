"""Turning components up or down: as a whole, or only what heads read at some tokens of the prompt."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from hijack_lens.core.analysis import as_written
from hijack_lens.core.carriers import Carriers
from hijack_lens.core.checks import check_choice, check_number, check_type, shown
from hijack_lens.core.hook_points import check_hook_points, position_index, sites, without_hooks
from hijack_lens.core.inputs import Components, components_of, indices
from hijack_lens.core.spans import is_text, token_runs
from hijack_lens.core.tables import widened
from hijack_lens.hooked import HookedTransformer
from hijack_lens.hooks.intervention import HookFunction, Intervention
from hijack_lens.models.linear_maps import rounding

Sources = str | Iterable[str] | int | Iterable[int] | Bool[Tensor, "batch pos"]
"""Tokens of a prompt: text, found wherever its tokens stand in the run; positions from the front; or a mask."""


def scale(
    model: Any,
    components: Components,
    factor: float,
    *,
    source: Sources | None = None,
    positions: int | Iterable[int] | None = -1,
) -> Intervention:
    """Multiplies what components write by a factor: all of it, or only what heads bring from some source tokens.

    With `source`, the heads' patterns are multiplied there and not normalised again, so what they bring from all other
    tokens stays as it was. A run that has none of these tokens stays as it is, to the bit.

    Args:
        model: a HookedTransformer or TransformerBridge.
        components: as for `ablate`; heads only, where there is a `source`.
        factor: 0 switches off, 1 changes nothing.
        source: the source tokens: a text or several, found wherever their tokens stand in a run, with or without a
            space before (so the pieces of a longer word may be, too); positions in the run's prompt; or a mask [batch,
            pos] of its tokens. When text is generated with a key-value cache, they are those of the prompt: what is
            generated does not count.
        positions: where the components write; by default, at the last token of each forward pass. `None` is all.

    Raises:
        TypeError, ValueError: for components that the model lacks or whose edits it would ignore; for a text that its
            tokenizer does not know; and for positions or a mask that do not fit the run.

    Examples:
        >>> margin = hl.metrics.margin(prompt)
        >>> with hl.hooks.scale(model, "induction", 0.5):
        ...     print(f"{margin(model(prompt.tokens[None])):.2f}")
        -1.65
    """
    model = as_written(model)
    factor = check_number("factor", factor)
    where = None if positions is None else indices("positions", positions)
    kind: Any = None if source is None else "head"
    chosen = components_of(model, components, name="components", kind=kind, points=source is None)
    if source is None:

        def scaled(site: Any) -> HookFunction:
            def hook_fn(activation: Tensor, hook: Any) -> Tensor:
                return site.write(activation, factor * site.read(activation), where)

            return hook_fn

        whole = sites(model, chosen)
        check_hook_points(model, [site.name for site in whole])
        return Intervention(model, [(site.name, scaled(site)) for site in whole])

    look = _Sources(model, source)
    heads: dict[str, list[int]] = {}
    for site in sites(model, chosen, "pattern"):
        assert site.head is not None
        heads.setdefault(site.name, []).append(site.head)
    check_hook_points(model, heads)

    def turned(name: str) -> HookFunction:
        def hook_fn(pattern: Tensor, hook: Any) -> Tensor | None:
            found = look.among(pattern.shape[-1], pattern.device)
            if not bool(found.any()):
                return None
            rows = torch.arange(pattern.shape[2]) if where is None else position_index(where, pattern.shape[2])
            at = (slice(None), torch.tensor(heads[name])[:, None], rows)
            edited = pattern.clone()
            edited[at] = torch.where(found[:, None, None], factor * pattern[at], pattern[at])
            return edited

        return hook_fn

    return Intervention(model, edit=[(name, turned(name)) for name in heads], look=[(look.point, look.see)])


class _Sources:
    """Which keys of a run are source tokens.

    Hooks do not see tokens. But each token has its own embedding, by which it is known here.
    """

    def __init__(self, model: Any, source: Any):
        self.mask: Tensor | None = None
        self.positions: list[int] | None = None
        self.runs: list[Tensor] = []  # embeddings, [token, d_model]
        self.added: Tensor | None = None  # what positions add to them, [position, d_model]
        # HookedTransformer.generate of TransformerLens 3 starts after the embeddings' hook points.
        self.point = "blocks.0.hook_resid_pre" if isinstance(model, HookedTransformer) else "hook_embed"
        if isinstance(source, Tensor) and source.dtype == torch.bool:
            if source.ndim != 2:
                raise ValueError(f"source must be a mask [batch, pos], got one of shape {list(source.shape)}")
            self.mask = source
        elif is_text(source):
            ids = token_runs(model, source, "source")
            if getattr(model.cfg, "post_embedding_ln", False):
                raise ValueError("source must be positions: this model norms its embeddings, so text is not found")
            with torch.no_grad(), without_hooks(model):
                self.runs = [model.embed(torch.tensor([run], device=model.cfg.device))[0].detach() for run in ids]
            if isinstance(model, HookedTransformer) and model.cfg.positional_embedding_type == "standard":
                self.added = model.W_pos.detach()
        else:
            self.positions = indices("source", source)
            if min(self.positions) < 0:
                raise ValueError(f"source must be positions counted from the front, got {shown(source)}")
        self.new: Tensor | None = None
        self.all: Tensor | None = None

    def see(self, stream: Tensor, hook: Any) -> None:
        """Notes the tokens of a forward pass."""
        length = stream.shape[1]
        self.new = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
        for run in self.runs:
            n_starts = length - len(run) + 1
            if n_starts > 0:
                are = [self._are(stream[:, i : i + n_starts], token) for i, token in enumerate(run.to(stream))]
                starts = torch.stack(are).all(0)
                for i in range(len(run)):
                    self.new[:, i : i + n_starts] |= starts

    def _are(self, stream: Tensor, token: Tensor) -> Tensor:
        """Where the stream is a token's embedding, whatever its position."""
        if self.added is None:
            return (stream == token).all(-1)
        wide, one, added = (widened(x) for x in (stream, token, self.added.to(stream)))
        nearest = torch.cdist(wide - one, added, compute_mode="donot_use_mm_for_euclid_dist").min(-1).values
        return nearest <= rounding(stream.dtype) * (one.norm() + added.norm(dim=-1).max())

    def among(self, n_keys: int, device: torch.device) -> Bool[Tensor, "batch key"]:
        """Which keys of this pass are source tokens, those of earlier passes included."""
        if self.new is not None:
            batch, length = self.new.shape
            if n_keys == length:
                self.all = self._of_prompt(self.new)
            elif self.all is None or tuple(self.all.shape) != (batch, n_keys - length):
                raise RuntimeError(
                    "the key-value cache holds tokens that this intervention has not seen: enter it before the prompt "
                    "is run"
                )
            else:
                self.all = torch.cat([self.all, torch.zeros_like(self.new)], 1)
            self.new = None
        assert self.all is not None
        return self.all.to(device)

    def _of_prompt(self, found: Tensor) -> Tensor:
        if self.mask is not None:
            if self.mask.shape[1] != found.shape[1] or self.mask.shape[0] not in (1, found.shape[0]):
                raise ValueError(
                    f"source is a mask of shape {list(self.mask.shape)}, the run's tokens have {list(found.shape)}"
                )
            return self.mask.to(found.device).expand_as(found)
        if self.positions is not None:
            found[:, position_index(self.positions, found.shape[1])] = True
        return found


def steer(
    model: Any,
    carriers: Carriers,
    source: Sources,
    toward: Literal["context", "weights"] = "context",
    strength: float | None = None,
    *,
    positions: int | Iterable[int] | None = -1,
) -> Intervention:
    """Turns what carriers read of the context's answer up or down, and nothing else.

    Args:
        model: a HookedTransformer or TransformerBridge.
        carriers: from `hijack_lens.find_carriers`.
        source: the context's answer, as for `scale`: its text, positions or a mask.
        toward: "context" multiplies what the carriers bring from there by the strength; "weights" divides it.
        strength: 1 changes nothing; by default the carriers' own, towards the weights infinite: all is cut.
        positions: as for `scale`.

    Raises:
        TypeError, ValueError: as for `scale`.

    Examples:
        >>> told = [hl.hijack_prompt(language, "q", c, 2, 16, seed=0).text for c in "aeis"]
        >>> carriers = hl.find_carriers(model, told, context=list("aeis"), weights=list("uuuu"))
        >>> with hl.hooks.steer(model, carriers, "e", toward="weights"):
        ...     language.tokens[model(prompt.tokens[None])[0, -1].argmax()]
        'u'
    """
    check_type("carriers", carriers, Carriers)
    check_choice("toward", toward, ("context", "weights"))
    given = (carriers.strength if toward == "context" else math.inf) if strength is None else strength
    if toward == "weights" and given != math.inf:
        check_number("strength", given, positive=True)
    factor = check_number("strength", given) if toward == "context" else 1 / given
    return scale(model, carriers.heads, factor, source=source, positions=positions)
