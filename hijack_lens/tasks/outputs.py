"""What the models of several tasks write at each position: the next token's logits, or one number."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hijack_lens.core.checks import Seed
from hijack_lens.models.real import RealTransformer
from hijack_lens.tasks.task import Batch, Predictions, check_outputs


class NextToken:
    """A task of token ids, each of which asks for the next; its fields give the vocabulary and the model's sizes."""

    d_vocab: int
    length: int
    d_model: int
    n_layers: int
    n_heads: int

    def model(self, seed: Seed) -> RealTransformer:
        """An untrained transformer of token ids, with learned positions."""
        sizes: dict[str, Any] = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return RealTransformer(self.d_vocab, self.d_vocab, self.length, **sizes, seed=seed, device="cpu")

    def loss(self, outputs: Float[Tensor, "prompt pos d_out"], batch: Batch) -> Float[Tensor, ""]:
        """The next token's cross-entropy, in nats."""
        check_outputs(outputs, self.d_vocab, batch)
        return F.cross_entropy(outputs[batch.mask], batch.targets[batch.mask])

    def predictions(self, outputs: Float[Tensor, "prompt pos d_out"]) -> Predictions:
        """The next token's probabilities."""
        check_outputs(outputs, self.d_vocab)
        return outputs.double().softmax(-1)


class OneNumber:
    """A task whose prompts ask for numbers, by their squared errors."""

    def loss(self, outputs: Float[Tensor, "prompt pos d_out"], batch: Batch) -> Float[Tensor, ""]:
        """The mean squared difference from the numbers asked for, with what noise they have."""
        check_outputs(outputs, 1, batch)
        return (outputs[..., 0] - batch.targets)[batch.mask].square().mean()

    def predictions(self, outputs: Float[Tensor, "prompt pos d_out"]) -> Predictions:
        """The one number."""
        check_outputs(outputs, 1)
        return outputs.double()
