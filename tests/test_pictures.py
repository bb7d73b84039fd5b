"""Every picture is legible: no text is cut, and none lies on another, for few tokens, many, and long names."""

import itertools

import matplotlib
import pytest
import torch
from browser_for_tests import faults_on_a_phone
from matplotlib.text import Annotation, Text

import hijack_lens as hl

LONG = "counterrevolutionaries"
SIZES = {"one": 1, "eight": 8, "many": 64}


class Case:
    """A model of a language, and a prompt of so many tokens."""

    def __init__(self, length, long):
        names = [f"{LONG}{i}" if long else "abcdefghijklmnop"[i] for i in range(12)]
        pi_b = hl.BigramLanguage.dirichlet(12, seed=0).pi_b
        self.language = hl.BigramLanguage(pi_b, tokens=names, level="word")
        self.model = hl.associative_transformer(self.language, n_ctx=80, strengths=hl.Strengths(match=3.0))
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(12, (3, length), generator=generator)
        self.prompt = self.tokens[0]
        self.other = self.tokens[1]
        self.pair = names[3], names[5]


CASES = {  # short names where there is room for all: elsewhere long ones are the harder
    "eight, short": (8, False),
    **{f"{size}, long": (length, True) for size, length in SIZES.items()},
}


@pytest.fixture(scope="module")
def case(request):
    matplotlib.use("Agg")
    return Case(*CASES[request.param])


def sequences(c):
    return c.language.sample(3, max(2, len(c.prompt)), triggers=[0], seed=0)


def hijack(c):
    a, b, d = (c.language.tokens[i] for i in (0, 3, 5))
    return hl.hijack_prompt(c.language, a, b, 0, max(2, len(c.prompt)), global_candidate=d, seed=0)


def sweep(c, **options):
    return hl.hooks.patch_sweep(c.model, c.prompt, c.other, hl.logit_diff(*c.pair), **options)


def dose(c):
    facts = [hl.Bigram(c.language.tokens[i], *c.pair) for i in (0, 1)]
    return hl.dose_response(c.model, facts, repeats=min(len(c.prompt), 30))


RESULTS = {
    "language": lambda c: c.language,
    "sequences": sequences,
    "prompt": hijack,
    "circuit": lambda c: c.model.circuit,
    "explanation": lambda c: hl.explain(c.model, c.prompt, *c.pair),
    "attribution": lambda c: hl.attribute(c.model, c.prompt, answers=list(c.pair)),
    "of a batch": lambda c: hl.attribute(c.model, c.tokens, answers=list(c.pair)),
    "of all positions": lambda c: hl.attribute(c.model, c.prompt, "all"),
    "sources": lambda c: hl.attribute_sources(c.model, c.prompt, list(c.pair)),
    "scores": lambda c: hl.attribute_scores(c.model, c.prompt),
    "sweep": sweep,
    "sweep of heads": lambda c: sweep(c, activations=["z"]),
    "path sweep": lambda c: hl.hooks.path_sweep(c.model, c.prompt, c.other, hl.logit_diff(*c.pair)),
    "shapley": lambda c: hl.shapley(c.model, c.prompt, hl.logit_diff(*c.pair), how="zero"),
    "context": lambda c: hl.context_memory(c.model, c.prompt),
    "conflict": lambda c: hl.memory_conflict(c.model, c.prompt),
    "matrix": lambda c: hl.memory_matrix(c.model),
    "neurons": lambda c: hl.memory_neurons(c.model),
    "dose": dose,
    "dose theory": lambda c: dose(c).theory,
    "evidence": lambda c: hl.find_circuit(c.model).evidence,
    "tables": lambda c: hl.training.read_tables(c.model),
    "strengths": lambda c: hl.fit_strengths(c.model),
}

PICTURES = {
    **{name: lambda c, make=make: make(c).picture() for name, make in RESULTS.items()},
    "scores of keys": lambda c: hl.attribute_scores(c.model, c.prompt).picture(range(min(5, len(c.prompt)))),
    "attention": lambda c: hl.show.attention_maps(
        {"head": torch.eye(len(c.prompt)), "head two": torch.eye(len(c.prompt))},
        [c.language.tokens[i] for i in c.prompt.tolist()],
    ),
}


