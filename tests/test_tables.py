"""Tables, reports and the heat map: what every result is shown by."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch

from hijack_lens import show
from hijack_lens.core.tables import Drawn, Markup, Report, Table, html_of, picture_of, report_of
from hijack_lens.show.style import Picture, heatmap


class Cells(HTMLParser):
    """The cells of a page's tables, a list per row, as a reader sees them, and each cell's style."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.styles, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.styles.append(dict(attrs)["style"])
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


TABLE = Table(
    ["name", "size", "worth"],
    [("a <b>", "1", "+2"), ("c", Markup("<i>10</i>"), "-3"), ("sum", "11", "-1")],
    align="lr",
    title="all & sundry",
    ruled=[1],
    total=True,
)


def test_a_table_is_the_same_in_text_and_html():
    lines = TABLE.text().splitlines()
    assert lines[0].strip() == "all & sundry"
    assert [line.strip("│ ") for line in lines if line.startswith("│")] == [
        "a <b> │         1 │    +2",
        "c     │ <i>10</i> │    -3",
        "sum   │        11 │    -1",
    ]
    assert [line[0] for line in lines[1:]] == list("┏┃┡││├│└")  # a line after the second row
    page = Cells(TABLE.html())
    assert page.rows == [["name", "size", "worth"], ["a <b>", "1", "+2"], ["c", "10", "-3"], ["sum", "11", "-1"]]
    assert ["left" in style for style in page.styles] == [True, False, False] * 4
    assert ["600" in style for style in page.styles] == [False] * 9 + [True] * 3
    assert "all &amp; sundry" in TABLE.html()


def test_a_report_is_drawn_only_where_it_is_displayed():
    drawn = []

    def figure():
        drawn.append(True)
        return "<svg/>"

    report = Report("Title <1>", ["a line"], [TABLE], ["a note"], figure)
    text = report.text().splitlines()
    assert (text[0], text[1], text[-1], drawn) == ("Title <1>", "a line", "a note", [])
    html = report.html()
    assert drawn == [True]
    assert html.index("Title &lt;1&gt;") < html.index("a line") < html.index("<svg/>") < html.index("<table>")
    assert html.index("</table>") < html.index("a note")


def test_a_class_of_ones_own_shows_itself_once_it_is_registered():
    class Named:
        def __init__(self, name):
            self.name = name

        def html(self, alt):
            return f"<i title='{alt}'>{self.name}</i>"

    class Mine(Drawn):
        pass

    for refused in (report_of, picture_of, html_of):
        with pytest.raises(TypeError, match=r"result must be a result of hijack_lens.*Mine"):
            refused(Mine())
    report_of.register(Mine, lambda result: Report("mine"))
    picture_of.register(Mine, lambda result, colour="red": Named(colour))
    assert (repr(Mine()), Mine().picture().name, Mine().picture(colour="blue").name) == ("mine", "red", "blue")
    Mine.to_pandas = lambda self: pd.DataFrame({"size": [0.5]})
    html = Mine()._repr_html_()
    assert "<i title='mine'>red</i>" in html
    assert Cells(html).rows == [["size"], ["0.5"]]  # folded below
    assert show.report_of is report_of


def drawn(*arguments, **options):
    ax = Picture(4.0, 4.0).figure.add_subplot()
    return ax, heatmap(ax, *arguments, **options)


def test_a_heat_map_is_centred_and_shows_where_there_is_nothing():
    image = np.array([[1.0, -4.0], [np.nan, 2.0]])
    ax, found = drawn(torch.from_numpy(image), ["r0", "r1"], ["c0", "c$1$"], decimals=0)
    assert found.get_clim() == (-4.0, 4.0)
    np.testing.assert_array_equal(found.get_array().filled(np.nan), image)
    grey = found.cmap(np.ma.masked_invalid([np.nan]))[0]
    assert grey[0] == grey[1] == grey[2] < 1
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {
        ((0, 0), "+1.0"),
        ((1, 0), "-4.0"),
        ((1, 1), "+2.0"),
    }
    assert [t.get_color() for t in ax.texts] == ["#010101", "white", "#010101"]
    ax.figure.canvas.draw()  # a dollar sign is no mathematics
    assert [t.get_text() for t in ax.get_xticklabels()] == ["c0", "c$1$"]


def test_a_heat_maps_scale_can_be_given():
    assert drawn([[0.5, 1.5]], centre=1.0)[1].get_clim() == (0.5, 1.5)
    assert drawn([[0.5, 1.5]], spread=3.0)[1].get_clim() == (-3.0, 3.0)
    assert drawn([[0.2, 0.3]], attention=True)[1].get_clim() == (0.0, 1.0)
    assert drawn(np.full((2, 2), np.nan), decimals=0)[1].get_clim() == (-1.0, 1.0)
    assert drawn(np.zeros((2, 2)))[1].get_clim() == (-1.0, 1.0)


def test_a_heat_map_has_no_more_decimals_than_its_numbers(unchecked):
    with pytest.raises(ValueError, match="decimals must be at most 15, got 2147483648"):
        drawn([[1.0, 0.5]], decimals=2**31)


def test_of_many_names_a_heat_map_shows_some():
    ax, _ = drawn(np.zeros((100, 3)), [str(i) for i in range(100)], named=30)
    assert [t.get_text() for t in ax.get_yticklabels()] == [str(i) for i in range(0, 100, 4)]


def test_a_heat_map_can_bear_texts():
    ax, _ = drawn([[1.0, 2.0]], texts=[["a", "$b$"]])
    assert [t.get_text() for t in ax.texts] == ["a", "$b$"]
