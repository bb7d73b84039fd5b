"""The explorers: the browser's closed form beside Python's, and their pages, opened offline and dragged."""

import json
import math
import shutil
import subprocess
from importlib.resources import files

import numpy as np
import pytest
import torch
from browser_for_tests import Opened
from models_for_tests import hooked, prompts

import hijack_lens as hl
from hijack_lens import theory

LETTERS = "·qcg"
STRENGTHS = ("previous_token", "match", "copy", "bigram")
ASK = """
import { readFileSync } from "node:fs";
const theory = await import(process.argv[2]);
const cases = JSON.parse(readFileSync(0));
const answers = cases.map(({ tokens, position, values }) => ({
  previous: theory.previousTokenRow(position, values),
  induction: theory.inductionRow(tokens, position, values),
  margin: theory.marginOf(tokens, values),
  prompt: theory.promptOf(values),
  pulls: theory.pulls(values),
  winning: theory.winningRepeats(values),
}));
console.log(JSON.stringify(answers));
"""


def language_of(preference):
    """Four tokens, in which q prefers g to c by that much."""
    pi_b = torch.full((4, 4), 0.25, dtype=torch.float64)
    to_c, to_g = 0.4 / (1 + math.exp(preference)), 0.4 / (1 + math.exp(-preference))
    pi_b[1] = torch.tensor([0.3, 0.3, to_c, to_g], dtype=torch.float64)
    return hl.BigramLanguage(pi_b, tokens=list(LETTERS))


def drawn_case(rng):
    """A prompt of any tokens, a position in it, and sliders anywhere."""
    length, distance = int(rng.integers(4, 40)), int(rng.integers(2, 8))
    values = {
        "length": length + distance,
        "distance": distance,
        "repeats": int(rng.integers(0, (length + 1) // 2 + 1)),
        "preference": float(rng.uniform(0, 12)),
        "previous_token": float(rng.choice([0.0, 20.0, rng.uniform(0, 10)])),
        "match": float(rng.choice([0.0, rng.uniform(0, 12)])),
        "copy": float(rng.uniform(0, 20)),
        "bigram": float(rng.choice([0.0, rng.uniform(0.1, 3)])),
    }
    tokens = [LETTERS[int(i)] for i in rng.integers(0, 4, length - 1)] + ["q"]
    return {"tokens": tokens, "position": int(rng.integers(1, length + 1)), "values": values}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Thousands of cases, and what the ES module says of each."""
    node = shutil.which("node")
    if node is None:
        pytest.skip(
            "no node on this machine: install it (Debian: apt-get install nodejs) to run the ES module by itself"
        )
    folder = tmp_path_factory.mktemp("node")
    module, script = folder / "closed_form.mjs", folder / "ask.mjs"
    module.write_text(files("hijack_lens.explorer").joinpath("closed_form.js").read_text(encoding="utf-8"), "utf-8")
    script.write_text(ASK, "utf-8")
    rng = np.random.default_rng(0)
    cases = [drawn_case(rng) for _ in range(2000)]
    done = subprocess.run([node, script, module.as_uri()], input=json.dumps(cases), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(zip(cases, json.loads(done.stdout), strict=True))


def setting_of(values):
    return theory.Setting(hl.Strengths(**{name: values[name] for name in STRENGTHS}))


def test_the_browsers_attention_and_margins_are_the_theorys(answered, unchecked):
    furthest = 0.0
    for case, said in answered:
        ids = torch.tensor([LETTERS.index(token) for token in case["tokens"]])
        setting, language = setting_of(case["values"]), language_of(case["values"]["preference"])
        at = case["position"]
        previous, induction = theory.attention(ids, language, setting)
        split = theory.margin(ids, language, setting, in_context="c", global_candidate="g")
        parts = ("context", "weights", "total")
        ours = [*said["previous"], *said["induction"], *(said["margin"][part] for part in parts)]
        theirs = [*previous[at - 1, :at].tolist(), *induction[at - 1, :at].tolist()]
        theirs += [float(split.parts[part]) for part in parts]
        furthest = max(furthest, float(np.abs(np.subtract(ours, theirs)).max()))
    assert 0 < furthest < 1e-12


def test_the_browsers_flips_are_the_theorys(answered, unchecked):
    """At distance 2 by the formula that counts; at others by a prompt for each number of repeats."""
    by_formula = 0
    for case, said in answered[:150]:
        values = case["values"]
        language, setting = language_of(values["preference"]), setting_of(values)
        ahead = values["bigram"] * values["preference"]
        for repeats, pull in enumerate(said["pulls"]):
            explorer = hl.explore(repeats, **{name: values[name] for name in ("length", "distance")})
            assert abs(float(theory.margin(explorer.prompt, language, setting).context) - pull) < 1e-12
        assert said["winning"] == [n for n, pull in enumerate(said["pulls"]) if pull > ahead]
        if values["distance"] == 2 and min(abs(pull - ahead) for pull in said["pulls"]) > 1e-9:
            flip = theory.min_repeats(language, "q", "c", "g", setting, length=values["length"])
            assert flip.repeats == (said["winning"][0] if said["winning"] else None)
            by_formula += 1
    assert by_formula > 10


def test_the_browsers_prompt_is_the_explorers(answered, unchecked):
    for case, said in answered[:300]:
        values = case["values"]
        explorer = hl.explore(*(values[name] for name in ("repeats", "length", "distance")))
        assert "".join(said["prompt"]) == explorer.prompt.text
        assert len(explorer.prompt) == values["length"]
        assert explorer.prompt.text.count("qc") == values["repeats"]


def page_numbers(page):
    """What the page shows: the margin by memory, to all digits."""
    return {part: float(page.get_attribute(f"data.{part}", "value")) for part in ("context", "weights", "total")}


def set_slider(page, name, presses, key="ArrowRight"):
    page.focus(f"input[name={name}]")
    for _ in range(presses):
        page.keyboard.press(key)


def drag(page, name, share):
    """Drags a slider's thumb to a share of its track, as a hand does."""
    box = page.locator(f"input[name={name}]").bounding_box()
    middle = box["y"] + box["height"] / 2
    slider = page.locator(f"input[name={name}]")
    at = slider.evaluate("one => (one.value - one.min) / (one.max - one.min)")
    page.mouse.move(box["x"] + 8 + at * (box["width"] - 16), middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + share * (box["width"] - 16), middle, steps=5)
    page.mouse.up()


def sliders(page):
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('form input')].map(one => [one.name, Number(one.value)]))"
    )


