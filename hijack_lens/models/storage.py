"""A model in a folder: `model.safetensors`, whose header says how to build it, and a `config.json` for people."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from hijack_lens.core.checks import check_count, check_path, check_type
from hijack_lens.core.circuit import Strengths
from hijack_lens.core.files import make_folder, read_safetensors, write_atomically, write_safetensors
from hijack_lens.language.bigrams import BigramLanguage
from hijack_lens.models.architecture import Architecture
from hijack_lens.models.formed import Formed

Model = TypeVar("Model")
"""A `BigramTransformer`, whose file imports this one."""

_FORMAT = "hijack_lens.TwoLayerTransformer.1"


def write_model(model: Any, folder: Path) -> None:
    """Writes a model's folder. The weights file holds everything; only it is read back."""
    header = {
        "architecture": asdict(model.architecture),
        "tokens": model.language.tokens,
        "level": model.language.level,
        "strengths": None if model.strengths is None else asdict(model.strengths),
        "triggers": model.triggers,
        "n_ctx_train": model.n_ctx_train,
        "formed": None if model.formed is None else asdict(model.formed),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
    }
    tensors = dict(model.named_parameters())
    tensors |= {"language.pi_b": model.language.pi_b, "language.pi_u": model.language.pi_u}
    make_folder("folder", folder)
    write_safetensors(folder / "model.safetensors", _FORMAT, tensors, header)
    readable = json.dumps({"format": _FORMAT, **header}, indent=2, ensure_ascii=False)
    write_atomically(folder / "config.json", readable.encode())


def read_model(kind: Callable[..., Model], folder: Path, device: str | torch.device | None) -> Model:
    """Reads what `write_model` wrote."""
    path = folder / "model.safetensors"
    tensors, header = read_safetensors(path, _FORMAT)
    try:
        pi_b, pi_u = tensors.pop("language.pi_b"), tensors.pop("language.pi_u")
        check_type("tokens", header["tokens"], list)
        language = BigramLanguage(pi_b, pi_u, tokens=header["tokens"], level=header["level"])
        if header["triggers"] is not None:
            check_type("triggers", header["triggers"], list)
            language.trigger_ids(header["triggers"])
        if header["n_ctx_train"] is not None:
            check_count("n_ctx_train", header["n_ctx_train"], minimum=1)
        architecture = Architecture(**header["architecture"])
        _check_shapes(architecture, language, tensors)
        model: Any = kind(
            architecture,
            language,
            strengths=None if header["strengths"] is None else Strengths(**header["strengths"]),
            triggers=header["triggers"],
            n_ctx_train=header["n_ctx_train"],
            formed=None if header.get("formed") is None else Formed(**header["formed"]),
            dtype=tensors["embed.W_E"].dtype,
            device=device,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                stored = tensors.pop(name)
                if stored.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(stored.shape)}, not {tuple(parameter.shape)}")
                parameter.copy_(stored)
                parameter.requires_grad_(name not in header["frozen"])
        names = {name for name, _ in model.named_parameters()}
        if tensors or not names.issuperset(header["frozen"]):
            raise ValueError(f"it holds {sorted(tensors) or header['frozen']}, which the architecture does not have")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model of hijack-lens: {error}") from error
    return model


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """A training run's checkpoints, oldest first; other folders are ignored."""
    return sorted(found for found in Path(folder).glob("checkpoint-*") if found.name[11:].isdigit())


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """A training run's latest checkpoint, if it has any."""
    return max(checkpoints(folder), key=lambda found: int(found.name[11:]), default=None)


def find_model(folder: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of a model, of a training run's latest checkpoint, or of a download from the Hub."""
    path = check_path("folder", folder)
    if path.is_dir():
        if (path / "model.safetensors").is_file():
            return path
        latest = latest_checkpoint(path)
        if latest is None:
            raise ValueError(f"{path} holds neither model.safetensors nor a checkpoint")
        return latest
    if path.is_absolute() or len(path.parts) != 2:  # cannot be a repository's name
        raise ValueError(f"{path} is not a folder")
    from huggingface_hub import snapshot_download

    files = ["model.safetensors", "config.json"]
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=files))
    except Exception as error:
        raise ValueError(f"{path} is not a folder, and its Hugging Face Hub download failed: {error}") from error


def _check_shapes(architecture: Architecture, language: BigramLanguage, tensors: dict[str, torch.Tensor]) -> None:
    """Checks the header's sizes against the stored tensors before anything of that size is built."""
    a = architecture
    if a.n_layers > len(tensors):
        raise ValueError(f"n_layers={a.n_layers} is more than the {len(tensors)} stored tensors allow")
    expected: dict[str, tuple[int, ...]] = {
        "embed.W_E": (language.d_vocab, a.d_model),
        "pos_embed.W_pos": (a.n_ctx, a.d_model),
    }
    if a.positions == "rotary":
        del expected["pos_embed.W_pos"]
        if a.n_ctx > 1_000_000:
            raise ValueError(f"n_ctx={a.n_ctx} is more than any stored table allows")
    expected |= {f"blocks.{layer}.attn.W_Q": (a.n_heads, a.d_model, a.d_head) for layer in range(a.n_layers)}
    if a.mlp is not None:
        expected["blocks.0.mlp.W_in"] = (a.d_model, a.d_mlp)
    if a.positions == "relative":
        expected["blocks.0.attn.W_R"] = (a.n_heads, a.n_offsets, a.d_head)
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, but the header says {shape}")
