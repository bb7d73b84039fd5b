"""Text that breaks pages and pictures elsewhere: markup, mathematics, halves of characters, marks of byte order."""

import io
import tempfile
import unicodedata
import warnings

import matplotlib.ticker
import numpy as np
import pytest
import torch
from bridges_for_tests import scattered
from browser_for_tests import Opened
from matplotlib import font_manager
from matplotlib.mathtext import MathTextParser
from models_for_tests import hooked
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hijack_lens as hl
from hijack_lens import hooks, show
from hijack_lens.core.inputs import prompt_texts
from hijack_lens.core.texts import texts_of, whole_vocab
from hijack_lens.show.style import Picture

TOKENS = ["q", "<!--", "<script>", "</script>", "-->", "$\\{", "$a_1$", "\\$", "$", "&lt;", "%", "a^b", "\\frac"]
ALL = torch.arange(len(TOKENS))


@pytest.fixture(scope="module")
def model():
    pi_b = hl.BigramLanguage.dirichlet(len(TOKENS), seed=3).pi_b
    return hl.associative_transformer(hl.BigramLanguage(pi_b, tokens=TOKENS))


@pytest.fixture(scope="module")
def explanation(model):
    prompt = hl.hijack_prompt(model.language, "q", "$a_1$", 2, 14, global_candidate="$\\{", seed=0)
    return hl.explain(model, prompt)


@pytest.fixture
def no_mathematics(monkeypatch):
    """Fails a test in which matplotlib parses a text as mathematics."""
    monkeypatch.setattr(MathTextParser, "parse", lambda self, text, *args, **options: pytest.fail(f"parsed {text!r}"))


def test_no_label_of_any_picture_is_parsed_as_mathematics(model, explanation, no_mathematics, tmp_path):
    prompt = explanation.prompt
    results = [explanation, explanation.attribution, hl.attribute_scores(model, prompt), hl.memory_matrix(model)]
    results += [hl.memory_neurons(model), hl.context_memory(model, prompt), hl.memory_conflict(model, prompt)]
    results += [hooks.patch_sweep(model, prompt.clean, prompt.corrupted, hl.logit_diff("$a_1$", "$\\{"))]
    for result in results:
        result._repr_html_()
    hl.write_report(explanation, tmp_path / "report.html")

    # All that a figure can say, also when somebody else draws it, whatever their settings.
    picture, said = Picture(6.0, 4.0), "$\\{ x$"
    ax, other = picture.figure.subplots(1, 2)
    ax.plot([0, 1, 2], [1e-3, 1.0, 1e3], label=said)
    ax.set(title=said, xlabel=said, ylabel=said, yscale="log", xticks=[0, 1], xticklabels=[said, "$$"])
    ax.legend(title=said)
    ax.text(0, 1, said)
    ax.annotate(said, (0, 1))
    other.bar([said, "$b$"], [1, 2])
    drawn = show.heatmap(ax.inset_axes((0.5, 0.5, 0.4, 0.4)), [[1.0]], [said], [said], texts=[[said]])
    picture.figure.colorbar(drawn, ax=other, label=said)
    picture.figure.suptitle(said)
    with matplotlib.rc_context({"text.parse_math": True}):
        picture.figure.savefig(tmp_path / "picture.pdf", bbox_inches="tight")
    powers = [label.get_text() for label in ax.get_yticklabels()]
    assert {"10⁻³", "10⁰", "10³"} <= set(powers)
    assert [label.get_text() for label in other.get_xticklabels()] == [said, "$b$"]


