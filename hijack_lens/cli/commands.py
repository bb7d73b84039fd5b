"""What the command line does: each public function is a command."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

import hijack_lens as hl
from hijack_lens.cli import fail
from hijack_lens.core.checks import check_path
from hijack_lens.core.circuit import ROLE_NAMES
from hijack_lens.core.files import check_target
from hijack_lens.core.inputs import own_circuit, single_prompt
from hijack_lens.core.memory import check_memory
from hijack_lens.core.tables import Report, Table
from hijack_lens.core.texts import decoded, spaced_instead, token_id
from hijack_lens.explanation.of_answer import spelled_ways
from hijack_lens.models.loading import is_hugging_face, load_model
from hijack_lens.show import report_of


def explain(
    *,
    model: Path | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    foil: str | None = None,
    text: Path | None = None,
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
    seed: int = 0,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    out: Path = Path("hijack-lens-report.html"),
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
        seed: Seed of the prompt; with --find-circuit, of the prompts that the circuit is found with.
        as_json: Print JSON instead of tables.
        out: Where to write the report.
    """
    check_target("--out", out)
    strengths = {"previous_token": previous_token, "match": match, "copy": copy, "bigram": bigram}
    written = {"text": text, "level": level, "max-vocab": max_vocab, "positions": positions, **strengths}
    asked = {"prompt": prompt, "answer": answer, "foil": foil}
    if any(value is not None for value in asked.values()):
        built = {"trigger": trigger, "in-context": in_context, "global": global_candidate}
        unfit = {**written, **built, "repeats": repeats, "length": length}
        explanation, found, intro = _explain_answers(model, asked, unfit, find_circuit, context, seed)
    else:
        _refuse({"find-circuit": find_circuit or None, "context": context}, "a conflict in a bigram language")
        repeats, length = 3 if repeats is None else repeats, 64 if length is None else length
        if model is None:
            language, triggers = _language(text, level, max_vocab), None
        elif is_hugging_face(model):
            raise ValueError(f"--model {str(model)!r} is a language model: ask it with --prompt, --answer and --foil")
        else:
            _refuse(written, "--model, which brings its own")
            trained = hl.BigramTransformer.from_pretrained(model)
            language, triggers = trained.language, trained.triggers
        check_memory(12 * length * 3 * language.d_vocab, **{"--length": length})  # the table of positions
        q, c = _conflict(language, trigger, in_context, triggers)
        conflict = hl.hijack_prompt(language, q, c, repeats, length, global_candidate=global_candidate, seed=seed)
        if model is None:
            chosen = hl.Strengths(**{name: value for name, value in strengths.items() if value is not None})
            trained = hl.associative_transformer(language, None, positions or "relative", chosen, n_ctx=length)
        explanation = hl.explain(trained, conflict)
        found, intro = _found(explanation, conflict), _intro(conflict)
    report = hl.write_report(explanation, out).resolve()
    if as_json:
        print(json.dumps({**found, **_outcome(explanation), "report": str(report)}, indent=2, ensure_ascii=False))
        return
    console = Console(markup=False)  # tokens and paths may contain brackets
    said = report_of(explanation)
    for line in (*intro, Text(f"\n{said.title}\n", style="bold")):
        console.print(line)
    _print_tables(console, said)
    console.print(f"\nReport: {report}", soft_wrap=True)


