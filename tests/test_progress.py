"""Long calls say how long they will take, where no bar can be seen; short ones say nothing."""

import pytest
from models_for_tests import hooked

import hijack_lens as hl
from hijack_lens import hooks
from hijack_lens.core import progress

TOKENS, MARGIN, LITTLE = [1, 2, 3, 1, 2], hl.logit_diff(1, 2), 1e-6
CALLS = {
    "the sweep": lambda model: hooks.ablate_sweep(model, TOKENS, MARGIN, memory_gb=LITTLE),
    "path_sweep": lambda model: hooks.path_sweep(model, TOKENS, TOKENS[::-1], MARGIN, "all", memory_gb=LITTLE),
    "shapley": lambda model: hl.shapley(model, TOKENS, MARGIN, "all", memory_gb=LITTLE),
    "each token's own run": lambda model: hl.memory_matrix(model, "all"),
}


def length(count):
    return f"{count * 10} minutes" if count < 12 else f"{count / 6:.0f} hours"


@pytest.mark.parametrize("name", CALLS)
def test_a_long_call_says_how_long_it_will_take(name, caplog, monkeypatch):
    monkeypatch.setattr("hijack_lens.memories.token_tables._ACTIVATIONS", 1)  # a token at a time
    with monkeypatch.context() as slow:
        clock = iter(range(0, 10**9, 600))  # every look at the clock takes ten minutes
        slow.setattr(progress.time, "monotonic", lambda: next(clock))
        CALLS[name](hooked("LN"))
    (said,) = [record.getMessage() for record in caplog.records]
    count = int(said.split(": ")[1].split()[0])
    assert said.startswith(f"{name} will take about {length(count)} at this pace: {count} ")
    caplog.clear()
    CALLS[name](hooked("LN"))
    assert not caplog.records
