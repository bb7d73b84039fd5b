"""A training run: the model, its probes over time, and its checkpoints."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save

from hijack_lens._checks import check_count
from hijack_lens._files import read_safetensors, write_atomically
from hijack_lens.language import BigramLanguage
from hijack_lens.models import TwoLayerTransformer
from hijack_lens.models.storage import checkpoints, latest_checkpoint
from hijack_lens.training.config import TrainConfig
from hijack_lens.visual.figures import Picture

_FORMAT = "hijack_lens.TrainingRun.1"
COLUMNS = ["step", "seconds", "probe", "continuations", "length", "value"]
"""Of a run's table."""


@dataclass(frozen=True)
class TrainingRun:
    """What training gives back.

    Attributes:
        model: as trained so far.
        config: it was trained with.
        step: optimizer steps taken.
        table: probes over time, tidy: step, seconds, probe, continuations, length, value. Probes of the weights
            have no continuations and no length.
    """

    model: TwoLayerTransformer
    config: TrainConfig
    step: int
    table: pd.DataFrame

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.config.steps

    def probe(self, name: str, length: int | None = None, continuations: str | None = None) -> pd.Series:
        """One probe over time, indexed by step; at the training length and continuations unless told otherwise.

        Raises:
            ValueError: for a probe that the table lacks.
        """
        rows = self.table[self.table["probe"] == name]
        if rows["length"].notna().any():
            rows = rows[rows["length"] == (self.config.length if length is None else length)]
            rows = rows[rows["continuations"] == (continuations or self.config.continuations)]
        if rows.empty:
            raise ValueError(
                f"name must be a probe of the table, got {name!r}; it has {sorted(set(self.table['probe']))}"
            )
        return rows.set_index("step")["value"].rename(name)

    def plot(self) -> Picture:
        """The birth of the two memories: the bigram memory's excess loss, and in-context accuracy, over training."""
        return birth_of_memories(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as `save_pretrained` does, and the table as `probes.csv`."""
        self.model.save_pretrained(folder)
        write_atomically(Path(folder) / "probes.csv", self.table.to_csv(index=False).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TrainingRun":
        """The latest checkpoint of a run.

        Raises:
            ValueError: for a folder without one, and for files that are truncated or hold something else.
        """
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(f"{folder} is not a folder with checkpoints")
        return read_checkpoint(checkpoint)[0]


def fingerprint(language: BigramLanguage) -> str:
    """What tells the language of a run's sequences from another."""
    return hashlib.sha256(language.pi_b.numpy().tobytes() + language.pi_u.numpy().tobytes()).hexdigest()


def write_checkpoint(
    folder: Path, run: TrainingRun, optimizer: torch.optim.Optimizer, language: BigramLanguage
) -> None:
    """Writes everything that a run needs to go on as `folder/checkpoint-STEP`, whole or not at all."""
    target = folder / f"checkpoint-{run.step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run.model.save_pretrained(partial)
        state = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        header = {
            "format": _FORMAT,
            "config": asdict(run.config),
            "step": run.step,
            "language": fingerprint(language),
            "table": run.table.to_dict(orient="list"),
        }
        data = save(state or {"empty": torch.zeros(1)}, {"hijack_lens": json.dumps(header)})
        write_atomically(partial / "training.safetensors", data)
        if not target.exists():
            os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for older in checkpoints(folder):
        if older.name < target.name:
            shutil.rmtree(older)
    for abandoned in folder.glob(".checkpoint-*.partial"):  # by runs that were killed
        shutil.rmtree(abandoned, ignore_errors=True)


def read_checkpoint(folder: Path) -> tuple[TrainingRun, dict[str, torch.Tensor], str]:
    """A checkpoint's run, its optimizer's state, and the fingerprint of the language it was trained on."""
    path = folder / "training.safetensors"
    state, header = read_safetensors(path, _FORMAT)
    model = TwoLayerTransformer.from_pretrained(folder)
    try:
        fields = header["config"]
        tuples = {name: tuple(fields[name]) for name in ("triggers", "betas", "eval_lengths")}
        config = TrainConfig(**{**fields, **tuples})
        table = pd.DataFrame(header["table"])
        step = check_count("step", header["step"], minimum=1)
        if step > config.steps or list(table.columns) != COLUMNS:
            raise ValueError(f"step {step} of {config.steps}, with a table of {list(table.columns)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a training run of hijack-lens: {error}") from error
    state.pop("empty", None)
    return TrainingRun(model, config, step, table), state, str(header.get("language"))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor], path: Path) -> None:
    """Puts a stored state back into an optimizer of the same parameters.

    Raises:
        ValueError: where the state is of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, torch.optim.AdamW):
        kind = {"exp_avg", "exp_avg_sq", "step"}
    else:
        kind = {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    nested: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        index, _, name = key.partition(".")
        known = index.isdigit() and int(index) < len(parameters) and name in kind
        # A fused optimizer writes through these tensors without looking at their shapes again.
        if not known or value.shape != (() if name == "step" else parameters[int(index)].shape):
            raise ValueError(f"{path} holds an optimizer's state of other parameters ({key})")
        nested.setdefault(int(index), {})[name] = value
    if bool(nested) != bool(kind) or any(set(values) != kind for values in nested.values()):
        raise ValueError(f"{path} lacks part of its optimizer's state")
    optimizer.load_state_dict({"state": nested, "param_groups": optimizer.state_dict()["param_groups"]})


def birth_of_memories(run: TrainingRun) -> Picture:
    """Draws both memories on one axis of steps: how much of each has been learned."""
    from hijack_lens.attribution.table import COLOURS

    picture = Picture(8.0, 4.2)
    ax = picture.figure.add_subplot()
    excess = run.probe("bigram_excess")
    ax.plot(
        excess.index, 1 - excess / excess.iloc[0], "o-", color=COLOURS["weights"], label="weights: bigram loss learned"
    )
    accuracy = run.probe("in_context_accuracy")
    ax.plot(accuracy.index, accuracy, "s-", color=COLOURS["context"], label="context: in-context accuracy")
    for name, style in (("previous_token_attention", ":"), ("induction_attention", "--")):
        series = run.probe(name)
        ax.plot(series.index, series, style, color=COLOURS["context"], label=name.replace("_", " "), alpha=0.8)
    ax.set_xlabel("training step")
    ax.set_ylabel("fraction (1 = fully learned)")
    ax.set_ylim(-0.03, 1.06)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return picture