def train(
    *,
    text: Path | None = None,
    out: Path,
    level: Literal["char", "word"] | None = None,
    max_vocab: int | None = None,
    triggers: list[str] | None = None,
    n_triggers: int | None = None,
    positions: Literal["relative", "absolute", "rotary", "none"] = "relative",
    d_model: int = 128,
    length: int = 128,
    steps: int | None = None,
    max_steps: int = hl.TrainConfig.max_steps,
    finish_steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train a two-layer model on the bigrams of a text, with triggers, and watch both memories form.

    A run that was stopped resumes when the same command is given again.

    Args:
        text: Text file to take the bigrams from. [default: Python's own documentation]
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
        max_steps: Steps in which the circuit must form, without --steps.
        finish_steps: Steps after that, for the bigrams. [default: 400, and more for large vocabularies]
        seed: Seed of the weights and the data.
    """
    language = _language(text, level, max_vocab)
    check_memory(4 * 4 * length * d_model, **{"--length": length, "--d-model": d_model})  # the table of positions
    if triggers is None:
        triggers, n_triggers = ["frequent"], 5 if n_triggers is None else n_triggers
    config = hl.TrainConfig(
        triggers=triggers if n_triggers is None or len(triggers) > 1 else triggers[0],
        n_triggers=n_triggers,
        length=length,
        seed=seed,
        steps="until formed" if steps is None else steps,
        max_steps=max_steps,
        finish_steps=finish_steps,
    )
    model = hl.trainable_transformer(language, positions, d_model, seed=seed, n_ctx=4 * length)
    run = hl.train(model, language, config, out=out)
    run.save(out)
    run.picture().save(out / "memories.png")
    console = Console(markup=False)  # tokens and paths may contain brackets
    said = report_of(run)
    _print_tables(console, said)
    for line in said.lines:
        console.print(line, style="" if run.formed else "bold", soft_wrap=True)
    console.print(f"Picture: {(out / 'memories.png').resolve()}", soft_wrap=True)
    console.print(f"Look at it: hijack-lens explain --model {out}", soft_wrap=True)
    if not run.finished:
        console.print("Interrupted; give the same command again to resume.")
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
    table = Table(columns, rows, align="l", title="the papers' claims", ruled=ruled)
    console = Console(markup=False)
    console.print(table.rich())
    console.print(f"Report: {done.report.resolve()}", soft_wrap=True)
    if "failed" in done.verdicts.values():
        raise SystemExit(1)


def _language(text: Path | None, level: Literal["char", "word"] | None, max_vocab: int | None) -> hl.BigramLanguage:
    try:
        corpus = hl.default_text() if text is None else check_path("--text", text).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--text {str(text)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {str(text)!r} cannot be read as UTF-8 text: {error}") from error
    if max_vocab is None and level == "word":
        max_vocab = 500  # a model's memory grows with the square of its vocabulary
    return hl.BigramLanguage.from_text(corpus, level=level or "char", max_vocab=max_vocab)


def _conflict(
    language: hl.BigramLanguage, trigger: str | None, in_context: str | None, trained: Sequence[str | int] | None
) -> tuple[int, int]:
    """The conflict asked for; what is left open is chosen so that the conflict is strong.

    By default the trigger is the word or letter whose successor is most certain (of those that the model was `trained`
    on), and the in-context candidate is the most common of the words or letters that are least likely to follow it.
    """
    wordlike = [i for i, token in enumerate(language.tokens) if token.isalpha()] or list(range(language.d_vocab))
    if trigger is None:
        common = [i for i in wordlike if language.pi_u[i] >= 0.1 / language.d_vocab] or wordlike
        if trained is not None:
            known = language.trigger_ids(trained).tolist()
            common = [i for i in common if i in known] or known
        q = max(common, key=lambda i: float(language.pi_b[i].max()))
    else:
        q = language.index(trigger, "trigger")
    if in_context is None:
        taken = (q, language.global_candidate(q))
        others = [i for i in wordlike if i not in taken] or [i for i in range(language.d_vocab) if i not in taken]
        if not others:
            raise ValueError(f"text has only {language.d_vocab} different tokens; a conflict needs at least 3")
        return q, min(others, key=lambda i: (float(language.pi_b[q, i]), -float(language.pi_u[i])))
    return q, language.index(in_context, "in-context")


def _refuse(given: dict[str, Any], reason: str) -> None:
    """Refuses options that have been given."""
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"--{option.replace('_', '-')} does not go with {reason}")


def _explain_answers(
    name: Path | None,
    asked: dict[str, str | None],
    unfit: dict[str, Any],
    find_circuit: bool,
    context: str | None,
    seed: int,
) -> tuple[hl.Explanation | hl.AnswerExplanation, dict[str, Any], list[str | Text]]:
    """The explanation of the user's prompt, answer and foil; what JSON says of these; and what to print first."""
    for option, given in {"model": name, **asked}.items():
        if given is None:
            raise ValueError(f"--model, --prompt, --answer and --foil go together; --{option} is missing")
    _refuse(unfit, "--prompt, which is asked as it is")
    prompt, answer, foil = (str(value) for value in asked.values())
    if not prompt:
        raise ValueError("--prompt must be a text, got ''")
    assert name is not None
    model = load_model(name)
    tokens = single_prompt(model, prompt, "--prompt")[0]
    found: dict[str, Any] = {"model": str(name), "prompt": prompt}
    intro: list[str | Text] = [Text("prompt  ", style="bold").append(prompt, style="dim")]
    circuit = hl.find_circuit(model, seed=seed) if find_circuit else own_circuit(model)
    if circuit is None:
        for option, given in (("--answer", answer), ("--foil", foil)):
            spelled_ways(model, option, given)
        if answer.strip() == foil.strip():
            raise ValueError(f"--answer and --foil must be different tokens, got {answer!r} and {foil!r}")
        asked_of: Any = hl.explain(model, tokens, answer, foil, context=context)
        pair = asked_of.attribution.answers
    else:
        pair = token_id(model, "--answer", answer), token_id(model, "--foil", foil)
        if pair[0] == pair[1]:
            raise ValueError(f"--answer and --foil must be different tokens, got {answer!r} and {foil!r}")
    for side, token, text in zip(("answer", "foil"), pair, (answer, foil), strict=True):
        (shown,), spaced = decoded(model.tokenizer, [token]), spaced_instead(model, text, token)
        found[side] = {"text": shown, "id": token}
        other = f"; {spaced!r}, with a space, is another" if spaced else ""
        part = "" if shown.strip() == text.strip() else f", by which {text!r} is compared"
        intro.append(f"{side}: {shown!r}, token {token}{part}{other}")
    if circuit is None:
        return asked_of, found, intro
    evidence = circuit.evidence
    found["circuit"] = {role: [str(part) for part in getattr(circuit, role)] for role in ROLE_NAMES}
    found["evidence"] = None if evidence is None else evidence.verdicts.splitlines()
    intro += [f"circuit: {circuit}", *([] if evidence is None else [evidence.verdicts])]
    return hl.explain(model, tokens, *pair, circuit=circuit, context=context), found, intro


def _intro(prompt: hl.HijackPrompt) -> list[str | Text]:
    """A conflict's prompt, and what each memory says."""
    show, tokens = prompt.language.display, prompt.tokens.tolist()
    q, c, g = (repr(show(token)) for token in (prompt.trigger, prompt.in_context, prompt.global_candidate))
    shown = Text("prompt  ", style="bold")
    for i, token in enumerate(tokens):
        after_trigger = i > 0 and tokens[i - 1] == prompt.trigger
        style = "bold blue" if after_trigger else "bold" if token == prompt.trigger else "dim"
        shown.append(show(token) + (" " if prompt.language.level == "word" else ""), style=style)
    return [shown, f"After {q}, the context says {c}; the weights say {g}. ({prompt.language.d_vocab} tokens known.)"]


def _print_tables(console: Console, found: Report) -> None:
    for table in found.tables:
        console.print(table.rich())
    for note in found.notes:
        console.print(note)


def _found(explanation: hl.Explanation, prompt: hl.HijackPrompt) -> dict[str, Any]:
    tokens, formed = prompt.language.tokens, explanation.model.formed
    return {
        "prompt": prompt.text,
        "trigger": tokens[prompt.trigger],
        "in_context": tokens[prompt.in_context],
        "global": tokens[prompt.global_candidate],
        "theory": {part: predicted for part, (predicted, _) in explanation.theory_beside_model().items()},
        "repeats_needed": None if explanation.flip is None else explanation.flip.repeats,
        "formed": None if formed is None else list(formed.lines),
    }


def _outcome(explanation: hl.Explanation | hl.AnswerExplanation) -> dict[str, Any]:
    """What is reported for the explanation of any prompt."""
    if isinstance(explanation, hl.AnswerExplanation):
        by_source = explanation.attribution
        return {
            "winner": explanation.winner,
            "verdict": explanation.verdict,
            "tokens": list(explanation.texts),
            "margin": {part: float(value) for part, value in explanation.margin.parts.items()},
            "shares": {path.label: wrote[0] - wrote[1] for path, wrote in _paths(by_source)},
            "checks": [asdict(check) for check in explanation.checks],
            "doses": explanation.doses,
            "heads": by_source.by_head().to_dict(orient="records"),
            "log_probs": explanation.whole,
            "completeness_error": by_source.completeness_error,
        }
    attribution = explanation.attribution
    said = {"winner": explanation.winner, "verdict": explanation.verdict, "ablated": explanation.ablated}
    if attribution is None:
        return {**said, "margin": {"total": explanation.total}, "not_split": explanation.not_split}
    sides = ("in_context", "global") if isinstance(explanation.prompt, hl.HijackPrompt) else ("answer", "foil")
    return {
        **said,
        "margin": {part: float(value) for part, value in explanation.margin.parts.items()},
        "paths": [
            {"path": path.label, "memory": path.memory, **dict(zip(sides, wrote, strict=True))}
            for path, wrote in _paths(attribution)
        ],
        "completeness_error": attribution.completeness_error,
    }


def _paths(attribution: hl.LogitAttribution) -> list[tuple[hl.Path, list[float]]]:
    """Each path, and what it wrote into the two logits."""
    by_path = attribution.by_path()[:, list(attribution.pair())].tolist()
    return list(zip(attribution.paths, by_path, strict=True))
