"""What training reaches by default on bigram languages of many kinds: steps, seconds, and where each memory ends.

Each row differs from the first in what its name says. Names of rows may be given, to run only those; results are kept
row by row, so that a run that was stopped goes on. Draws docs/forming.png.
"""

import argparse
import gettext
import gzip
import inspect
import json
import math
import sys
import time
from pathlib import Path

import torch
from common import RESULTS, write

import hijack_lens as hl
from hijack_lens.show.style import BLUE, ORANGE, Picture, frameless
from hijack_lens.training.forward import PlainForward

SEEDS = 10  # of the language on which counted steps at a rate of 1e-2 fail

ROWS = {
    **{f"V 50, Dirichlet .3, 5 frequent, length 128, relative: seed {seed}": {"seed": seed} for seed in range(SEEDS)},
    "Dirichlet .05": {"concentration": 0.05},
    "Dirichlet 1": {"concentration": 1.0},
    "Dirichlet 10": {"concentration": 10.0},
    "V 20": {"d_vocab": 20},
    "V 20, Dirichlet .05": {"d_vocab": 20, "concentration": 0.05},
    "V 100": {"d_vocab": 100},
    "V 100, Dirichlet 1": {"d_vocab": 100, "concentration": 1.0},
    "V 100, Dirichlet 10": {"d_vocab": 100, "concentration": 10.0},
    "V 200": {"d_vocab": 200},
    "V 200, Dirichlet 10": {"d_vocab": 200, "concentration": 10.0},
    "1 frequent": {"n_triggers": 1},
    "V 100, 1 frequent": {"d_vocab": 100, "n_triggers": 1},
    "5 rare": {"triggers": "rare"},
    "V 100, 5 rare": {"d_vocab": 100, "triggers": "rare"},
    "length 64": {"length": 64},
    "length 256": {"length": 256},
    "rotary": {"positions": "rotary"},
    "absolute": {"positions": "absolute"},
    **{
        f"{text}, {'characters' if level == 'char' else '500 words'}": {"text": text, "level": level}
        for text in ("English", "source code", "word list", "changelog", "German messages")
        for level in ("char", "word")
    },
    "5 random": {"triggers": "random"},
    "V 20, 5 random": {"d_vocab": 20, "triggers": "random"},
    **{
        f"held out, {name}": {**options, "language_seed": 3001 + index, "seed": 41 + index}
        for index, (name, options) in enumerate(
            {
                "V 100, Dirichlet 10": {"d_vocab": 100, "concentration": 10.0},
                "V 100, Dirichlet 10, again": {"d_vocab": 100, "concentration": 10.0},
                "V 100, Dirichlet 10, once more": {"d_vocab": 100, "concentration": 10.0},
                "V 200, Dirichlet 10": {"d_vocab": 200, "concentration": 10.0},
                "V 100, Dirichlet 1, 5 rare": {"d_vocab": 100, "concentration": 1.0, "triggers": "rare"},
                "rotary": {"positions": "rotary"},
                "Dirichlet 10, 1 frequent": {"concentration": 10.0, "n_triggers": 1},
                "V 20, Dirichlet .05, length 64": {"d_vocab": 20, "concentration": 0.05, "length": 64},
                "V 20, Dirichlet 1, absolute, length 64": {
                    "d_vocab": 20,
                    "concentration": 1.0,
                    "length": 64,
                    "positions": "absolute",
                },
                "V 100, length 256": {"d_vocab": 100, "length": 256},
                "V 200, Dirichlet .05, 1 frequent": {"d_vocab": 200, "concentration": 0.05, "n_triggers": 1},
                "5 rare, length 64": {"length": 64, "triggers": "rare"},
            }.items()
        )
    },
    **{
        f"{recipe} recipe: {name}": {**options, "recipe": recipe}
        for recipe in ("counted", "public")
        for name, options in {
            "V 50, Dirichlet .3": {},
            "Dirichlet 10": {"concentration": 10.0},
            "V 100": {"d_vocab": 100},
            "English, characters": {"text": "English", "level": "char"},
        }.items()
    },
    "long recipe: 5 random": {"triggers": "random", "recipe": "long"},
    "long recipe: V 20, 5 random": {"d_vocab": 20, "triggers": "random", "recipe": "long"},
}
"""The counted recipe is 300 steps at a rate of 1e-2; the public one is that of the code of Bietti et al. 2023; the long
one finishes with ten times as many steps as the default. Languages and seeds held out played no part in choosing it."""


def text_of(kind):
    """Texts that a Debian machine with Python carries."""
    if kind == "source code":
        return inspect.getsource(argparse)
    if kind == "word list":
        return "\n".join(sorted(set(hl.default_text().split())))
    if kind == "changelog":
        return gzip.decompress(Path("/usr/share/doc/dpkg/changelog.gz").read_bytes()).decode()
    if kind == "German messages":
        with open("/usr/share/locale/de/LC_MESSAGES/glib20.mo", "rb") as file:
            return "\n".join(str(message) for message in gettext.GNUTranslations(file)._catalog.values())
    return hl.default_text()


