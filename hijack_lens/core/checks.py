"""Checks of a user's arguments: every error names the argument, its value, and what it should be."""

import functools
import itertools
import math
import numbers
import operator
import os
import secrets
import types
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Seed = int | torch.Generator | None
"""Of random draws: an int; a generator, which the draws leave advanced; or `None`, for other draws every time."""


def shown(value: object) -> str:
    """A value in an error message: its repr on one line, cut to 80 characters; its type, if even that fails."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a broken __repr__, lists in lists beyond the stack, ints of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_generator(seed: Any) -> torch.Generator:
    """A CPU generator for a `Seed`; the global random state is neither read nor changed."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(fixed_seed(seed))


def fixed_seed(seed: Any) -> int:
    """An int for a `Seed`: itself, or one drawn from the generator, or from the system's entropy."""
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**63 - 1, (), generator=seed))
    number = as_int(seed)
    if number is None:
        raise TypeError(f"seed must be an int, a torch.Generator or None, got {shown(seed)}")
    if number < 0:
        raise ValueError(f"seed must be at least 0, got {shown(number)}")
    if number >= 2**64:
        raise ValueError(f"seed must be below 2^64, got {shown(number)}")
    return number


def as_int(value: object) -> int | None:
    """`value` as an int, if it is one (NumPy and PyTorch scalars are; booleans, and arrays of one, are not)."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # a TypeError, as a rule; whatever else an object's __index__ raises, it is no int
        return None


def plain_scalar(value: Any) -> Any:
    """A NumPy or PyTorch scalar as Python's own, a fraction as a float; anything else as it is."""
    if isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral):
        return float(value)
    return value.item() if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0 else value


def check_type(name: str, value: object, kind: type) -> None:
    """`value` is of type `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {shown(value)}")


def check_list(name: str, value: object, what: str) -> list[Any]:
    """The elements of a list, tensor, array or other iterable, but not of a text; `what` says what they should be."""
    elements: list[Any] = []
    try:
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) <= _LONGEST:
            return value.tolist()
        if isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray)):
            elements = list(itertools.islice(value, _LONGEST + 1))
            if len(elements) <= _LONGEST:
                return elements
    except Exception as error:  # raised by the object's own iteration
        raise TypeError(f"{name} must be {what}, got {shown(value)}, which cannot be iterated over") from error
    if elements:
        raise ValueError(f"{name} must hold at most {_LONGEST} elements, got {shown(value)}")
    raise TypeError(f"{name} must be {what}, got {shown(value)}")


_LONGEST = 2**22
"""Elements of a list: beyond, an iterator is taken for endless."""


def check_texts(name: str, value: object) -> list[str]:
    """The elements of a list or other iterable of texts."""
    texts = check_list(name, value, "a list of texts")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a list of texts, got {shown(text)} in it")
    return texts


def check_tensor(name: str, value: object, what: str, floating: bool = True) -> None:
    """`value` is an ordinary tensor, of numbers that PyTorch computes with; `what` says of what."""
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_meta
        or value.is_floating_point() is not floating
        or value.is_complex()
        or value.dtype.itemsize < 2 * floating
    ):
        raise TypeError(f"{name} must be a tensor of {what}, got {shown(value)}")


def check_path(name: str, value: object) -> Path:
    """`value` as a path that a file could have."""
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
        encoded = os.fsencode(path)
    except Exception as error:  # also of lone surrogates
        raise TypeError(f"{name} must be a path, as text or a Path, got {shown(value)}") from error
    if not isinstance(path, str):
        raise TypeError(f"{name} must be a path, as text or a Path, got {shown(value)}")
    if not encoded or b"\0" in encoded or max(map(len, encoded.split(b"/"))) > 255 or len(encoded) > 4000:
        raise ValueError(f"{name} must be a path that a file can have, got {shown(value)}")
    return Path(path)


def check_dtype(name: str, value: object) -> None:
    """`value` is a dtype that models compute in."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise TypeError(
            f"{name} must be a floating-point torch.dtype, got {shown(value)}; those of one byte are too small"
        )


