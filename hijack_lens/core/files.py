"""Files that are written whole or not at all, and read without trust; results saved to such a file."""

import hashlib
import json
import os
import secrets
import stat
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from filelock import FileLock, Timeout
from jaxtyping import AbstractArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hijack_lens.core.checks import check_path, plain_scalar, shown


def check_target(name: str, path: str | os.PathLike[str]) -> Path:
    """`path` as a file that `write_atomically` could write."""
    target = check_path(name, path)
    if target.is_dir() or not (target.exists() or Path(os.path.realpath(target)).parent.is_dir()):
        raise ValueError(f"{name} must be a file in an existing folder, got {shown(str(path))}")
    if target.exists() and not (target.is_file() or _is_stream(target)):
        raise ValueError(f"{name} must be a file, a pipe or a character device, got {shown(str(path))}")
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError(f"{name} must be a file that may be written, got {shown(str(path))}, which is read-only")
    return target


def make_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """`path` as a folder, made if need be."""
    folder = check_path(name, path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got the file {shown(str(path))}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be made, got {shown(str(path))}: {error}") from error
    return folder


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file, whole or not at all: who reads it meanwhile, or after a crash, sees the old one or the new one.

    Links are followed, and a file that was there keeps its mode and owner. Pipes and devices are written into.

    Raises:
        TypeError, ValueError: for a folder, a file that is read-only, or one in no existing folder.
    """
    path = check_target("path", path)
    if path.exists() and _is_stream(path):
        descriptor = _descriptor(path)
        # A pipe that nobody reads raises at once, instead of waiting for somebody.
        stream = os.open(path, os.O_WRONLY | os.O_NONBLOCK) if descriptor is None else os.dup(descriptor)
        with open(stream, "wb") as file:
            os.set_blocking(stream, True)
            file.write(data)
        return path
    target = Path(os.path.realpath(path))
    before = target.stat() if target.exists() else None
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.touch(0o666 if before is None else 0o600, exist_ok=False)
        partial.write_bytes(data)
        sync(partial)
        if before is not None:
            with suppress(PermissionError, AttributeError):  # only root may give files away; Windows has no owners
                os.chown(partial, before.st_uid, before.st_gid)
            partial.chmod(stat.S_IMODE(before.st_mode))
        os.replace(partial, target)
        sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _is_stream(path: Path) -> bool:
    """Whether a path stands for a pipe, a character device, or what this process has open."""
    mode = path.stat().st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout stands for."""
    while path.is_symlink():
        if os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        path = path.parent / os.readlink(path)
    return None


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    if os.name == "posix":  # elsewhere, folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(name: str, given: str | os.PathLike[str], path: Path) -> Iterator[None]:
    """Holds the lock file of what the user has given, against this process and others; until it is killed, if it is.

    Raises:
        ValueError: if another holds it, or it cannot be written.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{name} must be written to by one run at a time, got {str(given)!r}, which another is writing to"
        ) from error
    except OSError as error:
        raise ValueError(f"{name} must be where files may be written, got {str(given)!r}: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()


def write_safetensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> None:
    """Writes what `read_safetensors` reads, with a checksum of each tensor and of the header."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = json.dumps({"format": kind, **header})
    metadata = {"hijack_lens": written, "checksums": json.dumps(_checksums(kept, written))}
    write_atomically(path, save(kept, metadata))


def _checksums(tensors: Mapping[str, torch.Tensor], header: str) -> dict[str, str]:
    """By tensor; that of the header has an empty name."""
    sums = {"": hashlib.sha256(header.encode()).hexdigest()}
    for name, tensor in tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        sums[name] = digest.hexdigest()
    return sums


def read_safetensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A safetensors file's tensors, and the header that marks it as our `kind`.

    Raises:
        ValueError: for any other file, and for one that has changed since it was written. Files of versions that wrote
            no checksums are taken as they are.
    """
    path = check_path("path", path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get("hijack_lens", "null"))
            ours = isinstance(header, dict) and header.get("format") == kind
            tensors = {name: file.get_tensor(name) for name in file.keys()} if ours else {}  # noqa: SIM118 (no mapping)
            sums = json.loads(metadata["checksums"]) if "checksums" in metadata else None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if not ours:
        other = header.get("format") if isinstance(header, dict) else None
        raise ValueError(f"{path} is not a {kind} file" + (f", but a {shown(other)} one" if other else ""))
    if sums is not None:
        found = _checksums(tensors, metadata["hijack_lens"])
        written = sums if isinstance(sums, dict) else {}
        damaged = [name or "its header" for name in {**found, **written} if found.get(name) != written.get(name)]
        if damaged:
            raise ValueError(f"{path} is damaged: {', '.join(damaged)} not as written, by the checksums")
    return tensors, header


Kept = TypeVar("Kept", bound="Saved")
Tensors = dict[str, torch.Tensor]


class Saved:
    """A dataclass saved in a safetensors file: tensors as tensors, all else as JSON in the file's header.

    A field is restored by its annotation. A dataclass in a field is saved the same way, its tensors named "field.part".
    Fields that equality ignores are not saved.

    Attributes:
        older_names: today's field names, by their names in files of earlier versions.
    """

    older_names: ClassVar[Mapping[str, str]] = {}

    def _save_data(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors: Tensors = {}
        header = _plain_fields(self, "", tensors)
        write_safetensors(path, _format(type(self)), tensors, header)

    @classmethod
    def load(cls: type[Kept], path: str | os.PathLike[str]) -> Kept:
        """Reads what `save` wrote as data; nothing in it is executed.

        Raises:
            ValueError: for any other file.
        """
        tensors, header = read_safetensors(path, _format(cls))
        del header["format"]
        tensors, header = (
            {cls.older_names.get(name, name): x for name, x in part.items()} for part in (tensors, header)
        )
        try:
            tensors, header = cls._from_older(tensors, header)
            return _restored_fields(cls, header, tensors, "")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved {cls.__name__}: {error!r}") from error

    @classmethod
    def _from_older(cls, tensors: Tensors, header: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and header as this version writes them; for classes whose layout has changed."""
        return tensors, header


def _format(kind: type) -> str:
    return f"hijack_lens.{kind.__name__}.1"


def _plain_fields(value: Any, prefix: str, tensors: Tensors) -> dict[str, Any]:
    """A dataclass's fields as JSON types; its tensors go into `tensors`."""
    parts = {name: _plain(getattr(value, name), f"{prefix}{name}", tensors) for name in _kept(type(value))}
    return {name: part for name, part in parts.items() if f"{prefix}{name}" not in tensors}


def _plain(value: Any, name: str, tensors: Tensors) -> Any:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        storages = {other.untyped_storage().data_ptr() for other in tensors.values()}
        # Two tensors that share memory are none that safetensors would write.
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        return None
    if is_dataclass(value):
        return _plain_fields(value, f"{name}.", tensors)
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return plain_scalar(value)


def _restored_fields(kind: Any, header: Mapping[str, Any], tensors: Tensors, prefix: str) -> Any:
    known = _kept(kind)
    unknown = set(header) - set(known)
    unknown |= {name for name in tensors if name.startswith(prefix) and name[len(prefix) :].split(".")[0] not in known}
    if unknown:
        raise ValueError(f"it holds {sorted(unknown)}, which a {kind.__name__} does not have")
    values = {}
    for name, (field, hint) in known.items():
        if prefix + name in tensors:
            values[name] = _restored(hint, None, tensors, prefix + name)
        elif name in header:
            values[name] = _restored(hint, header[name], tensors, prefix + name)
        elif field.default is MISSING:
            # An optional tensor may be missing from the file.
            if not any(_is_array(part) for part in get_args(hint)):
                raise ValueError(f"it lacks {name}")
            values[name] = None
    return kind(**values)


def _restored(hint: Any, value: Any, tensors: Tensors, name: str) -> Any:
    """A value of an annotated type, from its JSON form."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _restored(_member(arguments, value, name in tensors), value, tensors, name)
    if _is_array(hint):
        if not isinstance(tensors.get(name), hint):
            raise ValueError(f"{name} must be a {hint.__name__}, got {_shape(tensors.get(name))}")
        return tensors[name]
    if is_dataclass(hint):
        return _restored_fields(hint, _checked(value, dict, name), tensors, f"{name}.")
    if origin is tuple:
        listed = _checked(value, list, name)
        kinds = [arguments[0]] * len(listed) if arguments[1:] == (...,) else arguments
        return tuple(
            _restored(kind, item, tensors, f"{name}.{index}")
            for index, (kind, item) in enumerate(zip(kinds, listed, strict=True))
        )
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        of_key, of_item = arguments
        pairs = _checked(value, dict, name).items()  # JSON turned the keys into strings
        return {of_key(key): _restored(of_item, item, tensors, f"{name}.{key}") for key, item in pairs}
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be one of {arguments}, got {value!r:.80}")
        return value
    return value if hint is Any else _checked(value, (float, int) if hint is float else hint, name)


def _member(arguments: tuple[Any, ...], value: Any, is_tensor: bool) -> Any:
    """Which of several annotated types a JSON value has."""

    def fits(hint: Any) -> bool:
        origin = get_origin(hint)
        if _is_array(hint):
            return is_tensor
        if is_tensor or value is None:
            return hint is type(None) and not is_tensor
        if origin is Literal:
            return value in get_args(hint)
        if isinstance(value, dict):
            return is_dataclass(hint) or (isinstance(origin, type) and issubclass(origin, Mapping))
        return origin is tuple if isinstance(value, list) else isinstance(hint, type) and isinstance(value, hint)

    found = next((hint for hint in arguments if fits(hint)), None)
    if found is None:
        raise ValueError(f"it holds {value!r:.80}, which is none of {arguments}")
    return found


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _checked(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r:.80}, of another type")
    return value


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _kept(kind: Any) -> dict[str, tuple[Field, Any]]:
    hints = get_type_hints(kind)
    return {field.name: (field, hints[field.name]) for field in fields(kind) if field.compare}