def public_model(language, seed, length):
    """The simplified transformer of Bietti et al.'s public code, and its initialisation; W_F is linear.

    Its embeddings are sqrt(d_model) times as long as ours, and its other matrices 1 / sqrt(3) times as large.
    """
    d_model = 128
    model = hl.trainable_transformer(
        language,
        "absolute",
        d_model=d_model,
        mlp="linear",
        d_mlp=d_model,
        seed=seed,
        n_ctx=length,
        init={"W_Q": "identity", "blocks.1.mlp.W_in": "identity"},
    )
    learned = ("blocks.0.attn.W_K", "blocks.1.attn.W_K", "blocks.1.attn.W_O", "blocks.1.mlp.W_out")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("W_E", "W_pos")):
                parameter *= math.sqrt(d_model)
            elif name.endswith(("W_K", "W_V", "W_O", "W_U", "W_out")):
                parameter /= math.sqrt(3)
            parameter.requires_grad_(name in learned)
    return model


COUNTED = {"steps": 300, "lr": 1e-2}
LONG = {"finish_steps": 4000, "evaluate_every": 100}
PUBLIC = {
    "steps": 1000,
    "loss": "predictable",
    "optimizer": "sgd",
    "lr": 0.2,
    "final_lr": 1.0,
    "warmup": 0,
    "weight_decay": 1e-4,
}


def trained(
    d_vocab=50,
    concentration=0.3,
    triggers="frequent",
    n_triggers=5,
    length=128,
    positions="relative",
    text=None,
    level="char",
    recipe=None,
    seed=0,
    language_seed=99,
):
    if text is None:
        language = hl.BigramLanguage.dirichlet(d_vocab, concentration, seed=language_seed)
    else:
        max_vocab = 500 if level == "word" else None
        language = hl.BigramLanguage.from_text(text_of(text), level=level, max_vocab=max_vocab)
    if recipe == "public":
        model = public_model(language, seed, length)
    else:
        model = hl.trainable_transformer(language, positions, seed=seed, n_ctx=length)
    options = {None: {}, "counted": COUNTED, "public": PUBLIC, "long": LONG}[recipe]
    config = hl.TrainConfig(
        triggers, length, seed, n_triggers=n_triggers, eval_sequences=2**13 // length, eval_lengths=(1,), **options
    )
    started, before = time.perf_counter(), time.process_time()
    run = hl.train(model, language, config)
    total, of_cpu = time.perf_counter() - started, time.process_time() - before
    formed = run.formed
    accuracy = run.probe("formed_accuracy" if recipe in (None, "long") else "in_context_accuracy")
    seconds = run.table.drop_duplicates("step").set_index("step")["seconds"]
    fresh = language.sample(2**16 // length, length, triggers, n_triggers=n_triggers, seed=2**40 + seed).tokens
    with torch.no_grad():
        logits = PlainForward(model)(fresh)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), fresh[:, 1:].flatten())
    reached = accuracy[accuracy >= 0.97 * formed.best].index
    return {
        "formed": bool(formed),
        "in_context_accuracy": round(formed.accuracy, 4),
        "best_possible": round(formed.best, 4),
        "without_order": round(formed.shortcut, 4),
        "nats_lost_without_previous_token_head": round(formed.order, 3),
        "loss_nats": round(float(loss), 4),
        "bigram_excess_nats": round(formed.excess, 4),
        "steps_to_0.97_of_best": int(reached[0]) if len(reached) else None,
        "seconds_to_0.97_of_best": round(float(seconds[reached[0]]), 1) if len(reached) else None,
        "d_vocab": language.d_vocab,
        "forming_steps": run.forming_steps,
        "steps": run.step,
        "seconds": round(total, 1),
        "cpu_seconds": round(of_cpu, 1),
        "cause": formed.cause,
    }


def draw(rows, orange, file):
    """Where each memory ended, row by row; the names for which `orange` holds stand out."""
    first = "V 50, Dirichlet .3, 5 frequent, length 128, relative: seed"
    names = [name.replace(first, "V 50, Dirichlet .3, seed") for name in rows]
    picture, places = Picture(10.0, 0.22 * len(rows) + 1.2), range(len(rows))
    left, right = picture.figure.subplots(1, 2, sharey=True)
    colours = [ORANGE if orange(name) else BLUE for name in rows]
    keys = ("in_context_accuracy", "best_possible", "without_order", "bigram_excess_nats")
    column = {key: [row[key] for row in rows.values()] for key in keys}
    left.scatter(column["in_context_accuracy"], places, c=colours, s=22, zorder=3, label="reached")
    left.scatter(column["best_possible"], places, marker="|", c="black", label="best possible")
    left.scatter(column["without_order"], places, marker="x", s=16, c="#999999", label="without order")
    left.axvline(0.97, color="black", linestyle=":", linewidth=1)
    left.set_yticks(places, names, fontsize=8)
    left.margins(y=0.01)
    left.invert_yaxis()
    left.set_xlabel("in-context accuracy (dotted: 0.97)")
    left.legend(loc="lower left", fontsize=8)
    right.scatter(column["bigram_excess_nats"], places, c=colours, s=22)
    right.axvline(0.05, color="black", linestyle=":", linewidth=1)
    right.set_xscale("log")
    right.set_xlabel("loss above the true bigrams',\nin nats (dotted: 0.05)")
    for ax in (left, right):
        ax.grid(axis="y", linewidth=0.3)
        frameless(ax)
    picture.save(Path(__file__).parents[1] / "docs" / file)


if __name__ == "__main__":
    stored = RESULTS / "forming.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else {}
    for name in sys.argv[1:] or ROWS:
        if name not in rows or sys.argv[1:]:
            rows[name] = trained(**ROWS[name])
            write(
                "forming", {"languages": "dirichlet, seed 99", "rows": {row: rows[row] for row in ROWS if row in rows}}
            )
    draw(rows, lambda name: "recipe" in name, "forming.png")
