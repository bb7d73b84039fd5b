"""Small trainable models for the tests: float64, on the CPU, with every trained parameter away from 0."""

import torch

import hijack_lens as hl

torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for one another

LANGUAGE = hl.BigramLanguage.dirichlet(8, 0.5, seed=0)
TRIGGERS = [token for token in range(8) if int(LANGUAGE.pi_b[token].argmax()) != token][:2]


def build(positions="relative", language=LANGUAGE, **options):
    """A freshly initialised model."""
    sizes = {"d_model": 16, "n_ctx": 32, "n_offsets": 3, "dtype": torch.float64, "device": "cpu"}
    return hl.trainable_transformer(language, positions, **{**sizes, **options})


def shaken(model, scale=0.3, seed=1):
    """The same model with noise on all that training may change: no bias and no offset key is 0 any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(a, b):
    a, b = (value if isinstance(value, dict) else weights(value) for value in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
