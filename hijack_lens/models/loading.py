"""Loading models by name."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from hijack_lens.models.transformer import BigramTransformer


def load_model(name: Path) -> Any:
    """One of our own models from its folder, or a Hugging Face model by folder or name, in float32, in eval mode.

    Raises:
        ValueError: if it is neither.
    """
    if name.is_dir() and not is_hugging_face(name):
        return BigramTransformer.from_pretrained(name)
    if not name.is_dir() and (name.is_absolute() or len(name.parts) > 2 or name.parts[:1] == ("..",)):
        raise ValueError(f"--model {str(name)!r} is not a folder")
    bars = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():  # in a log, a bar would be written line by line
        logging.disable_progress_bar()
    try:
        model = TransformerBridge.boot_transformers(str(name), dtype=torch.float32).eval()
        if not getattr(model.tokenizer, "vocab_size", 0):  # transformers makes up an empty one if there is none
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
