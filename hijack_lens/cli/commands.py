"""What the command line does: each public function is a command, which imports what it needs when it is run."""

from __future__ import annotations  # types are named, not imported: help answers at once

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import hijack_lens as hl
from hijack_lens.cli import fail, working


def explain(
    *,
    model: Path | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    foil: str | None = None,
    text: Path | None = None,
    encoding: str = "utf-8",
    level: Literal["char", "word"] | None = None,
    max_vocab: int | None = None,
    trigger: str | None = None,
    in_context: str | None = None,
    global_candidate: Annotated[str | None, Parameter(name="--global")] = None,
    repeats: int | None = None,
    length: int | None = None,
    previous_token: float | None = None,
    match: float | None = None,
    copy: float | None = None,
    bigram: float | None = None,
    positions: Literal["relative", "absolute"] | None = None,
    find_circuit: bool = False,
    context: str | None = None,
    prepend_bos: Annotated[bool | None, Parameter(negative="--no-prepend-bos")] = None,
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    out: Path | None = None,
) -> None:
    """Set the two memories against each other, and say which one wrote the prediction.

    By default the model is written by hand from a text's bigrams. To ask a language model, say GPT-2, a prompt of your
    own: --model gpt2 --prompt "..." --answer " Rome" --foil " Paris".

    Args:
        model: Folder of a trained model (or run) to explain, which brings its own language and weights; with --prompt,
            also a Hugging Face model's folder or name, a GGUF file, or smollm2-135m (the extra hijack-lens[smollm2]).
        prompt: Text to give to the model.
        answer: What comes next according to the context of --prompt.
        foil: What comes next according to the weights.
        text: Text file to take the bigrams from. [default: Python's own documentation]
        encoding: How the characters of --text are written, say latin-1.
        level: What a token is. [default: char]
        max_vocab: Keep only this many tokens, the most frequent. [default: all characters, or 500 words]
        trigger: The token whose successor is predicted. [default: the one whose successor is most certain]
        in_context: The token that follows it in the prompt. [default: a common token that rarely does]
        global_candidate: The token that the weights predict. [default: the trigger's most likely successor]
        repeats: How often in_context follows the trigger. [default: 3]
        length: Tokens in the prompt. [default: 64]
        previous_token: Strength b1 of the previous-token head. [default: 20]
        match: Strength b2 of the induction head's match. [default: 6]
        copy: Strength b3 of the induction head's copy. [default: 10]
        bigram: Strength g of the bigram memory. [default: 1]
        positions: How the previous-token head knows positions. [default: relative]
        find_circuit: With --prompt, find the model's circuit first, and follow paths through it.
        context: Which part of --prompt is the context. [default: all before its last sentence]
        prepend_bos: Whether --prompt begins with the tokenizer's begin token. [default: as the tokenizer has it]
        seed: Seed of the prompt; with --find-circuit, of the prompts that the circuit is found with.
        as_json: Print JSON instead of tables, and write a report only where --out is given.
        out: Where to write the report, in place of what is there. [default: hijack-lens-report.html]
    """
    with working("Loading TransformerLens"):
        from hijack_lens.cli import asking, saying
        from hijack_lens.core.files import check_target
        from hijack_lens.core.memory import check_memory
        from hijack_lens.models.loading import is_hugging_face

    if out is None and not as_json:
        out = Path("hijack-lens-report.html")
    if out is not None:
        check_target("--out", out)
    strengths = {"previous_token": previous_token, "match": match, "copy": copy, "bigram": bigram}
    written = {"text": text, "level": level, "max-vocab": max_vocab, "positions": positions, **strengths}
    asked = {"prompt": prompt, "answer": answer, "foil": foil}
    if any(value is not None for value in asked.values()):
        built = {"trigger": trigger, "in-context": in_context, "global": global_candidate}
        unfit = {**written, **built, "repeats": repeats, "length": length}
        explanation, found, intro = asking.explain_answers(
            model, asked, unfit, find_circuit, context, prepend_bos, seed
        )
    else:
        of_prompts = {"find-circuit": find_circuit or None, "context": context, "prepend-bos": prepend_bos}
        asking.refuse(of_prompts, "a conflict in a bigram language")
        repeats, length = 3 if repeats is None else repeats, 64 if length is None else length
        if model is None:
            language, triggers = asking.language(text, encoding, level, max_vocab), None
        elif is_hugging_face(model):
            raise ValueError(f"--model {str(model)!r} is a language model: ask it with --prompt, --answer and --foil")
        else:
            asking.refuse(written, "--model, which brings its own")
            with working(f"Loading {model}"):
                trained = hl.BigramTransformer.from_pretrained(model)
            language, triggers = trained.language, trained.triggers
        check_memory(12 * length * 3 * language.d_vocab, **{"--length": length})  # the table of positions
        q, c, g = asking.conflict(language, trigger, in_context, global_candidate, triggers)
        conflict = hl.hijack_prompt(language, q, c, repeats, length, global_candidate=g, seed=seed)
        if model is None:
            chosen = hl.Strengths(**{name: value for name, value in strengths.items() if value is not None})
            trained = hl.associative_transformer(language, None, positions or "relative", chosen, n_ctx=length)
        with working("Explaining"):
            explanation = hl.explain(trained, conflict)
        found, intro = saying.found(explanation, conflict), saying.intro(conflict)
    there = out is not None and out.is_file()
    report = None if out is None else hl.write_report(explanation, out).resolve()
    if as_json:
        saying.print_json({**found, **saying.outcome(explanation), "report": report and str(report)})
    else:
        saying.print_report(hl.show.report_of(explanation), intro)
        saying.print_lines(f"\nReport{', in place of the one there' * there}: {report}")


