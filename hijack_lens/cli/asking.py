"""What the command line asks for: a language, a conflict in it, or an answer of the user's own model."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

import hijack_lens as hl
from hijack_lens.cli import working
from hijack_lens.core.checks import check_path
from hijack_lens.core.circuit import ROLE_NAMES
from hijack_lens.core.inputs import own_circuit, single_prompt
from hijack_lens.core.texts import decoded, spaced_instead, texts_begin, token_id
from hijack_lens.explanation.of_answer import spelled_ways
from hijack_lens.language.vocabulary import UNKNOWN
from hijack_lens.models.loading import load_model


def language(
    text: Path | None, encoding: str, level: Literal["char", "word"] | None, max_vocab: int | None
) -> hl.BigramLanguage:
    """The bigrams of a file, or of Python's own documentation."""
    try:
        codecs.lookup(encoding)
    except (LookupError, ValueError) as error:
        raise ValueError(f"--encoding must be one that Python knows, such as latin-1, got {encoding[:80]!r}") from error
    try:
        corpus = hl.default_text() if text is None else check_path("--text", text).read_text(encoding=encoding)
    except OSError as error:
        raise ValueError(f"--text {str(text)!r} cannot be read: {error.strerror}") from error
    except (UnicodeError, LookupError) as error:  # some encodings, such as base64, hold no text
        raise ValueError(f"--text {str(text)!r} cannot be read as --encoding {encoding}: {error}") from error
    if max_vocab is None and level == "word":
        max_vocab = 500  # a model's memory grows with the square of its vocabulary
    return hl.BigramLanguage.from_text(corpus, level=level or "char", max_vocab=max_vocab)


def conflict(
    language: hl.BigramLanguage,
    trigger: str | None,
    in_context: str | None,
    global_candidate: str | None,
    trained: Sequence[str | int] | None,
) -> tuple[int, int, int]:
    """The trigger and both candidates asked for; what is left open is chosen so that the conflict is strong.

    By default the trigger is the word or letter whose successor is most certain (of those that the model was `trained`
    on), what the weights say is that successor, and the in-context candidate is the most common of the words or letters
    that are least likely to follow the trigger. What is in no vocabulary is none of them.
    """
    known = [i for i, token in enumerate(language.tokens) if token != UNKNOWN]
    wordlike = [i for i in known if language.tokens[i].isalpha()] or known

    def successor(q: int) -> int:
        return max((i for i in known if i != q), key=lambda i: float(language.pi_b[q, i]), default=q)

    if len(known) < 3:
        raise ValueError(f"text has only {len(known)} different tokens; a conflict needs at least 3")
    if trigger is None:
        common = [i for i in wordlike if language.pi_u[i] >= 0.1 / language.d_vocab] or wordlike
        if trained is not None:
            among = language.trigger_ids(trained).tolist()
            common = [i for i in common if i in among] or among
        q = max(common, key=lambda i: float(language.pi_b[i, successor(i)]))
    else:
        q = language.index(trigger, "trigger")
    g = successor(q) if global_candidate is None else language.index(global_candidate, "global_candidate")
    if in_context is not None:
        return q, language.index(in_context, "in-context"), g
    others = [i for i in wordlike if i not in (q, g)] or [i for i in known if i not in (q, g)]
    return q, min(others, key=lambda i: (float(language.pi_b[q, i]), -float(language.pi_u[i]))), g


def refuse(given: dict[str, Any], reason: str) -> None:
    """Refuses options that have been given."""
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"--{option.replace('_', '-')} does not go with {reason}")


def explain_answers(
    name: Path | None,
    asked: dict[str, str | None],
    unfit: dict[str, Any],
    find_circuit: bool,
    context: str | None,
    prepend_bos: bool | None,
    seed: int,
) -> tuple[hl.Explanation | hl.AnswerExplanation, dict[str, Any], list[str | Text]]:
    """The explanation of the user's prompt, answer and foil; what JSON says of these; and what to print first."""
    for option, given in {"model": name, **asked}.items():
        if given is None:
            raise ValueError(f"--model, --prompt, --answer and --foil go together; --{option} is missing")
    refuse(unfit, "--prompt, which is asked as it is")
    prompt, answer, foil = (str(value) for value in asked.values())
    if not prompt:
        raise ValueError("--prompt must be a text, got ''")
    assert name is not None
    try:
        with working(f"Loading {name}"):
            model = load_model(name)
    except ValueError as error:
        said = str(error)
        raise ValueError(f"--{said}" if said.startswith("model ") else said) from error
    with texts_begin(prepend_bos):
        tokens = single_prompt(model, prompt, "--prompt")[0]
    found: dict[str, Any] = {"model": str(name), "prompt": prompt}
    intro: list[str | Text] = [Text("prompt  ", style="bold").append(prompt, style="dim")]
    circuit = own_circuit(model)
    if find_circuit:
        with working("Looking for the circuit"):
            circuit = hl.find_circuit(model, seed=seed)
    if circuit is None:
        for option, given in (("--answer", answer), ("--foil", foil)):
            spelled_ways(model, option, given)
        if answer.strip() == foil.strip():
            raise ValueError(f"--answer and --foil must be different tokens, got {answer!r} and {foil!r}")
        with working("Explaining"):
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
    with working("Explaining"):
        explanation = hl.explain(model, tokens, *pair, circuit=circuit, context=context)
    return explanation, found, intro