def explorer_at(found):
    counts = {name: int(found[name]) for name in ("repeats", "length", "distance")}
    strengths = hl.Strengths(**{name: float(found[name]) for name in STRENGTHS})
    return hl.explore(**counts, preference=float(found["preference"]), strengths=strengths)


def agrees(page):
    """Checks that the page's numbers are what theory says of where its sliders stand; returns that."""
    there = explorer_at(sliders(page))
    shown = page_numbers(page)
    for part, value in there.margin.parts.items():
        if part in shown:
            assert shown[part] == pytest.approx(float(value), abs=1e-12)
    return there


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 420])
def test_a_slider_that_is_dragged_moves_the_numbers_as_theory_says(browser, tmp_path, width):
    path = hl.explore().save(tmp_path / "explorer.html")
    opened = Opened(browser, path, drawn="circle")
    page = opened.page
    page.set_viewport_size({"width": width, "height": 900})
    assert agrees(page).values == hl.explore().values
    assert "The weights win" in page.inner_text(".verdict")
    assert "from 3 repeats on" in page.inner_text(".verdict")
    set_slider(page, "repeats", 1)
    assert agrees(page).values["repeats"] == 3
    assert "The context wins" in page.inner_text(".verdict")
    for name in ("preference", "bigram", "copy", "match", "previous_token", "length", "distance", "repeats"):
        before = sliders(page)[name]
        drag(page, name, 0.65)
        assert sliders(page)[name] != before
        agrees(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    assert opened.requests == [path.as_uri(), "data:,"] or opened.requests == [path.as_uri()]


@pytest.mark.browser
def test_the_flip_threshold_the_diagram_and_the_heads_move_along(browser, tmp_path):
    start = hl.explore(repeats=1, length=40, preference=5.0, strengths=hl.Strengths(previous_token=3.0, match=4.0))
    opened = Opened(browser, start.save(tmp_path / "explorer.html"), drawn="circle")
    page = opened.page
    for presses in (0, 12, 13):
        set_slider(page, "preference", presses)
        there = agrees(page)
        language, setting = there.prompt.language, there.setting
        flip = theory.min_repeats(language, "q", "c", "g", setting, length=40)
        assert page.get_attribute(".flips", "data-value") == str(flip.repeats)
        assert f"flips at {flip.repeats}" in page.text_content("svg")
        ours = theory.attention(there.prompt, language, setting)
        shades = page.evaluate(
            "[...document.querySelectorAll('.strip')].map(strip => "
            "[...strip.children].map(one => parseFloat(one.style.getPropertyValue('--share')) / 100))"
        )
        last_c = there.prompt.text.rindex("c")
        assert shades[0] == pytest.approx(ours[1][-1].tolist(), abs=1e-12)
        assert shades[1] == pytest.approx(ours[0][last_c].tolist(), abs=1e-12)
    set_slider(page, "position", 5, "ArrowLeft")
    assert "at 34:" in page.inner_text(".head:last-child")
    # The point is dragged in the diagram.
    box = page.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 150, steps=4)
    page.mouse.up()
    there = agrees(page)
    assert there.values["repeats"] > 8
    point = page.locator("circle").bounding_box()
    assert abs(point["y"] + point["height"] / 2 - box["y"] - 150) < 4
    assert opened.complaints == []


