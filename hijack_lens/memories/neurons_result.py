"""The result of reading an MLP as a key-value memory, and views of it."""

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.circuit import Component
from hijack_lens.memories.context_free import NamedTokens

if TYPE_CHECKING:
    from hijack_lens.visual import Picture

_FORMAT = "hijack_lens.MemoryNeurons.1"
_BY_KEY = ("keys", "pre", "post")
_BY_VALUE = ("promoted", "promoted_logits", "suppressed", "suppressed_logits")
_TENSORS = ("neurons", *_BY_KEY, "on", *_BY_VALUE, "spread")


@dataclass(frozen=True, repr=False)
class MemoryNeurons(NamedTokens):
    """Neurons as key-value pairs; activations and logits in float64, all on the CPU.

    Attributes:
        component: the MLP.
        neurons: their indices in it.
        keys: ids of the tokens that make each write most (|post|), strongest first; where there are too few, then those
            that come closest to turning it on.
        pre: what these tokens give the neuron before its activation; in a gated MLP, its gate's.
        post: and after it, what W_out is multiplied by.
        n_keys: how many tokens were tried as keys.
        on: the fraction of them whose `pre` is positive.
        promoted: ids of the tokens whose logits the neuron raises most.
        promoted_logits: by how much, per unit of `post`, relative to the mean over the vocabulary.
        suppressed: ids of those that it lowers most.
        suppressed_logits: likewise.
        spread: root mean square over the vocabulary of these logits.
    """

    component: Component
    neurons: Int[Tensor, "neuron"]
    keys: Int[Tensor, "neuron key"]
    pre: Float[Tensor, "neuron key"]
    post: Float[Tensor, "neuron key"]
    n_keys: int
    on: Float[Tensor, "neuron"]
    promoted: Int[Tensor, "neuron value"]
    promoted_logits: Float[Tensor, "neuron value"]
    suppressed: Int[Tensor, "neuron value"]
    suppressed_logits: Float[Tensor, "neuron value"]
    spread: Float[Tensor, "neuron"]

    def __post_init__(self) -> None:
        n = len(self.neurons)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_BY_KEY, (n, self.keys.shape[-1]))
        shapes |= dict.fromkeys(_BY_VALUE, (n, self.promoted.shape[-1])) | dict.fromkeys(("on", "spread"), (n,))
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")

    @property
    def strength(self) -> Float[Tensor, "neuron"]:
        """Root mean square over the vocabulary of the logits that each neuron writes for its strongest key."""
        return self.post[:, 0].abs() * self.spread

    @property
    def values(self) -> Int[Tensor, "neuron value"]:
        """Ids of the tokens whose logits each neuron raises most for its strongest key."""
        return torch.where(self.post[:, :1] < 0, self.suppressed, self.promoted)

    @property
    def value_logits(self) -> Float[Tensor, "neuron value"]:
        """By how much, relative to the mean over the vocabulary, the final norm's scale taken to be 1."""
        strongest = self.post[:, :1]
        return strongest * torch.where(strongest < 0, self.suppressed_logits, self.promoted_logits)

    def strongest(self, most: int) -> list[int]:
        """Rows of the neurons with the largest `strength`, the largest first."""
        return self.strength.argsort(descending=True, stable=True)[:most].tolist()

    def to_pandas(self) -> pd.DataFrame:
        """A row per neuron and rank: the key of that rank with its `pre` and `post`, and the tokens that it raises and
        lowers, in logits per unit of `post`; missing where one side has fewer ranks."""
        by_rank = []
        for rank in range(max(self.keys.shape[1], self.promoted.shape[1])):
            table = pd.DataFrame({"neuron": self.neurons.numpy(), "rank": rank})
            for names, width in ((_BY_KEY, self.keys.shape[1]), (_BY_VALUE, self.promoted.shape[1])):
                for name in names if rank < width else ():
                    column = getattr(self, name)[:, rank]
                    is_token = not column.is_floating_point()
                    table[name] = [self.token_text(i) for i in column.tolist()] if is_token else column.numpy()
            by_rank.append(table)
        frame = pd.concat(by_rank).sort_values(["neuron", "rank"], ignore_index=True)
        return frame.rename(columns={"keys": "key"})

    def picture(self, most: int = 12) -> "Picture":
        """Keys and values of the neurons with the largest `strength`, side by side.

        Args:
            most: how many neurons to show.
        """
        from hijack_lens.visual.neuron_map import neuron_map

        return neuron_map(self, most)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        header = {
            "format": _FORMAT,
            "vocab": self.vocab,
            "component": asdict(self.component),
            "n_keys": self.n_keys,
        }
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        write_atomically(path, save(tensors, {"hijack_lens": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MemoryNeurons":
        """Reads what `save` wrote; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _FORMAT)
        try:
            return cls(
                vocab_of(header),
                component=Component(**header["component"]),
                n_keys=header["n_keys"],
                **{name: tensors[name] for name in _TENSORS},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a saved MemoryNeurons: {error!r}") from error

    def __repr__(self) -> str:
        from hijack_lens.memories.weights_report import neurons_report

        return neurons_report(self).text()

    def _repr_html_(self) -> str:
        from hijack_lens.memories.weights_report import neurons_report

        return neurons_report(self).html()


def vocab_of(header: dict) -> dict[int, str] | None:
    """The vocabulary, whose keys JSON has made strings."""
    vocab = header["vocab"]
    return None if vocab is None else {int(token): text for token, text in vocab.items()}
