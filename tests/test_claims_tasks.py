"""The claims on other in-context learners: what is measured, and verdicts that a model without the effect loses."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import pytest
import torch

from hijack_lens import cli, reproduction, tasks
from hijack_lens.reproduction import claims, in_context_learners
from hijack_lens.reproduction.comparison import comparison
from hijack_lens.reproduction.in_context_learners import Settings, in_context_learner
from hijack_lens.tasks import (
    AlgorithmSelection,
    Bar,
    CompressedDigits,
    LatentConcepts,
    Schedule,
    TaskRun,
    latent_concepts,
)

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


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_WATCHED", "_MEASURED", "_PROBED"):
            patch.setattr(latent_concepts, name, 200)
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


def test_above_bayes_is_the_loss_that_exact_bayes_would_save(result):
    """In expectation; so over many prompts, within the error of their mean."""
    table = result.table.set_index(["seed", "measure", "where"])["value"].sort_index()
    for seed in (5, 6, 7):
        task = TASK.in_world(seed)
        batch = task.sample(20000, 1)
        with torch.no_grad():
            model = task.predictions(task.model(seed)(batch.inputs))
        said = [
            one.gather(-1, batch.targets[..., None])[..., 0].log() for one in (task.references(batch)["bayes"], model)
        ]
        by_position = table[seed, "nats above bayes"]
        assert by_position.index.tolist() == [str(position) for position in range(8)]
        assert by_position.to_numpy() == pytest.approx((said[0] - said[1]).mean(0).numpy(), abs=0.06)
        assert (by_position > 0.2).all()


def test_numbers_are_above_bayes_where_they_are_asked():
    """A model that says 0 is above Bayes by the mean square of what Bayes says."""
    task = AlgorithmSelection(n_pairs=3, d_model=8, n_layers=1, n_heads=1, schedule=Schedule(4))
    model = task.model(0)
    with torch.no_grad():
        model.W_U.zero_()
        model.b_U.zero_()
    run = TaskRun(model, task, 0, 4, untrained(TASK, 0).table)
    found = in_context_learners._above_bayes(run)
    assert set(found["measure"]) == {"squared error above bayes"}
    batch = task.sample(20000, 1)
    wanted = task.references(batch)["bayes"][..., 0].square().mean(0)[batch.mask[0]]
    assert found["where"].tolist() == [str(position) for position in batch.mask[0].nonzero().flatten().tolist()]
    assert found["value"].to_numpy() == pytest.approx(wanted.numpy(), rel=0.15)


def test_a_comparison_has_a_row_per_learner_and_says_what_was_not_measured(result):
    rows = [(seed, "share", dose, value) for seed, value in ((0, 0.1), (1, 0.3)) for dose in ("2", "10")]
    rows += [(seed, "share of bayes", dose, 0.5) for seed in (0, 1) for dose in ("2", "10")]
    rows += [(0, "error added without", "L0H1", math.pi)]
    other = pd.DataFrame(rows, columns=["seed", "measure", "where", "value"])
    picture = comparison({"latent-concepts": (TASK.dose, result.table), "other": ("dose", other)})
    width, height = picture.figure.get_size_inches()
    assert width / height == pytest.approx(16 / 9)
    axes = picture.figure.axes
    assert len(axes) == 2 * 5
    assert [[one.get_text() for one in ax.texts] for ax in axes] == [
        *([[]] * 5),
        ["none: exact Bayes\nis not known"],
        [],
        ["not measured"],
        ["not measured"],
        [],
    ]
    mean = result.table.groupby(["measure", "where"], sort=False)["value"].mean()
    assert axes[0].lines[0].get_ydata() == pytest.approx(mean["nats above bayes"].to_numpy())
    assert axes[1].lines[1].get_ydata() == pytest.approx(mean["share of bayes"].to_numpy())
    places = [one.get_text() for one in axes[2].get_xticklabels()]
    assert places == ["A0", "M0", "A1", "M1"]
    for ax, bars in (
        (axes[2], [mean["decodability"], mean["decodability untrained"]]),
        (axes[3], [1 - mean["moved KL"], 1 - mean["random KL"]]),
    ):
        assert [one.get_height() for one in ax.patches] == pytest.approx([*bars[0], *bars[1]])
    assert [one.get_text() for one in axes[4].get_xticklabels()] == ["L0H0", "L0H1", "L0MLP", "L1H0", "L1H1", "L1MLP"]
    share = axes[6]
    assert share.get_xlabel() == "dose"
    assert share.lines[0].get_xydata().tolist() == [[2, pytest.approx(0.2)], [10, pytest.approx(0.2)]]
    # Student's t of two seeds: 12.706 times the standard error, 0.1.
    assert share.collections[0].get_datalim(share.transData).height == pytest.approx(2 * 1.2706, rel=1e-4)
    assert [one.get_height() for one in axes[9].patches] == [math.pi]


@dataclass(frozen=True)
class Other(Small):
    """A learner of another kind."""


def test_a_page_on_several_learners_ends_with_their_comparison_each_by_its_first_claim(monkeypatch, tmp_path):
    for name in ("_WATCHED", "_MEASURED", "_PROBED"):
        monkeypatch.setattr(latent_concepts, name, 200)
    other = Other(5, 3, 0.3, 8, d_model=16, n_heads=2, schedule=Schedule(4))
    for name, task in (("latent-concepts", TASK), ("algorithm-selection", TASK), ("affine-recurrence", other)):
        settings = Settings(task, (5,))
        small = reproduction.Claim("It learns.", "here", in_context_learner, settings, replace(settings, seeds=(5, 6)))
        monkeypatch.setitem(reproduction.CLAIMS, name, small)
        monkeypatch.setitem(claims._TASKS, name, small)
    compared = []
    monkeypatch.setattr(claims, "comparison", lambda learners: compared.append([*learners]) or comparison(learners))
    alike = reproduction.reproduce(tmp_path, False, ["latent-concepts", "algorithm-selection"], workers=1)
    assert "id='comparison'" not in alike.report.read_text()
    both = reproduction.reproduce(tmp_path, False, ["latent-concepts", "affine-recurrence"], workers=1)
    assert both.report.read_text().index("id='comparison'") > both.report.read_text().index("id='affine-recurrence'")
    assert compared == [["latent-concepts", "affine-recurrence"]]


def test_where_bayes_is_not_known_shares_are_the_models_alone():
    """Of a task without it, the rest of the claim's table and picture is there."""
    task = CompressedDigits(prior=False, d_model=8, n_heads=2, schedule=Schedule(2, evaluate_every=2))
    found = in_context_learner(Settings(task, (5,)))
    measures = set(found.table["measure"])
    assert "share" in measures
    assert not measures & {"share of bayes", "nats above bayes", "squared error above bayes"}
    assert found.table["value"][found.table["measure"] == "share"].notna().all()
    right = found.figure.figure.axes[2]
    assert len(right.lines) == 1 + 1
    picture = comparison({"digits": (task.dose, found.table)})
    said = [[one.get_text() for one in ax.texts] for ax in picture.figure.axes]
    assert said == [["none: exact Bayes\nis not known"], [], [], [], []]


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
