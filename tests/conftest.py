"""Settings and fixtures that several test files use.

Nothing here may import hijack_lens: pytest reads this file while the run-time shape checks are being set up. PyTorch is
imported where it is needed, since the process that deals the tests out to others waits for this file and needs none.
"""

import functools
import gc
import inspect
import os
import random
import shutil
from collections import Counter

import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# A process per core, and so a thread per process: on tiny tensors, more only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile(
    "hijack-lens",
    deadline=None,
    derandomize="CI" in os.environ,
    max_examples=50,  # an example is often a forward pass or several; tests that are cheap ask for more
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hijack-lens")


_CHECKED = 20
_first: dict[str, pytest.Item] = {}
_calls = Counter()  # of each function, in this test


def _in_first_calls(jaxtyped):
    """jaxtyping's decorator, which is applied when a function is first called where shapes are checked.

    To decorate takes a millisecond and to check a tenth of one, for thousands of functions, those made within others
    again and again, and for some of them thousands of calls in a test.
    """

    def decorator(*, typechecker):
        decorate = jaxtyped(typechecker=typechecker)

        def decorated(made):
            if inspect.isclass(made):
                return decorate(made)
            checking = None

            @functools.wraps(made)
            def call(*args, **kwargs):
                __tracebackhide__ = True
                nonlocal checking
                if jaxtyping.config.jaxtyping_disable:
                    return made(*args, **kwargs)
                if _calls[made.__code__] >= _CHECKED:
                    with jaxtyped("context"):  # its axes are its own, as of a call that is checked
                        return made(*args, **kwargs)
                _calls[made.__code__] += 1
                if checking is None:
                    checking = decorate(made)
                return checking(*args, **kwargs)

            return call

        return decorated

    return decorator


jaxtyping.jaxtyped = _in_first_calls(jaxtyping.jaxtyped)


def pytest_collection_finish(session):
    for item in session.items:
        _first.setdefault(item.nodeid.split("[")[0], item)
    gc.collect()  # what was imported stays: the garbage collector need not look at it again and again
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)  # and of what tests make, little is in circles


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Of the cases of one test, shapes are checked in the first: all others run the library as its users do."""
    _calls.clear()
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.jaxtyping_disable = before or _first[item.nodeid.split("[")[0]] is not item
    try:
        return (yield)
    finally:
        jaxtyping.config.jaxtyping_disable = before


@pytest.fixture
def unchecked():
    """The library as its users run it: its own checks meet bad input, not the test run's type checker."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its `monkeypatch`
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture
def global_rng_untouched(unchecked):  # the type checker looks at random items of lists, by the global state
    """Fails a test in which any global random state moved."""
    import torch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    yield
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


@pytest.fixture(scope="session")
def chromium():
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("REQUIRE_BROWSER is set, but no Chromium is installed")
        pytest.skip("no Chromium on this machine: install it (Debian: apt-get install chromium) to run this test")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def browser(chromium):
    """The session's browser, without what earlier modules opened."""
    yield chromium
    for context in chromium.contexts:
        context.close()


@pytest.fixture(scope="module")
def phone(browser):
    page = browser.new_page(viewport={"width": 420, "height": 900})
    yield page
    page.close()
