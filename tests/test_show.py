"""Pictures and the report, looked at in a real browser with the network off."""

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser_for_tests import Opened
from models_for_tests import prompts, with_sink
from transformer_lens.model_bridge import TransformerBridge

import hijack_lens as hl
from hijack_lens import show

NASTY = "</script><b>&"


@pytest.fixture(scope="module")
def language():
    return hl.BigramLanguage.from_text(hl.default_text())


@pytest.fixture(scope="module")
def explanation(language):
    model = hl.associative_transformer(language)
    return hl.explain(model, hl.hijack_prompt(language, "q", "x", repeats=3, length=48, seed=0))


@pytest.fixture(scope="module")
def nasty_explanation():
    """A language whose tokens would break out of a careless page."""
    tokens = ["q", NASTY, "<img/src=x/onerror=document.title='PWNED'>", "'\"", "`${x}`", "</SCRIPT>", "a", "b"]
    tokens += ["<!--", "<script>", "-->", "$\\{", "$a_1$", "\\$", "$", "&lt;"]
    language = hl.BigramLanguage(hl.BigramLanguage.dirichlet(len(tokens), seed=3).pi_b, tokens=tokens)
    prompt = hl.hijack_prompt(
        language, "q", NASTY, 3, 30, global_candidate="<img/src=x/onerror=document.title='PWNED'>", seed=0
    )
    return hl.explain(hl.associative_transformer(language), prompt)


@pytest.fixture(scope="module")
def report(explanation, tmp_path_factory):
    return hl.write_report(explanation, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def nasty_report(nasty_explanation, tmp_path_factory):
    return hl.write_report(nasty_explanation, tmp_path_factory.mktemp("nasty") / "report.html")


@pytest.fixture(scope="module")
def view(explanation):
    return show.attention(explanation.model, explanation.prompt)


@pytest.mark.browser
def test_the_report_draws_both_attention_patterns_and_the_attribution_offline(explanation, report, browser):
    opened = Opened(browser, report)
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [report.as_uri()]
    text = opened.page.inner_text("body")
    assert explanation.verdict in text
    assert "previous-token head (L0H0)" in text
    assert "induction head (L1H0)" in text
    opened.page.wait_for_timeout(500)
    patterns = opened.inked()
    assert len(patterns) == 2
    assert min(patterns) > 10_000  # axes, mask and cells; an empty canvas has none
    # The token view: its buttons, and one coloured element per token of the prompt.
    assert "embed → induction head → unembed" in text
    shaded = opened.page.evaluate(
        """() => [...document.querySelectorAll("figure span")]
            .map(token => [token.innerText, getComputedStyle(token).backgroundColor])"""
    )
    tokens = [explanation.prompt.language.display(int(token)) for token in explanation.prompt.tokens]
    drawn = [text for text, _ in shaded if text in tokens]
    assert len(drawn) >= len(tokens)
    colours = {colour for _, colour in shaded}
    assert len(colours) >= 3  # towards one candidate, towards the other, and neither


@pytest.mark.browser
def test_tokens_that_look_like_markup_are_shown_as_text(nasty_explanation, nasty_report, browser):
    opened = Opened(browser, nasty_report)
    assert opened.complaints == []
    assert opened.page.evaluate("document.querySelectorAll('img[src=\"x\"]').length") == 0
    assert NASTY in opened.page.inner_text("body")
    assert opened.page.title() != "PWNED"
    # The token view above all: circuitsvis takes its tokens for HTML.
    prompt = nasty_explanation.prompt
    shown = opened.page.evaluate(
        "[...document.querySelectorAll('figure:last-of-type span:not(:has(span))')].map(s => s.textContent)"
    )
    tokens = [prompt.language.tokens[int(token)] for token in prompt.tokens]
    assert [text.strip() for text in shown if text.strip() in prompt.language.tokens] == tokens


@pytest.mark.browser
def test_a_view_stands_alone_in_a_notebook_page_and_may_stand_there_twice(view, browser, tmp_path):
    page = tmp_path / "cells.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{view._repr_html_()}{view._repr_html_()}</body>")
    opened = Opened(browser, page)
    opened.page.wait_for_timeout(500)
    assert opened.complaints == []
    assert len(opened.inked()) == 4
    assert min(opened.inked()) > 10_000


