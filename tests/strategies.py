"""What hypothesis draws for several test files."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import hijack_lens as hl

ORDINARY = st.floats(0, 30)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def languages(draw, min_vocab=5, max_vocab=60):
    """Random languages without zeros, sharp or blurred."""
    size = draw(st.integers(min_vocab, max_vocab))
    return hl.BigramLanguage.dirichlet(size, draw(st.sampled_from([0.3, 1.0, 5.0])), seed=draw(seeds))


@dataclass
class World:
    """Everything that logits depend on."""

    tokens: torch.Tensor
    language: hl.BigramLanguage
    strengths: hl.Strengths
    triggers: list[int] | None
    positions: str
    n_ctx_train: int | None

    @property
    def setting(self):
        return hl.theory.Setting(self.strengths, self.triggers, self.positions, self.n_ctx_train)


@st.composite
def worlds(draw, max_vocab=60, max_length=80, max_batch=4, focus=ORDINARY, match=ORDINARY):
    """Prompts that repeat themselves, in any language, at any strengths, with none, some or all triggers."""
    language = draw(languages(max_vocab=max_vocab))
    size = language.d_vocab
    length = draw(st.integers(1, max_length))
    # Few different tokens, so that even short prompts repeat themselves.
    pool = torch.randperm(size, generator=torch.Generator().manual_seed(draw(seeds)))[: draw(st.integers(1, size))]
    generator = torch.Generator().manual_seed(draw(seeds))
    places = torch.randint(len(pool), (draw(st.integers(1, max_batch)), length), generator=generator)
    positions = draw(st.sampled_from(["relative", "absolute"]))
    n_ctx_train = draw(st.none() | st.integers(1, length)) if positions == "absolute" else None
    some = st.lists(st.integers(0, size - 1), min_size=1, unique=True)
    triggers = draw(st.none() | st.just([]) | some)
    strengths = hl.Strengths(draw(focus), draw(match), draw(st.floats(0, 50)), draw(st.floats(0, 3)))
    return World(pool[places], language, strengths, triggers, positions, n_ctx_train)
