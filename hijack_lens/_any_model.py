"""Models by name, and answers by text, as the command line takes them."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from hijack_lens._inputs import knows, plain_ids
from hijack_lens.models import TwoLayerTransformer


def load_model(name: Path) -> Any:
    """One of our own models from its folder, or a Hugging Face model by folder or name, in float32, ready to be read.

    Raises:
        ValueError: for what is neither.
    """
    if name.is_dir() and not is_hugging_face(name):
        return TwoLayerTransformer.from_pretrained(name)
    if not name.is_dir() and (name.is_absolute() or len(name.parts) > 2 or name.parts[:1] == ("..",)):
        raise ValueError(f"--model {str(name)!r} is not a folder")
    bars = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():  # where a bar would be written line by line
        logging.disable_progress_bar()
    try:
        model = TransformerBridge.boot_transformers(str(name), dtype=torch.float32).eval()
        if not getattr(model.tokenizer, "vocab_size", 0):  # transformers makes an empty one up where there is none
            raise ValueError("it has no tokenizer")
        return model
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"--model {str(name)!r} cannot be loaded as a language model: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder's `config.json` names a kind of model, as Hugging Face's do."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def answer_tokens(model: Any, answer: str, foil: str) -> list[int]:
    """The tokens of two answers: as they are written where both are single tokens, else both with a space before them.

    Raises:
        ValueError: where neither makes them two different tokens that the tokenizer knows.
    """
    texts = {"answer": answer, "foil": foil}
    for option, text in texts.items():
        if not text.strip() or not knows(model, plain_ids(model, text), text):
            raise ValueError(f"--{option} must be a token that the model's tokenizer knows, got {text!r}")
    written = {option: plain_ids(model, text) for option, text in texts.items()}
    chosen = written
    if not _are_single(written):
        chosen = {option: plain_ids(model, f" {text}") for option, text in texts.items()}
    if not _are_single(chosen):
        option, ids = next((option, ids) for option, ids in written.items() if len(ids) != 1)
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise ValueError(
            f"--{option} must be a single token of the model's, got {texts[option]!r}, which it reads as {pieces}"
        )
    if chosen["answer"] == chosen["foil"]:
        raise ValueError(f"--answer and --foil must be different tokens, got {answer!r} and {foil!r}")
    return [token for ids in chosen.values() for token in ids]


def spaced_instead(model: Any, text: str, token: int) -> str | None:
    """The single token that a text would be with a space before it, where that is another than the one taken."""
    if text.startswith(" ") or getattr(model, "language", None) is not None:
        return None
    ids = plain_ids(model, f" {text}")
    return model.tokenizer.decode(ids) if len(ids) == 1 and ids[0] != token else None


def _are_single(ids: dict[str, list[int]]) -> bool:
    return all(len(one) == 1 for one in ids.values())
