"""Tables about tokens: a model's answers if another token came last, and to each token by itself."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijack_lens.attribution.direct import check_unembedded
from hijack_lens.core.checks import as_int, check_count, check_list, check_position, shown
from hijack_lens.core.hook_points import rows_at_once
from hijack_lens.core.inputs import Tokens, single_prompt, token_ids
from hijack_lens.core.progress import progress
from hijack_lens.core.tables import visible
from hijack_lens.core.texts import n_outputs, outputs_are_tokens, spellings, texts_of
from hijack_lens.hooks.edges import embeddings
from hijack_lens.hooks.incremental_runs import open_for
from hijack_lens.hooks.intervention import Intervention, keeping, record
from hijack_lens.hooks.recorded_run import agree

_MOST_CELLS = 2**27
"""The most numbers in a table: 1 GiB in float64."""


@dataclass(frozen=True, repr=False)
class NamedTokens:
    """A result about tokens, which knows their texts.

    Attributes:
        vocab: texts of the tokens that occur in it, by id; `None` if the model has no tokenizer.
        outputs_are_tokens: whether the model has as many outputs as tokens; if not, outputs are called by their ids.
    """

    vocab: Mapping[int, str] | None
    outputs_are_tokens: bool = field(default=True, kw_only=True)

    def token_text(self, token: int) -> str:
        """A token's text with white space visible; its id if there is no tokenizer."""
        return self._text("token", token)

    def output_text(self, output: int) -> str:
        """Likewise of an output."""
        return self._text("output", output) if self.outputs_are_tokens else str(check_count("output", output))

    def _text(self, name: str, token: object) -> str:
        number = check_count(name, token)
        if self.vocab is not None and number not in self.vocab:
            raise ValueError(f"{name} must be the id of a token that occurs here, got {number}")
        return str(number) if self.vocab is None else visible(self.vocab[number])


@dataclass(frozen=True, repr=False)
class TokenTables(NamedTokens):
    """What the rows and columns of tables from token to token stand for.

    Attributes:
        tokens: the prompt's tokens, up to the one that is replaced, which is the last.
        query_tokens: ids of the tokens that replace it, row by row.
        answers: ids of the outputs whose logits these are, column by column.
    """

    older_names: ClassVar[Mapping[str, str]] = {"queries": "query_tokens"}

    tokens: Int[Tensor, "source"]
    query_tokens: tuple[int, ...]
    answers: tuple[int, ...]

    @property
    def position(self) -> int:
        """The position whose token is replaced."""
        return len(self.tokens) - 1

    @property
    def query_texts(self) -> tuple[str, ...]:
        """Texts of the rows."""
        return tuple(map(self.token_text, self.query_tokens))

    @property
    def answer_texts(self) -> tuple[str, ...]:
        """Texts of the columns."""
        return tuple(map(self.output_text, self.answers))

    @property
    def source_texts(self) -> tuple[str, ...]:
        """Texts of the prompt's tokens."""
        return tuple(map(self.token_text, self.tokens.tolist()))

    @cached_property
    def occurs(self) -> Bool[Tensor, "query"]:
        """Which query tokens occur in the context, before the position."""
        return torch.isin(torch.tensor(self.query_tokens), self.tokens[:-1].cpu())

    def row(self, query_token: int | str) -> int:
        """The index of a query token's row."""
        return self._find("query_token", query_token, self.query_tokens, self.query_texts)

    def chosen(self, query_tokens: Tokens, answers: Tokens, most: int) -> tuple[list[int], list[int]]:
        """Rows and columns to show: those asked for, by id or text, or else the `most` frequent in the context."""
        chosen, most = [], check_count("most", most, minimum=1)
        axes = (
            ("query_tokens", query_tokens, self.query_tokens, self.query_texts),
            ("answers", answers, self.answers, self.answer_texts),
        )
        for name, asked, ids, texts in axes:
            alone = asked is None or isinstance(asked, str) or as_int(asked) is not None
            listed = [asked] if alone else check_list(name, asked, "tokens, each a text or an id")
            if asked is not None:
                rows = [self._find(name, one, ids, texts) for one in listed]
            else:
                rows = self._held(ids, most, name == "query_tokens" or self.outputs_are_tokens)
            if not rows:
                raise ValueError(f"{name} must be at least one token, got none")
            chosen.append(rows)
        return chosen[0], chosen[1]

    def _held(self, ids: Sequence[int], most: int, are_tokens: bool) -> list[int]:
        """Where the context's most frequent tokens are in `ids`, at most `most` of them; if none is, any places."""
        count = Counter(self.tokens[:-1].tolist() if are_tokens else [])
        held = [index for index, token in enumerate(ids) if token in count] or list(range(len(ids)))
        return sorted(sorted(held, key=lambda index: -count[ids[index]])[:most])

    def _find(self, name: str, token: Any, ids: Sequence[int], texts: Sequence[str]) -> int:
        if isinstance(token, str):
            spelled = map(visible, spellings(token) if self.vocab is not None else ())
            place = next((texts.index(text) for text in spelled if text in texts), None)
        else:
            number = as_int(token)
            place = ids.index(number) if number is not None and number in ids else None
        if place is None:
            raise ValueError(f"{name} must be among this table's tokens, got {shown(token)}")
        return place