@pytest.mark.browser
def test_sliders_that_do_not_fit_together_give_way(browser, tmp_path):
    page = Opened(browser, hl.explore().save(tmp_path / "explorer.html"), drawn="circle").page
    drag(page, "length", 0.0)
    small = agrees(page).values
    assert (small["length"], small["repeats"], small["distance"]) == (4, 1, 2)
    drag(page, "repeats", 1.0)
    grown = agrees(page).values
    assert (grown["length"], grown["repeats"], grown["distance"]) == (33, 16, 2)
    drag(page, "distance", 1.0)
    assert agrees(page).values["distance"] == 32
    set_slider(page, "repeats", 16, "ArrowLeft")
    assert agrees(page).prompt.text == "·" * (len(agrees(page).prompt) - 1) + "q"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_as_light_as_its_reader_or_the_page_around_asks(browser, tmp_path, scheme):
    path = tmp_path / "around.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{hl.explore()._repr_html_()}", encoding="utf-8")
    page = browser.new_context(offline=True, color_scheme=scheme).new_page()
    page.goto(path.as_uri())
    inside = page.frame_locator("iframe").locator(".hijack-lens-explorer")
    inside.locator("circle").wait_for()

    def brightness():
        return inside.evaluate("one => Number(getComputedStyle(one).backgroundColor.match(/\\d+/)[0])")

    assert (brightness() > 200) is (scheme == "light")
    for said in ("false", "true"):
        page.evaluate("said => document.body.setAttribute('data-jp-theme-light', said)", said)
        page.wait_for_timeout(50)
        assert (brightness() > 200) is (said == "true")
    # The frame is as high as what it holds.
    page.wait_for_timeout(100)
    assert page.evaluate("document.querySelector('iframe').offsetHeight") >= inside.evaluate("one => one.offsetHeight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 16}, "repeats=16 and distance=2 do not fit: length must be at least .* = 33, got 32"),
        ({"length": 257}, "length must be at most 256, got 257"),
        ({"distance": 1}, "distance must be at least 2, got 1"),
        ({"preference": -1.0}, "preference must be a finite number >= 0, got -1.0"),
        ({"preference": 601.0}, "preference must be at most 600, to be put on a slider, got 601"),
        (
            {"strengths": hl.Strengths(previous_token=math.inf)},
            "strengths.previous_token must be .*, got inf",
        ),
        ({"strengths": hl.Strengths(copy=1e9)}, "strengths.copy must be at most 600"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        hl.explore(**arguments)


def test_what_the_widget_is_set_to_the_explorer_knows(monkeypatch):
    pytest.importorskip("anywidget")
    explorer = hl.explore()
    explorer.widget.values = {**explorer.values, "repeats": 7}
    assert explorer.values["repeats"] == 7
    assert explorer.prompt.text.count("qc") == 7
    assert '"repeats": 7' in explorer._html()
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert hl.explore(repeats=7).values == explorer.values


NASTY = "</script><b>&"


@pytest.fixture(scope="module")
def runs():
    """A model whose tokens would break out of a careless page, and two prompts for it."""
    tokens = ["q", NASTY, "<!--", "'\"", "${x}", "a", "b"]
    language = hl.BigramLanguage(hl.BigramLanguage.dirichlet(len(tokens), seed=3).pi_b, tokens=tokens)
    model = hl.associative_transformer(language, dtype=torch.float64)
    prompt = hl.hijack_prompt(language, "q", NASTY, 2, 14, global_candidate="a", seed=0)
    return model, prompt, hl.explore_runs(model, prompt.clean, prompt.corrupted, hl.metrics.margin(prompt))


def run_by_hand(model, prompt, there):
    """The margin with one activation patched from the clean run, or set to zero."""
    hook = {"resid_pre": "hook_resid_pre", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}[there["activation"]]
    name, position = f"blocks.{there['layer']}.{hook}", there["position"]
    _, cache = model.run_with_cache(prompt.clean[None])

    def write(x, hook):
        x[:, position] = cache[name][:, position] if there["intervention"] == "patch" else 0.0
        return x

    base = prompt.corrupted if there["intervention"] == "patch" else prompt.clean
    logits = model.run_with_hooks(base[None], fwd_hooks=[(name, write)])[0, -1]
    return (logits[prompt.in_context] - logits[prompt.global_candidate]).item()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 420])