@pytest.mark.browser
def test_the_report_of_a_long_prompt_is_small_and_opens_at_once_also_dark_and_narrow(language, browser, tmp_path):
    model = hl.associative_transformer(language, n_ctx=1024)
    long = hl.explain(model, hl.hijack_prompt(language, "q", "x", repeats=20, length=1024, seed=0))
    path = hl.write_report(long, tmp_path / "report.html")
    assert path.stat().st_size < 3_000_000
    start = time.monotonic()
    opened = Opened(browser, path, drawn="figure img")
    opened.page.wait_for_selector("figure button, figure select")  # the token view
    assert time.monotonic() - start < 5
    assert opened.complaints == []
    for theme, width in (("dark", 420), ("light", 1100)):
        opened.page.emulate_media(color_scheme=theme)
        opened.page.set_viewport_size({"width": width, "height": 900})
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        shade = "getComputedStyle(document.querySelector('svg text, svg g')).fill"
        ink, paper = opened.page.evaluate(f"[{shade}, getComputedStyle(document.documentElement).colorScheme]")
        assert paper == "light dark"
        assert ink == ("rgb(255, 255, 255)" if theme == "dark" else "rgb(0, 0, 0)")


def test_patterns_of_long_prompts_are_drawn_in_blocks_that_lose_no_peak(language):
    model = hl.associative_transformer(language, n_ctx=600)
    prompt = hl.hijack_prompt(language, "q", "x", repeats=20, length=600, seed=0)
    view = show.attention(model, prompt)
    assert "a cell shows the largest of 3 × 3" in view.caption
    assert "<script" not in view._repr_html_()  # nothing to run
    assert view._repr_html_().count("<img") == 2
    assert len(view._repr_html_()) < 300_000


def test_the_report_carries_circuitsvis_once(report):
    html = report.read_text(encoding="utf-8")
    assert html.count("var CircuitsVis=") == 1
    assert html.count("lens.render(") == 3
    assert "https://unpkg.com" not in html


def props_of(view):
    """The properties in a view's HTML, as a browser would read them."""
    calls = re.findall(r'lens\.render\("[\w-]+", lens\.(\w+), (.*?)\);(?= ?lens|  ?\}\)| \}\))', view.fragment())
    return [(element, json.loads(props)) for element, props in calls]


def test_the_attention_view_holds_the_models_own_patterns(explanation, view):
    prompt = explanation.prompt
    _, cache = explanation.model.run_with_cache(prompt.tokens)
    (first, one), (second, two) = props_of(view)
    assert first == second == "AttentionPattern"
    # Pages hold four decimals.
    torch.testing.assert_close(torch.tensor(one["attention"]), cache["pattern", 0][0, 0], atol=6e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(two["attention"]), cache["pattern", 1][0, 0], atol=6e-5, rtol=0)
    assert one["tokens"] == [prompt.language.display(int(token)) for token in prompt.tokens]


def test_a_first_token_that_deep_heads_look_at_by_default_is_set_apart():
    model, tokens = with_sink(), prompts(1, 6)[0]
    patterns = model.run_with_cache(tokens[None])[1]["pattern", 2][0].detach()
    heads = [hl.Component(2, "head", head) for head in range(2)]
    view = show.attention(model, tokens, heads)
    for (_, props), panel, pattern in zip(props_of(view), view.panels, patterns, strict=True):
        assert float(pattern[1:, 0].mean()) > 0.5
        inner = pattern[1:, 1:]
        torch.testing.assert_close(torch.tensor(props["attention"]).double(), inner, atol=6e-5, rtol=0)
        assert props["maxValue"] == -props["minValue"] == float(inner.max())
        assert props["tokens"] == [str(int(token)) for token in tokens[1:]]
        assert f"the first token, left out, gets {float(pattern[1:, 0].mean()):.0%}" in panel.title
    whole = show.attention(model, tokens, heads, first_token=True)
    torch.testing.assert_close(
        torch.tensor(props_of(whole)[0][1]["attention"]).double(), patterns[0], atol=6e-5, rtol=0
    )
    assert whole.panels[0].title == "L2H0"
    shallow = show.attention(with_sink(n_layers=2), tokens, hl.Component(1, "head", 0))
    assert len(props_of(shallow)[0][1]["tokens"]) == 6