def train(
    *,
    text: Path | None = None,
    encoding: str = "utf-8",
    out: Path,
    level: Literal["char", "word"] | None = None,
    max_vocab: int | None = None,
    triggers: list[str] | None = None,
    n_triggers: int | None = None,
    positions: Literal["relative", "absolute", "rotary", "none"] = "relative",
    d_model: int = 128,
    length: int = 128,
    steps: int | None = None,
    max_steps: int | None = None,
    finish_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train a two-layer model on the bigrams of a text, with triggers, and watch both memories form.

    A run that was stopped resumes when the same command is given again.

    Args:
        text: Text file to take the bigrams from. [default: Python's own documentation]
        encoding: How the characters of --text are written, say latin-1.
        out: Folder for the model, its checkpoints, its probes and their picture.
        level: What a token is. [default: char]
        max_vocab: Keep only this many tokens, the most frequent. [default: all characters, or 500 words]
        triggers: Tokens whose continuation is fixed within each sequence; or, with --n-triggers, "frequent", "rare" or
            "random". [default: the five most frequent]
        n_triggers: How many triggers there are, where they are not given one by one.
        positions: How positions enter the model.
        d_model: Size of the residual stream.
        length: Tokens per sequence.
        steps: Steps of the optimizer. [default: until the circuit has formed, then --finish-steps]
        max_steps: Steps in which the circuit must form, without --steps. [default: 600]
        finish_steps: Steps after that, for the bigrams. [default: 400, and more for large vocabularies]
        seed: Seed of the weights and the data.
    """
    from hijack_lens.cli import asking, saying
    from hijack_lens.core.memory import check_memory

    language = asking.language(text, encoding, level, max_vocab)
    check_memory(4 * 4 * length * d_model, **{"--length": length, "--d-model": d_model})  # the table of positions
    if triggers is None:
        triggers, n_triggers = ["frequent"], 5 if n_triggers is None else n_triggers
    config = hl.TrainConfig(
        triggers=triggers if n_triggers is None or len(triggers) > 1 else triggers[0],
        n_triggers=n_triggers,
        length=length,
        seed=seed,
        steps="until formed" if steps is None else steps,
        max_steps=hl.TrainConfig.max_steps if max_steps is None else max_steps,
        finish_steps=finish_steps,
    )
    model = hl.trainable_transformer(language, positions, d_model, seed=seed, n_ctx=4 * length)
    run = hl.train(model, language, config, out=out)
    run.save(out)
    run.picture().save(out / "memories.png")
    saying.print_tables(said := hl.show.report_of(run))
    saying.print_lines(*said.lines, style="" if run.formed else "bold")
    saying.print_lines(f"Picture: {(out / 'memories.png').resolve()}", f"Look at it: hijack-lens explain --model {out}")
    if not run.finished:
        saying.print_lines("Interrupted; give the same command again to resume.")
        raise SystemExit(130)


def reproduce(
    *claims: str,
    only: Literal["papers", "tasks"] | None = None,
    out: Path = Path("hijack-lens-claims"),
    quick: bool = False,
    workers: int | None = None,
) -> None:
    """Test the papers' claims, and say which hold, how far, and where they fail.

    A run that was stopped resumes when the same command is given again.

    Args:
        claims: Names of claims. [default: those of the two papers]
        only: "papers" for the claims on the two memories, "tasks" for those on other in-context learners, which take an
            hour.
        out: Folder for the results so far, and for the report on them as HTML and JSON.
        quick: Small settings for a first look, in a third of the time.
        workers: Processes to run claims in. [default: as many as there are cores]
    """
    from hijack_lens import reproduction
    from hijack_lens.cli import saying
    from hijack_lens.core.tables import Table

    if only is not None and claims:
        raise ValueError(f"--only must be left out where claims are named, got {only!r} and {', '.join(claims):.80}")
    chosen = claims or (None if only is None else reproduction.claims_of(only))
    try:
        done = reproduction.reproduce(out, quick, chosen, workers)
    except RuntimeError as error:  # from the workers; one in an experiment fails its claim instead
        fail(str(error), code=1)
    found = done.to_pandas()
    marks = {True: "✓ ", False: "✗ ", None: "? "}
    rows, ruled = [], []
    for claim in done.verdicts:
        shown = claim, done.verdicts[claim]
        for finding in found[found["claim"] == claim].to_dict(orient="records"):
            measured = marks[finding["holds"]] * bool(finding["predicted"]) + finding["measured"]
            rows.append((shown[0], "· " * bool(finding["predicted"]) + finding["predicted"], measured, shown[1]))
            shown = "", ""
        ruled.append(len(rows) - 1)
    columns = ("claim", "predicted", "measured", "verdict")
    saying.print_table(Table(columns, rows, align="l", title="the papers' claims", ruled=ruled))
    saying.print_lines(f"Report: {done.report.resolve()}")
    if "failed" in done.verdicts.values():
        raise SystemExit(1)
