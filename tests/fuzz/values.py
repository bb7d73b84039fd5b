"""Valid arguments: hypothesis strategies for each kind of parameter, by its annotation, and by its name where the
annotation leaves the meaning open."""

import collections.abc
import contextlib
import functools
import inspect
import os
import types
import typing
import uuid
from pathlib import Path
from typing import Any, Literal, Union

import hypothesis
import matplotlib.figure
import numpy as np
import pandas as pd
import torch
from bridges_for_tests import gpt2_like
from hypothesis import strategies as st
from models_for_tests import hooked, perturbed

import hijack_lens as hl
from hijack_lens.models import Architecture
from tests.fuzz.surface import Parameter, Target, targets

D_VOCAB, LENGTH = 7, 8
SIZES = {"batch": 2, "pos": LENGTH, "query": LENGTH, "key": LENGTH, "d_vocab": D_VOCAB, "sequence": 4}


@functools.cache
def models() -> dict[str, Any]:
    """Small models of both families: with a language, without a tokenizer, and with one of words."""
    trained = hl.trainable_transformer(hl.BigramLanguage.dirichlet(D_VOCAB), d_model=8, n_ctx=24, dtype=torch.float64)
    return {
        "handwritten": perturbed(n_ctx=24),
        "HookedTransformer": hooked("LN"),
        "GPT-2 bridge": gpt2_like(),
        "trainable": trained,
    }


def fresh_path() -> str:
    return f"{uuid.uuid4().hex}.out"


def _metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 1].mean()


def _point(**arguments: Any) -> dict[str, Any]:
    return {"found": len(arguments)}


IDS = st.integers(0, D_VOCAB - 1)
TEXT = st.sampled_from(["0 1 2 0 1 3 4 0", "zero one two zero one", "a b a b", "one", "3", "The cat. The dog."])
PROMPTS = st.one_of(
    st.lists(IDS, min_size=LENGTH, max_size=LENGTH).map(torch.tensor),
    st.just(torch.tensor([1, 2, 3, 1, 2, 4, 5, 1])),
    st.lists(IDS, min_size=LENGTH, max_size=LENGTH),
    st.integers(0, 99).map(lambda s: torch.randint(D_VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(s))),
    st.builds(lambda s: hl.hijack_prompt(perturbed_language(), 1, 2, 2, LENGTH, seed=s), st.integers(0, 99)),
    TEXT,
)
TOKENS = st.one_of(IDS, st.lists(IDS, min_size=1, max_size=3, unique=True), st.sampled_from(["0", "one", "a"]))
HEAD = st.sampled_from([hl.Component(1, "head", 0), "L0H0", "L1H0", "induction", "previous_token"])
COMPONENTS = st.sampled_from(["all", ["L0H0", "L1MLP"], "induction", {"early": ["L0H0"]}, hl.Component(0, "head", 0)])
METRICS = st.sampled_from([hl.logit_diff(1, 2), hl.metrics.log_prob(3), hl.metrics.kl(), hl.metrics.prob(1), _metric])


@functools.cache
def perturbed_language() -> hl.BigramLanguage:
    return hl.BigramLanguage.dirichlet(D_VOCAB, seed=0)


@functools.cache
def learners() -> list[Any]:
    """Small tasks, of a few steps of training."""
    schedule = hl.tasks.Schedule(2, batch_size=4, evaluate_every=2)
    small: dict[str, Any] = {"d_model": 8, "n_heads": 2, "schedule": schedule}
    return [
        hl.tasks.LatentConcepts(5, 2, 0.5, LENGTH, **small),
        hl.tasks.AlgorithmSelection(2, 3, **small),
        hl.tasks.AlgorithmSelection(2, 3, (hl.tasks.LinearPrompts(0.1, 1), hl.tasks.LogisticPrompts(1.0)), **small),
        hl.tasks.AffineRecurrence(4, **small),
        hl.tasks.Representations(2, 3, n_layers=2, **small),
        hl.tasks.RelevantPatterns(6, 4, 5, n_shifts=1, d_mlp=8, schedule=schedule),
        hl.tasks.BigramMemories(4, length=LENGTH, **small),
        hl.tasks.CompressedDigits(2, 2, **small),
    ]