@pytest.mark.browser
def test_panels_are_equally_wide_however_many(view, browser, tmp_path):
    for n_panels, width in ((1, 1000), (2, 1000), (3, 1000), (3, 420)):
        page = tmp_path / f"{n_panels}-{width}.html"
        some = show.views.View((view.panels * 2)[:n_panels], view.caption)
        page.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{some._repr_html_()}</body>")
        opened = Opened(browser, page)
        opened.page.set_viewport_size({"width": width, "height": 900})
        opened.page.wait_for_timeout(300)
        widths = opened.page.evaluate(
            "[...document.querySelectorAll('.hijack-lens-view > div > div')].map(e => e.getBoundingClientRect().width)"
        )
        assert len(widths) == n_panels
        assert max(widths) - min(widths) < 1
        assert max(widths) <= width


def test_the_token_view_adds_up_to_the_margin(explanation):
    ((element, props),) = props_of(show.token_paths(explanation.attribution))
    assert element == "ColoredTokensMulti"
    values = torch.tensor(props["values"])
    assert values.shape == (len(explanation.prompt), len(props["labels"]))
    totals = dict(zip(props["labels"], values.sum(0).tolist(), strict=True))
    assert totals["all paths"] == pytest.approx(float(explanation.margin.total), abs=1e-4)
    assert totals["context"] == pytest.approx(float(explanation.margin.context), abs=1e-4)
    assert totals["embed → bigram memory → unembed"] == pytest.approx(float(explanation.margin.weights), abs=1e-4)
    assert props["positiveBounds"] == pytest.approx([float(values.abs().max())] * len(props["labels"]))  # one scale


class Balanced(HTMLParser):
    VOID = frozenset({"br", "img", "meta", "input", "path", "use", "rect"})

    def __init__(self, html):
        super().__init__()
        self.open, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_reports_markup_is_balanced(report, nasty_report):
    for path in (report, nasty_report):
        assert Balanced(path.read_text(encoding="utf-8")).open == []


def test_the_bars_show_the_margin_and_every_ablation(explanation):
    (ax,) = show.margin_bars(explanation).figure.axes
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["whole model", "previous-token head off", "induction head off", "bigram memory off"]
    totals = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"]
    assert totals == pytest.approx([float(explanation.margin.total), *explanation.ablated.values()])
    stacked = {bar.get_facecolor(): bar.get_width() for bar in ax.patches if abs(bar.get_y() + 0.31) < 1e-6}
    assert sorted(stacked.values()) == pytest.approx(
        sorted([float(explanation.margin.weights), 0.0, float(explanation.margin.context)])
    )
    assert "logit 'x'" in ax.get_xlabel()
    low, high = ax.get_xlim()
    assert low < min(totals)
    assert max(totals) < high