def check_device(name: str, value: object) -> None:
    """`value` is `None` or a device that this machine has."""
    if value is None:
        return
    try:
        device = torch.device(value)  # type: ignore[call-overload]
        torch.zeros(1, device=device).item()  # meta tensors, for one, hold no numbers
    except Exception as error:  # of many kinds: RuntimeError, AssertionError, NotImplementedError ...
        raise ValueError(f'{name} must be a device that is there, such as "cpu", got {shown(value)}') from error


def check_text(name: str, value: object) -> str:
    """`value` as text that UTF-8 can hold, without the mark that a file's first bytes may be (U+FEFF)."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start]
        raise ValueError(
            f"{name} must be text, got {value!r:.80}, which holds a lone surrogate, {lone!r}, at {error.start}"
        ) from error
    return value.removeprefix("\ufeff")


def check_tokens(name: str, tokens: object, d_vocab: int, n_ctx: int | None = None) -> Int[Tensor, "*batch pos"]:
    """`tokens` as integer ids of shape [pos] or [batch, pos], each in the vocabulary and within `n_ctx`."""
    if not isinstance(tokens, Tensor):
        if not isinstance(tokens, Iterable) or isinstance(tokens, (str, bytes)):
            raise TypeError(f"{name} must be a tensor of token ids, got {type(tokens).__name__} {shown(tokens)}")
        listed = tokens if isinstance(tokens, np.ndarray) else check_list(name, tokens, "token ids")
        _check_lengths(name, listed)
        try:
            tokens = torch.as_tensor(np.asarray(listed))
        except Exception as error:  # of many kinds, by what the elements are
            raise ValueError(f"{name} must be token ids, got {shown(tokens)}") from error
        tokens = tokens.long() if tokens.numel() == 0 else tokens
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{name} must hold integer token ids, got dtype {tokens.dtype}")
    if tokens.is_meta or tokens.layout is not torch.strided:
        raise ValueError(f"{name} must be an ordinary tensor of token ids, got {shown(tokens)}")
    if tokens.ndim not in (1, 2) or tokens.numel() == 0:
        raise ValueError(f"{name} must be a non-empty [pos] or [batch, pos], got shape {tuple(tokens.shape)}")
    tokens = tokens.long()  # torch finds no minimum of uint16, in which nanoGPT keeps its tokens
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= d_vocab:
        bad = low if low < 0 else high
        raise ValueError(f"{name} holds token id {bad}; the vocabulary has ids 0 to {d_vocab - 1}")
    if n_ctx is not None and tokens.shape[-1] > n_ctx:
        raise ValueError(f"{name} is {tokens.shape[-1]} tokens long; the model takes at most n_ctx={n_ctx}")
    return tokens


def _check_lengths(name: str, prompts: Iterable[Any]) -> None:
    """Several prompts, if that is what these are, are equally long: they share one axis of positions."""
    listed = [] if isinstance(prompts, np.ndarray) else [one for one in prompts if isinstance(one, Sized)]
    lengths = [len(one) for one in listed if not isinstance(one, str) and getattr(one, "ndim", 1) != 0]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{name} must be prompts of one length, since they share one axis of positions, got {lengths!s:.60} "
            "tokens: pass texts of one length, or one at a time"
        )


def check_count(name: str, value: object, minimum: int = 0) -> int:
    """`value` as an int of at least `minimum`."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(number)}")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {shown(number)}")
    return number


