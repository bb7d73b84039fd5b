"""Tables about tokens: a model's answers if another token came last, and to each token by itself."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hijack_lens.attribution.direct import check_unembedded
from hijack_lens.core.checks import as_int, check_position
from hijack_lens.core.circuit import Circuit, Component
from hijack_lens.core.hook_points import check_model, evaluating, rows_at_once, sites
from hijack_lens.core.inputs import answer_ids, model_tokens, texts_of, token_ids
from hijack_lens.core.tables import visible
from hijack_lens.hooks.edges import embeddings
from hijack_lens.hooks.intervention import Intervention, record

Tokens = Iterable[int | str] | Int[Tensor, "token"] | None
"""Tokens as a user gives them, by id or text; `None` for a default."""

_MOST_CELLS = 2**27
"""The most numbers in a table: 1 GiB in float64."""


@dataclass(frozen=True, repr=False)
class TokenTables:
    """What the rows (query tokens) and columns (answers) of a table stand for.

    Attributes:
        tokens: the prompt's tokens, up to the position whose token is replaced, which is the last.
        queries: ids of the tokens that replace it, one per row.
        answers: ids of the tokens with these logits, one per column.
        vocab: texts of all these tokens, by id; `None` if the model has no tokenizer.
    """

    tokens: Int[Tensor, "source"]
    queries: tuple[int, ...]
    answers: tuple[int, ...]
    vocab: Mapping[int, str] | None

    @property
    def position(self) -> int:
        """The position whose token is replaced."""
        return len(self.tokens) - 1

    @property
    def query_texts(self) -> tuple[str, ...]:
        """Texts of the rows."""
        return tuple(map(self.token_text, self.queries))

    @property
    def answer_texts(self) -> tuple[str, ...]:
        """Texts of the columns."""
        return tuple(map(self.token_text, self.answers))

    @property
    def source_texts(self) -> tuple[str, ...]:
        """Texts of the prompt's tokens."""
        return tuple(map(self.token_text, self.tokens.tolist()))

    @cached_property
    def occurs(self) -> Bool[Tensor, "query"]:
        """Which query tokens occur in the context, before the position."""
        return torch.isin(torch.tensor(self.queries), self.tokens[:-1].cpu())

    def token_text(self, token: int) -> str:
        """A token's text with white space visible; its id if there is no tokenizer."""
        return str(token) if self.vocab is None else visible(self.vocab[token])

    def row(self, query: int | str) -> int:
        """Which row a query token has.

        Raises:
            ValueError: for a token, by id or text, that has none.
        """
        return self._find("query", query, self.queries)

    def chosen(self, queries: Tokens, answers: Tokens, most: int) -> tuple[list[int], list[int]]:
        """Rows and columns to show: those given, else those of tokens in the context, the most frequent first.

        Args:
            queries: by id or text.
            answers: likewise.
            most: how many of each to take by default; if the context holds none of the tokens, from all of them.
        """
        chosen = []
        for name, asked, ids in (("queries", queries, self.queries), ("answers", answers, self.answers)):
            rows = self._held(ids, most) if asked is None else [self._find(name, token, ids) for token in asked]
            if not rows:
                raise ValueError(f"{name} must be at least one token, got none")
            chosen.append(rows)
        return chosen[0], chosen[1]

    def _held(self, ids: Sequence[int], most: int) -> list[int]:
        """Where the context's most frequent tokens are in `ids`, at most `most`; if it holds none of them, any."""
        count = Counter(self.tokens[:-1].tolist())
        held = [index for index, token in enumerate(ids) if token in count] or list(range(len(ids)))
        return sorted(sorted(held, key=lambda index: -count[ids[index]])[:most])

    def _find(self, name: str, token: Any, ids: Sequence[int]) -> int:
        if isinstance(token, str):
            known, wanted = [self.token_text(i) for i in ids], visible(token)
            place = known.index(wanted) if self.vocab is not None and wanted in known else None
        else:
            number = as_int(token)
            place = ids.index(number) if number is not None and number in ids else None
        if place is None:
            raise ValueError(f"{name} must be among this table's tokens, got {token!r}")
        return place


def token_tables(model: Any, tokens: object, position: int, queries: object, answers: object) -> TokenTables:
    """Rows and columns for one prompt, as a user gives them.

    Raises:
        TypeError, ValueError: for a prompt, position or token that the model does not have, or too many tokens.
    """
    check_model(model)
    ids = model_tokens(model, tokens)
    if len(ids) != 1:
        raise ValueError(f"tokens must be one prompt, got a batch of {len(ids)}: take them one by one")
    length = ids.shape[1]
    at = check_position("position", position, length, length - 1)
    rows, columns = (_ids(model, name, given) for name, given in (("queries", queries), ("answers", answers)))
    n_cells = len(rows) * (len(columns) + at + 1)
    if n_cells > _MOST_CELLS:
        raise ValueError(
            f"queries and answers must be fewer: {len(rows)} by {len(columns)} tokens take {n_cells:,} numbers, over "
            f"{_MOST_CELLS:,}"
        )
    vocab = texts_of(model, torch.cat([ids.flatten().cpu(), torch.tensor(rows + columns)]))
    return TokenTables(ids[0, : at + 1], tuple(rows), tuple(columns), vocab)