def test_pictures_can_be_saved_and_shown(explanation, tmp_path):
    picture = show.margin_bars(explanation)
    picture.save(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes()[:8] == picture._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.svg().startswith("<svg")


def test_a_report_is_written_whole_or_not_at_all(explanation, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the old report")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hl.write_report(explanation, path)
    assert path.read_text() == "the old report"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match=r"path must be a file in an existing folder, got '/no/such"):
        hl.write_report(explanation, Path("/no/such/report.html"))


def test_views_refuse_what_they_cannot_draw(explanation, language):
    model = explanation.model
    batch = hl.hijack_prompt(language, "q", "x", 2, 20, n_prompts=2, seed=0)
    with pytest.raises(ValueError, match="prompt must be a single prompt, got a batch of 2"):
        show.attention(model, batch)
    with pytest.raises(ValueError, match="heads must be attention heads, got"):
        show.attention(model, batch, heads=list(model.circuit.bigram))
    with pytest.raises(ValueError, match="one position"):
        show.token_paths(hl.attribute(model, explanation.prompt, "all"))
    with pytest.raises(ValueError, match="'nope'"):
        show.token_paths(explanation.attribution, "nope", "x")
    broken = hl.LogitAttribution(
        explanation.attribution.values * float("nan"),
        explanation.attribution.logits,
        explanation.attribution.tokens,
        explanation.attribution.paths,
        explanation.attribution.position,
        candidates=(1, 2),
    )
    with pytest.raises(ValueError, match="NaN"):
        show.token_paths(broken)


def test_attention_of_a_bridge_without_tokenizer():
    bridge = TransformerBridge.boot_native(
        {"n_layers": 2, "d_model": 12, "d_head": 6, "n_heads": 2, "n_ctx": 16, "d_vocab": 9, "d_mlp": 12,
         "act_fn": "relu", "normalization_type": None, "seed": 0}
    )  # fmt: skip
    tokens = torch.tensor([3, 1, 4, 1, 5])
    with pytest.raises(ValueError, match="heads must be given"):
        show.attention(bridge, tokens)
    ((_, props),) = props_of(show.attention(bridge, tokens, heads=[hl.Component(1, "head", 1)]))
    _, cache = bridge.run_with_cache(tokens[None])
    torch.testing.assert_close(
        torch.tensor(props["attention"]), cache["blocks.1.attn.hook_pattern"][0, 1], atol=6e-5, rtol=0
    )
    assert props["tokens"] == ["3", "1", "4", "1", "5"]


WIDE = "(() => document.documentElement.scrollWidth - document.documentElement.clientWidth)()"
CUT = """[...document.querySelectorAll(".wide")].filter(one => one.scrollWidth > one.clientWidth + 1).length"""


@pytest.mark.browser
def test_on_a_phone_panels_stand_below_one_another_and_wide_tables_flow(explanation, browser, tmp_path):
    evidence = hl.find_circuit(explanation.model).evidence
    evidence.save(path := tmp_path / "evidence.html")
    page = Opened(browser, path, drawn="svg").page
    page.evaluate("document.querySelector('details').open = true")
    tops = "[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().top)"
    assert len(set(page.evaluate(tops))) == 1
    page.set_viewport_size({"width": 420, "height": 900})
    assert len(set(page.evaluate(tops))) == len(page.evaluate(tops)) == 3
    assert (page.evaluate(WIDE), page.evaluate(CUT)) == (0, 0)
    row = page.locator("tbody tr").first.locator("td")
    name = "(cell) => getComputedStyle(cell, '::before').content"
    assert [one.evaluate(name) for one in row.all()][:3] == ['"role "', '"component "', '"score "']
    assert "L0H0" in row.nth(1).inner_text()


@pytest.mark.browser
def test_on_paper_a_result_is_black_on_white_open_and_not_cut(explanation, report, browser, tmp_path):
    explanation.attribution.save(alone := tmp_path / "attribution.html")
    for path, drawn in ((alone, "svg"), (report, "canvas")):
        page = Opened(browser, path, drawn).page
        page.emulate_media(media="print", color_scheme="dark")
        page.set_viewport_size({"width": 700, "height": 900})
        assert (page.evaluate(WIDE), page.evaluate(CUT)) == (0, 0)
        style = "getComputedStyle(document.querySelector('.hijack-lens'))"
        assert page.evaluate(f"[{style}.color, {style}.backgroundColor]") == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
        assert all(table.bounding_box()["height"] > 20 for table in page.locator("table").all())
        assert page.locator("table").count() > 0


@pytest.mark.browser
def test_circuitsvis_draws_on_the_ground_of_its_page(report, browser):
    page = Opened(browser, report).page
    filtered = "getComputedStyle(document.querySelector('.hijack-lens-view')).filter"
    for theme, media, wanted in (("light", "screen", "none"), ("dark", "screen", "invert"), ("dark", "print", "none")):
        page.emulate_media(media=media, color_scheme=theme)
        assert page.evaluate(filtered).startswith(wanted)
    page.emulate_media(media="screen", color_scheme="dark")
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")  # a light notebook on a dark desktop
    assert page.evaluate(filtered) == "none"