def check_position(name: str, value: object, length: int, last: int) -> int:
    """`value` as a position from 0 to `last`; negative values count from the prompt's end."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be a position (an int), got {shown(value)}")
    position = number + length if number < 0 else number
    if not 0 <= position <= last:
        upto = "the prompt's last position" if last == length - 1 else "the query"
        raise ValueError(f"{name} must be from 0 to {last}, {upto}, or count from the end; got {shown(number)}")
    return position


def check_number(name: str, value: object, positive: bool = False) -> float:
    """`value` as a finite float >= 0, or > 0 if `positive`."""
    number = _as_float(name, value)
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be a finite number {'>' if positive else '>='} 0, got {shown(value)}")
    return number


def check_fraction(name: str, value: object) -> float:
    """`value` as a float from 0 to 1."""
    number = _as_float(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {shown(value)}")
    return number


def check_real(name: str, value: object) -> float:
    """`value` as a float, whatever its sign."""
    number = _as_float(name, value)
    if math.isinf(number) and value != number:
        raise ValueError(f"{name} must be a number that a float can hold, got {shown(value)}")
    return number


def _as_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """`value` is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:  # an array would be compared element by element
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_distribution(
    name: str, values: object, shape: tuple[int, ...], copy: bool = True
) -> Float[Tensor, "... d_vocab"]:
    """`values` as float64 probabilities of `shape`, their last axis summing to exactly one.

    Rows may be off by up to 1e-6, as float32 rows are, and are then rescaled. Without `copy`, in place.
    """
    try:
        given = (values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))).detach().cpu()
        if given.is_complex() or given.layout is not torch.strided:
            raise TypeError("complex numbers are not probabilities; sparse tensors lack what is done with these")
        probabilities = given.clone() if copy else given
        probabilities = probabilities.double()
    except Exception as error:  # of many kinds, by what the elements are
        got = f"{type(values).__name__} {shown(values)}"
        raise TypeError(f"{name} must be a tensor of probabilities, got {got}") from error
    if tuple(probabilities.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(probabilities.shape)}")
    sums = probabilities.sum(-1)  # large tables leave no room for copies
    if not bool(sums.isfinite().all()):
        raise ValueError(f"{name} must be finite, got a NaN or an infinity")
    if probabilities.numel() and float(probabilities.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {float(probabilities.min()):g}")
    off = (sums - 1).abs()
    if bool((off > 1e-6).any()):
        where = f"row {int(off.argmax())}" if probabilities.ndim > 1 else "it"
        raise ValueError(
            f"{name} must sum to 1 along its last axis; {where} sums to {float(sums.flatten()[off.argmax()]):g}"
        )
    # Rows already normalised stay the same, bit for bit, when a language is saved and loaded.
    probabilities /= torch.where(off > 1e-14, sums, 1.0).unsqueeze(-1)
    return probabilities


def check_shapes(result: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The fields of a result are tensors of these shapes, where they are there."""
    for name, shape in shapes.items():
        tensor = getattr(result, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_fields(result: Any) -> None:
    """The fields of a dataclass are of the kinds that their annotations say, tensors with as many axes as these name.

    How long the axes are, and dtypes, are not looked at.
    """
    hints = _hints(type(result))
    for one in fields(result):
        if not _fits(value := getattr(result, one.name), hints[one.name]):
            raise TypeError(f"{one.name} must be a {_described(hints[one.name])}, got {shown(value)}")


def check_columns(name: str, table: Any, columns: Sequence[str]) -> None:
    """`table` has these columns, among others."""
    lacking = [column for column in columns if column not in table.columns]
    if lacking:
        raise ValueError(f"{name} must have the columns {', '.join(columns)}, got one without {', '.join(lacking)}")


_hints: Any = functools.cache(get_type_hints)


def _described(hint: Any) -> str:
    inside = [x for x in get_args(hint) if x is not Ellipsis]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_described, inside))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inside))
    if hasattr(hint, "dim_str"):
        return f"Tensor [{hint.dim_str}]"
    name = getattr(hint, "__name__", str(hint)).replace("NoneType", "None")
    return f"{name} of {' and '.join(dict.fromkeys(map(_described, inside)))}" if get_origin(hint) is tuple else name


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return isinstance(value, (str, int, type(None))) and value in inside
    if hasattr(hint, "dim_str"):
        axes = hint.dim_str.split()
        fits = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        return fits and (value.ndim == len(axes) or any(axis == "..." or axis.startswith("*") for axis in axes))
    if origin is tuple and isinstance(value, tuple):
        kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint in (int, float):
        return as_int(value) is not None or (hint is float and isinstance(value, numbers.Real))
    kind = origin or hint
    return hint is Any or not isinstance(kind, type) or isinstance(value, kind)