@pytest.mark.filterwarnings("error")
def test_characters_of_any_script_are_drawn_or_written_as_escapes(tmp_path):
    own, other = (
        set(font_manager.get_font(font_manager.findfont(name)).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")
    )
    foreign = next(chr(code) for code in sorted(other - own) if unicodedata.category(chr(code)) == "Sm")
    # Nobody sees a NUL or a joiner, private characters mean what each font likes, and some characters are in no font.
    escapes = {"a\x00b": "a\\x00b", "x\u200dy": "x\\u200dy", "\ue0d2": "\\ue0d2", "\U000e0fff": "\\U000e0fff"}
    seen = [foreign, "é", "שלום", "مرحبا", "$\\{"]
    texts = [*seen, *escapes]
    picture = show.attention_maps({texts[5]: torch.eye(len(texts))}, texts)
    for suffix in ("png", "svg", "pdf"):
        picture.save(tmp_path / f"picture.{suffix}")
    ax = picture.figure.axes[0]
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == [*seen, *escapes.values()]
    assert ax.get_title() == "a\\x00b"
    assert "STIXGeneral" in ax.get_xticklabels()[0].get_fontfamily()
    assert "STIXGeneral" not in ax.get_xticklabels()[1].get_fontfamily()


@pytest.mark.browser
def test_tokens_that_open_comments_and_scripts_stop_no_later_script(model, explanation, browser, tmp_path):
    views = [show.attention(model, ALL), show.token_paths(hl.attribute(model, ALL))]
    later = "<script>document.body.dataset.later = 'ran'</script>"
    page = tmp_path / "cells.html"
    cells = "".join(view._repr_html_() for view in views)
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{cells}{explanation._repr_html_()}{later}</body>")
    report = hl.write_report(explanation, tmp_path / "report.html")
    report.write_text(report.read_text(encoding="utf-8").replace("</body>", f"{later}</body>"), encoding="utf-8")
    for path in (page, report):
        opened = Opened(browser, path)
        assert opened.complaints == []
        assert opened.page.evaluate("document.body.dataset.later") == "ran"
    opened = Opened(browser, page)
    opened.page.wait_for_timeout(300)
    assert min(opened.inked()) > 1000
    shown = opened.page.evaluate(
        "[...document.querySelectorAll('figure:last-of-type span:not(:has(span))')].map(s => s.textContent.trim())"
    )
    assert [text for text in shown if text in TOKENS] == TOKENS


def byte_tokenizer(fallback):
    """Every byte a token: written as a letter, as GPT-2 does, or as "<0xF0>", as SentencePiece does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<end>", *([f"<0x{byte:02X}>" for byte in range(256)] if fallback else letters)]
    vocabulary += ["a", "é"] if fallback else ["Ġðŀ", "\ufffd"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=fallback, unk_token="<end>"))
    if fallback:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<end>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def of_bytes(family, fallback):
    tokenizer = byte_tokenizer(fallback)
    if family == "hooked":
        model = hooked(d_vocab=len(tokenizer), n_ctx=32)
        model.tokenizer = tokenizer
        return model
    sizes = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scattered(GPT2LMHeadModel(config)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float64)


# transformers takes the tokenizer of every GPT-2 folder for a byte-level one: of bridges, there is no other here.
@pytest.mark.parametrize(("family", "fallback"), [("hooked", False), ("hooked", True), ("bridge", False)])
def test_pieces_of_a_character_are_shown_as_their_bytes(family, fallback):
    model = of_bytes(family, fallback)
    ids = model.tokenizer("a😀é" if fallback else "a😀", add_special_tokens=False)["input_ids"]
    emoji = [rf"\x{byte:02x}" for byte in "😀".encode()]
    expected = ["a", *emoji, *(["é"] if fallback else [])]
    tokens = torch.tensor(ids)
    assert list(prompt_texts(model, tokens)) == expected
    assert [texts_of(model, tokens)[i] for i in ids] == expected
    assert [whole_vocab(model)[i] for i in ids] == expected
    said = hl.attribute(model, tokens, circuit=hl.Circuit(), answers=ids[:2]).source_texts()
    assert list(said)[-len(ids) :] == expected
    if not fallback:  # a space with the beginning of a character; and a real U+FFFD
        for token, text in (("Ġðŀ", r" \xf0\x9e"), ("\ufffd", "\ufffd")):
            assert whole_vocab(model)[model.tokenizer.convert_tokens_to_ids(token)] == text


LONE = "a\ud83d b"


def test_lone_surrogates_are_refused_by_name_wherever_text_comes_in(model, unchecked):
    bytewise, word = of_bytes("bridge", False), hl.BigramLanguage.from_text("a b c a b", level="word")
    for name, enter in {
        "text": lambda: hl.BigramLanguage.from_text(LONE),
        "tokens": lambda: hl.BigramLanguage(word.pi_b, tokens=["a", "b", "\udc00"]),
        "text ": lambda: word.encode(LONE),
        "prompt": lambda: hl.attribute(bytewise, LONE, circuit=hl.Circuit()),
        "prompt ": lambda: hl.explain(bytewise, ["a", LONE], "a", "b", circuit=hl.Circuit()),
        "answers": lambda: hl.attribute(bytewise, "ab", answers=[LONE, "a"], circuit=hl.Circuit()),
    }.items():
        with pytest.raises(
            ValueError, match=rf"^{name.strip()} must be text, got .*lone surrogate, '\\u[0-9a-f]+', at "
        ):
            enter()
    for name in ("trigger", "in_context", "global_candidate", "alternative"):
        given = {"trigger": "a", "in_context": "c", "repeats": 1, "length": 9, "seed": 0, name: "\udc00"}
        with pytest.raises(ValueError, match=rf"{name} '\\udc00' is not one of the language's"):
            hl.hijack_prompt(word, **given)
    with pytest.raises(ValueError, match="lone surrogate"):
        model.to_tokens(LONE)


def test_a_byte_order_mark_is_no_token():
    for level in ("char", "word"):
        plain = hl.BigramLanguage.from_text("Ab c, c ab", level=level)
        marked = hl.BigramLanguage.from_text("\ufeffAb c, c ab", level=level)
        assert marked.tokens == plain.tokens
        assert torch.equal(marked.pi_b, plain.pi_b)
        assert plain.encode("\ufeffAb c").tolist() == plain.encode("Ab c").tolist()
    bridge = of_bytes("bridge", False)
    assert torch.equal(hl.attribute(bridge, "\ufeffab").tokens, hl.attribute(bridge, "ab").tokens)


@pytest.mark.skipif(matplotlib.__version_info__ < (3, 11), reason="matplotlib lays out scripts from 3.11 on")
def test_hebrew_is_drawn_from_right_to_left():
    def ink(text):
        picture = Picture(3.0, 1.0)
        picture.figure.text(0.5, 0.5, text, fontsize=40, ha="center", va="center")
        drawn = np.asarray(Image.open(io.BytesIO(picture.png())).convert("L")) < 128
        columns = drawn.any(0).nonzero()[0]
        return drawn[:, columns[0] : columns[-1] + 1]

    first, second, both = ink("ש"), ink("ו"), ink("שו")
    width = first.shape[1]
    assert first.shape[1] > 2 * second.shape[1]  # a wide letter and a narrow one
    assert np.abs(both[:, -width:].sum(1) - first.sum(1)).max() <= 3  # what is written first stands on the right
    assert not np.abs(both[:, :width].sum(1) - first.sum(1)).max() <= 3
