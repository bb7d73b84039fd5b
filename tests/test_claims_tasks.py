"""The claims on other in-context learners: what is measured, and verdicts that a model without the effect loses."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest

from hijack_lens import cli, reproduction, tasks
from hijack_lens.reproduction.in_context_learners import Settings, in_context_learner
from hijack_lens.tasks import Bar, LatentConcepts, Schedule, TaskRun, latent_concepts

PLACE = "after attention 1"


@dataclass(frozen=True)
class Small(LatentConcepts):
    """Few tables, and acceptance numbers on either side of what an untrained model has."""

    doses: ClassVar[tuple[float, ...]] = (1.0, 3.0)
    claims: ClassVar[tuple[Bar, ...]] = (
        Bar("an untrained model is worse than Bayes", "loss", "above bayes", "at least", 0.1),
        Bar("it reads nothing better than itself", "decodability untrained", PLACE, "at most", 1.0),
        Bar("the one falls as the other rises", "rank correlation", "decodability", "at most", -0.9),
        Bar("it follows the context no more than half way", "share", "3", "at most", 0.9),
        Bar("it is as good as Bayes", "loss", "above bayes", "at most", 0.03),
    )


TASK = Small(5, 3, 0.3, 8, d_model=16, n_heads=2, schedule=Schedule(4))


def untrained(task, seed):
    """A run that learned nothing, and whose table says that decodability fell with the loss."""
    rows = [(step, 0.0, name, value) for step in range(4) for name, value in (("loss", -step), ("decodability", -step))]
    table = pd.DataFrame(rows, columns=["step", "seconds", "measure", "value"])
    return TaskRun(task.model(seed), task, seed, 4, table)


@pytest.fixture
def result(monkeypatch):
    for name in ("_WATCHED", "_MEASURED", "_PROBED"):
        monkeypatch.setattr(latent_concepts, name, 200)
    return in_context_learner(Settings(TASK, (5, 6, 7)), untrained)


def test_verdicts_follow_from_every_seed_and_a_model_that_learned_nothing_misses_what_it_should(result):
    assert [finding.holds for finding in result.findings] == [True, True, True, True, False]
    assert result.verdict == "in part"
    table = result.table.set_index(["seed", "measure", "where"])["value"]
    assert table.index.is_unique
    assert table[5, "rank correlation", "decodability"] == -1
    for seed in (5, 6, 7):
        task = TASK.in_world(seed)
        share = tasks.context_share(task, task.model(seed), seed=seed)
        assert table[seed, "share", "3"] == pytest.approx(float(share.share[1]))
        assert table[seed, "share of bayes", "1"] == pytest.approx(float(share.bayes[0]))
        assert task.tables.shape == (3, 5, 5)
    worst = max(table[seed, "loss", "above bayes"] for seed in (5, 6, 7))
    assert f"at worst {worst:.3f}" in result.findings[-1].measured


def test_the_picture_has_the_loss_the_probe_and_the_conflict(result):
    left, middle, right = result.figure.figure.axes
    assert len(left.lines) == 3 + 1
    assert [one.get_text() for one in middle.get_xticklabels()] == [
        "attention 0",
        "MLP 0",
        "attention 1",
        "MLP 1",
    ]
    assert right.get_xlabel() == TASK.dose
    assert len(right.lines) == 2 * (3 + 1)


def test_claims_come_in_two_groups(monkeypatch, tmp_path, capsys):
    of_tasks = reproduction.claims_of("tasks")
    assert "latent-concepts" in of_tasks
    assert sorted(of_tasks + reproduction.claims_of("papers")) == sorted(reproduction.CLAIMS)
    asked = []

    def reproduce(out, quick, claims, workers):
        asked.append(claims)
        raise RuntimeError("enough")

    monkeypatch.setattr(reproduction, "reproduce", reproduce)
    for arguments, expected in ((["--only", "tasks"], of_tasks), (["facts"], ("facts",)), ([], None)):
        monkeypatch.setattr("sys.argv", ["hijack-lens", "reproduce", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert asked.pop() == expected
    monkeypatch.setattr("sys.argv", ["hijack-lens", "reproduce", "facts", "--only", "tasks"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--only must be left out where claims are named" in capsys.readouterr().err