def test_what_is_dragged_over_is_what_patching_and_ablating_by_hand_gives(runs, browser, tmp_path, width):
    model, prompt, explorer = runs
    path = explorer.save(tmp_path / "runs.html")
    opened = Opened(browser, path, drawn=".grid")
    page = opened.page
    page.set_viewport_size({"width": width, "height": 1000})

    def chosen():
        checked = page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('input:checked')].map(one => [one.name, one.value]))"
        )
        ranges = {name: int(page.input_value(f"input[name={name}]")) for name in ("layer", "position")}
        return {**checked, **ranges}

    def agrees_by_hand():
        there = chosen()
        assert float(page.get_attribute("data.after", "value")) == pytest.approx(run_by_hand(model, prompt, there))
        return there

    assert agrees_by_hand() == explorer.values
    assert explorer.value == pytest.approx(run_by_hand(model, prompt, explorer.values))
    tokens = page.locator(".strip .token")
    first = tokens.nth(2).bounding_box()
    page.mouse.move(first["x"] + 4, first["y"] + 6)
    page.mouse.down()
    assert agrees_by_hand()["position"] == 2
    for at in (4, 9, 13):
        box = tokens.nth(at).bounding_box()
        page.mouse.move(box["x"] + 4, box["y"] + 6)
        assert agrees_by_hand()["position"] == at
    page.mouse.up()
    page.check("input[value=ablate]")
    agrees_by_hand()
    for name in ("mlp_out", "attn_out"):
        page.check(f"input[value={name}]")
        for key in ("ArrowLeft", "ArrowRight"):
            page.focus("input[name=layer]")
            page.keyboard.press(key)
            assert agrees_by_hand()["activation"] == name
    page.locator(".grid i").nth(14 + 3).click()  # the last layer stands above
    assert (agrees_by_hand()["layer"], chosen()["position"]) == (0, 3)
    page.check("input[value=patch]")
    agrees_by_hand()
    changed = page.evaluate("[...document.querySelectorAll('.token')].map(one => one.classList.contains('changed'))")
    assert changed == (prompt.clean != prompt.corrupted).tolist()
    assert tokens.nth(changed.index(True)).inner_text().startswith(NASTY)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]


def test_a_model_without_a_tokenizer_shows_its_ids():
    model, (clean, corrupted) = hooked("LN"), prompts(2, 8)
    explorer = hl.explore_runs(model, clean, corrupted, hl.logit_diff(1, 2), "attn_out")
    assert explorer.ablated.texts == tuple(map(str, clean.tolist()))
    assert explorer.patched.texts == tuple(map(str, corrupted.tolist()))
    sweep = hl.hooks.patch_sweep(model, clean, corrupted, hl.logit_diff(1, 2), "attn_out")
    there = explorer.values
    assert explorer.value == float(sweep.values[0, there["layer"], there["position"]])


def test_runs_that_cannot_be_explored_are_refused(runs):
    model, prompt, explorer = runs
    with pytest.raises(ValueError, match="metric must be given where both runs say the same"):
        hl.explore_runs(model, prompt.clean, prompt.clean)
    with pytest.raises(ValueError, match="patched must be a sweep of one prompt at each of its positions"):
        hl.explore_runs(model, prompt.clean, prompt.corrupted, hl.metrics.margin(prompt), "z")
    with pytest.raises(ValueError, match="patched must be a sweep of direction 'denoise', got 'ablate'"):
        hl.RunExplorer(explorer.ablated, explorer.ablated)
    other = hl.hooks.ablate_sweep(model, prompt.clean, hl.metrics.log_prob(0))
    with pytest.raises(ValueError, match="ablated must have the metric of patched"):
        hl.RunExplorer(explorer.patched, other)