def token_tables(model: Any, prompt: object, position: int, query_tokens: Tokens, answers: Tokens) -> TokenTables:
    """Rows and columns for one prompt, from a user's arguments."""
    ids = single_prompt(model, prompt)
    length = ids.shape[1]
    at = check_position("position", position, length, length - 1)
    rows, columns = token_ids(model, "query_tokens", query_tokens), token_ids(model, "answers", answers, output=True)
    if query_tokens is None and len(rows) * (len(columns) + at + 1) > _MOST_CELLS:
        rows = ids[0, : at + 1].unique().cpu()
    n_cells = len(rows) * (len(columns) + at + 1)
    if n_cells > _MOST_CELLS:
        raise ValueError(
            f"query_tokens and answers must be fewer: {len(rows)} by {len(columns)} tokens take {n_cells:,} numbers, "
            f"over {_MOST_CELLS:,}"
        )
    as_tokens = outputs_are_tokens(model)
    vocab = texts_of(model, torch.cat([ids.flatten().cpu(), rows, *([columns] if as_tokens else [])]))
    listed = tuple(rows.tolist()), tuple(columns.tolist())
    return TokenTables(vocab, ids[0, : at + 1], *listed, outputs_are_tokens=as_tokens)


def replaced(tokens: Int[Tensor, "source"], query_tokens: Sequence[int]) -> Int[Tensor, "query source"]:
    """Copies of the prompt with each query token in place of its last token."""
    prompts = repeat(tokens, "source -> query source", query=len(query_tokens)).clone()
    prompts[:, -1] = torch.tensor(query_tokens).to(prompts)
    return prompts


_ACTIVATIONS = 2**25
"""The most activations at once: 128 MiB in float32."""

_TRIED = 8
"""On how many tokens runs without attention are compared with the model's."""

_CHECKED = 1000
"""How many logits `check_logits` compares."""


def check_logits(model: Any, token: int) -> None:
    """Checks that the logits after a single token are a sum over the last residual stream."""
    stream, answers = (
        f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",
        torch.arange(min(_CHECKED, n_outputs(model))),
    )
    logits, run = record(model, torch.tensor([[token]], device=model.cfg.device), [stream])
    check_unembedded(model, run[stream][:, -1], logits[:, -1, answers], answers)


def context_free(
    model: Any, tokens: Int[Tensor, "token"], names: Iterable[str], stop_at_layer: int | None = None
) -> Iterator[dict[str, Float[Tensor, "rows features"]]]:
    """Activations of each token's own run, in parts that fit into memory.

    Each token is a prompt of its own. Attention outputs (with biases) and learned positions are set to zero; of models
    whose parts are known, attention is not run at all.
    """
    n_blocks = model.cfg.n_layers if stop_at_layer is None else stop_at_layer
    positions = [("hook_pos_embed", _zeroed)] if "pos_embed" in embeddings(model) else []
    off = [*((f"blocks.{layer}.hook_attn_out", _zeroed) for layer in range(n_blocks)), *positions]
    names = list(names)

    def whole(rows: Int[Tensor, "rows"]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with Intervention(model, edit=off, look=keeping(found, names)):
            model(rows[:, None], stop_at_layer=stop_at_layer)
        return {name: activation[:, -1] for name, activation in found.items()}

    opened, _ = open_for(model, "auto")

    def without_attention(rows: Int[Tensor, "rows"]) -> dict[str, Tensor]:
        assert opened is not None
        found: dict[str, Tensor] = {}
        with Intervention(model, edit=positions):
            x = model(rows[:, None], stop_at_layer=0)
        with Intervention(model, look=keeping(found, [name for name in names if ".mlp." in name])):
            for layer, block in enumerate(opened.blocks[:n_blocks]):
                written = block.mlp_out(x, torch.zeros_like(x))
                x = x + written
                found |= {f"blocks.{layer}.hook_mlp_out": written, f"blocks.{layer}.hook_resid_post": x}
        return {name: found[name].flatten(0, -2) for name in names}

    run = whole
    if opened is not None:
        few = tokens[:_TRIED].to(model.cfg.device)
        ours, theirs = without_attention(few), whole(few)
        if all(agree(ours[name], theirs[name]) for name in names):
            run = without_attention
    at_once = min(rows_at_once(model, 1), _ACTIVATIONS // (model.cfg.d_mlp or model.cfg.d_model))
    with progress(len(tokens), "token", "each token's own run") as advance:
        for rows in tokens.split(max(1, at_once)):
            yield run(rows.to(model.cfg.device))
            advance(len(rows))


def _zeroed(activation: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(activation)


def centred(table: Float[Tensor, "key value"]) -> Float[Tensor, "key value"]:
    """Each row relative to its mean: what all columns share changes no prediction; one column alone, as it is."""
    return table - table.mean(1, keepdim=True) if table.shape[1] > 1 else table