CIRCUIT = hl.Circuit(previous_token=(hl.Component(0, "head", 0),), induction=(hl.Component(1, "head", 0),))

BY_NAME: dict[str, Any] = {
    **dict.fromkeys(("prompt", "clean", "corrupted", "reference", "source"), PROMPTS),
    **dict.fromkeys(("metric",), METRICS),
    **dict.fromkeys(("triggers", "vocabulary", "tokens"), TOKENS),
    "concentration": st.floats(0.1, 3),
    "components": COMPONENTS,
    "heads": COMPONENTS,
    "head": HEAD,
    "sender": HEAD,
    "receiver": st.sampled_from(["L1H0", "unembed", "L1MLP", "induction"]),
    "circuit": st.just(CIRCUIT),
    "pi_b": st.sampled_from([3, 7]).map(lambda n: torch.full((n, n), 1 / n, dtype=torch.float64)),
    "pi_u": st.none(),
    "text": TEXT,
    "corpus": TEXT,
    "level": st.sampled_from(["char", "word"]),
    "activations": st.sampled_from([("attn_out",), ("resid_pre", "mlp_out"), "z", "q"]),
    "function": st.just(_point),
    "grid": st.sampled_from([{"a": [1, 2], "b": ["x"]}, [{"a": 1}]]),
    "executor": st.none(),
    "ax": st.builds(lambda: matplotlib.figure.Figure().add_subplot()),
    "image": st.just(np.eye(3)),
    "result": st.deferred(lambda: st.sampled_from([one for kept in pool().values() for one in kept])),
    "latent": st.sampled_from(["table", "kind", "weights", "slope", "features", "label", "digit", "continuation"]),
    "point": st.sampled_from(["hook_embed", "blocks.1.hook_resid_post"]),
    "points": st.sampled_from(["hook_embed", ["blocks.0.hook_attn_out", "hook_embed"]]),
    "repo_id": st.none(),  # nothing is uploaded
}
SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.builds(lambda s: torch.Generator().manual_seed(s), st.integers(0, 9)))
COUNTS = st.integers(1, 4)
NOT_OMITTED_ABOVE = 32
"""Defaults above this make a call slow: smaller numbers are drawn instead."""


def valid(parameter: Parameter) -> st.SearchStrategy:
    """Arguments that the parameter is made for."""
    name, annotation = parameter.name, parameter.annotation
    if name == "model" and annotation is not hl.tasks.RealTransformer:
        ours = annotation is hl.BigramTransformer
        return st.sampled_from(pool()[annotation] if ours else list(models().values()))
    if annotation in (hl.tasks.RealTransformer, hl.tasks.Task):
        return st.sampled_from(pool()[annotation])
    if name in BY_NAME and not (name == "source" and annotation is not object):
        return BY_NAME[name]
    if name == "seed":
        return SEEDS
    if name in ("out", "path", "folder"):
        return st.builds(fresh_path)
    return of(annotation, name)


