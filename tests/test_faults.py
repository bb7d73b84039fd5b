"""A slice of `python tests/fuzz/faults.py`: Ctrl-C and exceptions at random lines leave nothing changed."""

from faults_for_tests import Fault
from fuzz.faults import hooked, run, state


def test_nothing_of_the_users_is_changed_by_faults_at_random_lines(unchecked):
    assert run(25, seed=1, progress=False) == []


def test_the_search_can_find_something(unchecked):
    model = hooked("LN")
    before = state(model)
    model.blocks[0].training = not model.blocks[0].training
    assert [key for key, value in state(model).items() if value != before[key]] == ["flags"]
    with Fault(("faults_for_tests",)) as fault:
        pass
    assert fault.lines == 0