def replaced(tokens: Int[Tensor, "source"], queries: Sequence[int]) -> Int[Tensor, "query source"]:
    """The prompt with its last token replaced by each query token in turn."""
    prompts = tokens.repeat(len(queries), 1)
    prompts[:, -1] = torch.tensor(queries).to(prompts)
    return prompts


def _ids(model: Any, name: str, given: Any) -> list[int]:
    if given is None:
        return list(range(model.cfg.d_vocab))
    return answer_ids(model, given, name, at_least=1).tolist()


_ACTIVATIONS = 2**25
"""Activations at once: 128 MiB in float32."""

_CHECKED = 1000
"""How many logits `check_logits` compares."""

SomeTokens = Iterable[int | str] | None
"""Tokens by id or text; `None` means the whole vocabulary."""


@dataclass(frozen=True, repr=False)
class NamedTokens:
    """A result about tokens, which knows their texts.

    Attributes:
        vocab: texts of the tokens that occur in it, by id; `None` if the model has no tokenizer.
    """

    vocab: Mapping[int, str] | None

    def token_text(self, token: int) -> str:
        """A token's text with white space visible; its id if there is no tokenizer."""
        return str(token) if self.vocab is None else visible(self.vocab[token])


def chosen_tokens(model: Any, name: str, tokens: SomeTokens) -> Int[Tensor, "token"]:
    """Distinct token ids, on the CPU.

    Raises:
        TypeError, ValueError: for no tokens, or tokens that the model lacks.
    """
    if tokens is None:
        return torch.arange(model.cfg.d_vocab)
    return token_ids(model, name, tokens).cpu()


def memory_mlps(model: Any, components: Any) -> tuple[Component, ...]:
    """MLPs of the model; by default its circuit's bigram memory.

    Raises:
        TypeError, ValueError: for anything but MLPs of the model, or if there is no default.
    """
    if components is None:
        circuit = getattr(model, "circuit", None)
        if not isinstance(circuit, Circuit) or not circuit.bigram:
            raise ValueError(
                "component must name an MLP, since this model has no circuit with a bigram memory: "
                "Component(layer, 'mlp'), or one that find_circuit(model) has found"
            )
        components = circuit.bigram
    sites(model, components)  # refuses what the model lacks
    named = (components,) if isinstance(components, (Component, str)) else tuple(components)
    if not named or len(set(named)) < len(named):
        raise ValueError(f"component must be one or several different MLPs, got {components!r}")
    for component in named:
        if not isinstance(component, Component) or component.kind != "mlp":
            raise ValueError(f"component must be an MLP, got {component}")
        if getattr(model.cfg, "attn_only", False):
            raise ValueError(f"component {component}: this model's blocks have no MLPs")
    return named


def check_logits(model: Any, token: int) -> None:
    """Checks that the logits after a single token are a sum over the last residual stream.

    Raises:
        ValueError: if they are not, for example because the model scales its logits.
    """
    stream, answers = (
        f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",
        torch.arange(min(_CHECKED, model.W_U.shape[1])),
    )
    with evaluating(model):
        logits, run = record(model, torch.tensor([[token]], device=model.cfg.device), [stream])
    check_unembedded(model, run[stream][:, -1], logits[:, -1, answers], answers)


def context_free(
    model: Any, tokens: Int[Tensor, "token"], names: Iterable[str], stop_at_layer: int | None = None
) -> Iterator[dict[str, Float[Tensor, "rows features"]]]:
    """Activations of each token's own run, in parts that fit into memory.

    Each token is a prompt of its own. Attention outputs (with biases) and learned positions are set to zero.

    Args:
        model: a HookedTransformer or TransformerBridge.
        tokens: the tokens to run.
        names: the hook points to read, which have one value per position.
        stop_at_layer: the first layer that need not be run.
    """
    n_layers = model.cfg.n_layers
    off = [f"blocks.{layer}.hook_attn_out" for layer in range(n_layers if stop_at_layer is None else stop_at_layer)]
    if "pos_embed" in embeddings(model):
        off.append("hook_pos_embed")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def read(activation: Tensor, hook: Any) -> None:
            found[name] = activation[:, -1].detach().clone()

        return read

    edit = [(name, lambda activation, hook: torch.zeros_like(activation)) for name in off]
    look = [(name, keep(name)) for name in names]
    at_once = min(rows_at_once(model, 1), _ACTIVATIONS // (model.cfg.d_mlp or model.cfg.d_model))
    with tqdm(total=len(tokens), disable=None, unit="token", desc="context-free") as bar:
        for rows in tokens.split(max(1, at_once)):
            with evaluating(model), Intervention(model, edit=edit, look=look):
                model(rows[:, None].to(model.cfg.device), stop_at_layer=stop_at_layer)
            yield dict(found)
            bar.update(len(rows))


def centred(table: Float[Tensor, "key value"]) -> Float[Tensor, "key value"]:
    """Each row relative to its mean: what all columns share makes no difference."""
    return table - table.mean(1, keepdim=True)