def boxes(figure):
    """The texts that a figure shows, and where each lies, in pixels."""
    figure.draw_without_rendering()  # all is placed as where it is drawn
    renderer = figure.canvas.get_renderer()
    # Names of ticks beyond an axis's ends are made, but not drawn.
    ticks = {text: (ax, "x") for ax in figure.axes for text in ax.get_xticklabels(which="both")}
    ticks |= {text: (ax, "y") for ax in figure.axes for text in ax.get_yticklabels(which="both")}
    found = []
    for text in figure.findobj(Text):
        box = text.get_window_extent(renderer)
        shown = text.get_visible() and text.get_text().strip() and box.width > 0
        if shown and (text not in ticks or _in_range(text, *ticks[text])):
            found.append((text.get_text(), box))
    return found


def _in_range(text, ax, side):
    low, high = sorted(ax.get_xlim() if side == "x" else ax.get_ylim())
    at = text.get_position()[0 if side == "x" else 1]
    return low <= at <= high and ax.axison and (ax.xaxis if side == "x" else ax.yaxis).get_visible()


def faults(figure):
    found, (width, height) = boxes(figure), figure.canvas.get_width_height()
    cut = [
        f"{text!r} is cut: {box}"
        for text, box in found
        if box.x0 < -2 or box.y0 < -2 or box.x1 > width + 2 or box.y1 > height + 2
    ]
    on_another = [
        f"{one!r} lies on {other!r}"
        for (one, a), (other, b) in itertools.combinations(found, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5
    ]
    beside = [(text, ax) for ax in figure.axes for text in ax.texts if isinstance(text, Annotation)]
    outside = [
        f"{text.get_text()!r}, beside a bar, lies outside its axes"
        for text, ax in beside
        if text.xyann[1] == 0 and not all(map(ax.bbox.padded(1.5).containsx, text.get_window_extent().intervalx))
    ]
    return cut + on_another + outside


OF_MODELS = ("language", "circuit", "matrix", "neurons", "evidence", "tables", "strengths")
"""Those that do not depend on a prompt."""

ASKED = [
    (name, case)
    for case in CASES
    for name in PICTURES
    if name not in OF_MODELS or case in ("eight, short", "one, long")
]


@pytest.mark.parametrize(("name", "case"), ASKED, indirect=["case"])
def test_no_text_is_cut_and_none_lies_on_another(name, case, unchecked):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    try:
        picture = PICTURES[name](case)
    except ValueError:
        assert len(case.prompt) == 1  # a prompt that is too short for it
        return
    with picture.figure.fitted():  # as it is where it is saved or shown
        FigureCanvasAgg(picture.figure)
        assert faults(picture.figure) == []


@pytest.mark.browser
@pytest.mark.parametrize("case", ["many, long"], indirect=True)
@pytest.mark.parametrize("name", RESULTS)
def test_a_large_result_fits_a_phone_but_for_its_picture_which_scrolls_by_itself(name, case, unchecked, phone):
    assert faults_on_a_phone(phone, RESULTS[name](case)._repr_html_(), pictures_scroll=True) == []


def test_slanted_names_of_ticks_run_side_by_side_and_all_stay_where_there_is_room():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for slant, n_names, every in ((30, 6, 1), (60, 6, 1), (30, 16, 2)):
        picture = hl.show.Picture(4.0, 3.0)
        names = [f"attention of layer {layer}" for layer in range(n_names)]
        ax = picture.figure.add_subplot()
        ax.set_xticks(range(n_names), names, rotation=slant, ha="right")
        picture.png()
        FigureCanvasAgg(picture.figure).draw()
        shown = [label.get_text() for label in ax.get_xticklabels() if label.get_text()]
        assert shown == names[::every]


def test_a_label_longer_than_its_axes_is_broken_between_words():
    picture = hl.show.Picture(4.0, 3.0)
    ax = picture.figure.add_subplot()
    ax.set_xlabel(label := f"weights win: {LONG!r} or the context wins: {LONG!r}, by logits")
    ax.set_title("short")
    picture.png()
    assert ax.get_xlabel().count("\n") >= 1
    assert ax.get_xlabel().replace("\n", " ") == label
    assert ax.get_title() == "short"
    assert picture.figure.get_size_inches()[0] < 6.0