def of(annotation: Any, name: str = "") -> st.SearchStrategy:
    """Values of an annotation."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(inside)
    if origin in (Union, types.UnionType):
        return st.one_of([of(one, name) for one in inside])
    if hasattr(annotation, "dim_str"):
        return st.just(tensor(annotation))
    if origin is tuple:
        one = inside and inside[-1] is Ellipsis
        return st.tuples(of(inside[0], name)) if one else st.tuples(*(of(x, name) for x in inside))
    if origin in (collections.abc.Mapping, dict):
        return st.dictionaries(of(inside[0]), of(inside[1]), max_size=2)
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return st.just(_metric)
    if origin in (collections.abc.Sequence, collections.abc.Iterable, list):
        return st.lists(of(inside[0], name), min_size=1, max_size=3)
    simple = {
        int: IDS if any(part in name for part in ("trigger", "context", "candidate", "answer", "foil")) else COUNTS,
        float: st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        bool: st.booleans(),
        str: st.sampled_from(["0", "1", "one", "a", "context"]),
        bytes: st.just(b"a"),
        type(None): st.none(),
        torch.dtype: st.sampled_from([torch.float32, torch.float64]),
        torch.device: st.just(torch.device("cpu")),
        torch.Generator: st.builds(torch.Generator),
        torch.Tensor: st.just(torch.tensor([1, 2, 3, 1, 2, 4, 5, 1])),
        pd.DataFrame: st.just(pd.DataFrame({"a": [1]})),
        Path: st.builds(lambda: Path(fresh_path())),
        os.PathLike: st.builds(lambda: Path(fresh_path())),
        Architecture: st.just(models()["handwritten"].architecture),
        hl.BigramLanguage: st.just(perturbed_language()),
        hl.TrainConfig: st.just(hl.TrainConfig([1, 2], length=8, seed=0, steps=2, batch_size=4, eval_sequences=4)),
    }
    for kind, strategy in simple.items():
        if annotation is kind or origin is kind:
            return strategy
    known = pool().items() if inspect.isclass(annotation) else ()
    if kept := [one for kind, several in known if issubclass(kind, annotation) for one in several]:
        return st.sampled_from(kept)
    return st.sampled_from([0, 1, 2, "0", "a"])


def tensor(annotation: Any) -> torch.Tensor:
    """A tensor of a jaxtyping annotation's shape and dtype."""
    shape = [SIZES.get(part, 3) for part in annotation.dim_str.split() if part[0] not in "*."]
    kind = str(annotation.dtypes)
    if "bool" in kind:
        return torch.zeros(shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    if "float" in kind:
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.randint(3, shape, generator=generator)


_POOL: dict[type, list[Any]] = {}


def pool() -> dict[type, list[Any]]:
    """Instances of the public classes, as `fill_pool` made them."""
    return _POOL


def fill_pool(seed: int) -> None:
    """Calls what returns a public class with valid arguments, until there are a few instances of each."""
    _POOL[hl.BigramTransformer] = [models()["handwritten"], models()["trainable"]]
    _POOL[hl.Component], _POOL[hl.Circuit] = [hl.Component(1, "head", 0), hl.Component(0, "mlp")], [CIRCUIT]
    _POOL[hl.tasks.Task] = learners()
    for one in learners():
        _POOL.setdefault(type(one), []).append(one)
        _POOL.setdefault(hl.tasks.RealTransformer, []).append(one.model(0))
        _POOL.setdefault(hl.tasks.Batch, []).append(one.sample(8, 0))
    classes = {one.function for one in targets() if inspect.isclass(one.function)} - set(_POOL)
    # Functions first, constructors last: what a constructor is given need not fit together.
    makers = [one for one in targets() if one.returns in classes]
    makers.sort(key=lambda one: (inspect.isclass(one.function), one.owner is not None))
    for one in makers:
        if not _POOL.get(one.returns):
            _POOL[one.returns] = []
            drawn(lambda data, one=one: _keep(one, data), 30, seed)


def _keep(target: Target, data: st.DataObject) -> None:
    kept = _POOL[target.returns]
    if target.owner is not None and not _POOL.get(target.owner):
        return
    own = [] if target.owner is None else [data.draw(st.sampled_from(_POOL[target.owner]))]
    arguments = {one.name: data.draw(valid(one)) for one in target.parameters if not one.optional}
    if len(kept) < 3:  # draws may not depend on it
        with contextlib.suppress(Exception):
            kept.append(target.function(*own, **arguments))


def drawn(body: collections.abc.Callable[[st.DataObject], None], count: int, seed: int) -> None:
    """Calls `body` on that many drawings; the same ones for the same seed."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        body(data)

    run()
