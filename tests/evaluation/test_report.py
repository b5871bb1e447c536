"""The report holds what it must, takes nothing for markup that a model said, and draws curves where their axes say."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evaluation import charts
from evaluation.charts import bar_chart, line_chart
from evaluation.tuning_report import REQUIRED, examples_from, write_report

REPORT = {
    "n": 500,
    "base_accuracy": 0.082,
    "tuned_accuracy": 0.884,
    "ci95_gain": [0.76, 0.84],
    "train_tokens": 1234567,
    "seconds": {"train": 75.0, "merge": 25.0},
    "router_unchanged": True,
    "layout": {"tp": 1, "ep": 2},
    "git_commit": "abc123",
}


def test_report_holds_its_fields_and_escapes_what_models_say(tmp_path):
    extra = {
        "ci95_base": [0.06, 0.11],
        "ci95_tuned": [0.85, 0.91],
        "forgetting": {"copy": {"base": 0.97, "tuned": 0.93, "n": 100}},
        "settings": {"lora.rank": 16},
        "something": "else",
    }
    examples = [
        {
            "question": "<script>alert(1)</script>",
            "expected": "1, 2",
            "before": "",
            "after": "1,  2",
            "before_right": False,
            "after_right": True,
        }
    ]
    curve = {"training": [(1, 2.0), (2, math.nan), (3, 1.0)], "validation": [(3, 1.1)]}
    data, page = write_report(tmp_path / "demo", REPORT | extra, curve, examples)
    assert json.loads(data.read_text()) == REPORT | extra
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"https?://|src=|@import|url\(", html)  # nothing from outside
    assert re.search(r"✗ <code>—</code>.*✓ <code>1,  2</code>", html)
    for text in ("8.2%", "88.4%", "+80.2 points", "+76.0 to +84.0", "router unchanged", "−4.0", "abc123", "something"):
        assert text in html
    assert "nan" not in html
    assert sorted(os.listdir(data.parent)) == ["report.html", "report.json"]
    tree = ElementTree.fromstring(html[html.index("<main>") : html.index("</body>")])  # well-formed, all of it
    assert len(tree.findall(".//svg")) == 3
    changed = write_report(tmp_path / "demo", REPORT | {"router_unchanged": False}, {}, [])[1].read_text()
    assert "ROUTER CHANGED" in changed
    assert "no points recorded" in changed


def test_a_curve_lies_where_its_axes_say():
    """Axes from 0 to 2 and 1 to 3; the middle point is half way across and up."""
    svg = line_chart({"loss": [(1, 0.0), (2, 1.0), (3, 2.0)]}, "step", "loss")
    x, y = zip(*(map(float, place.split()) for place in re.search(r"d='M([^']*)'", svg)[1].split("L")), strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[0] > y[2]  # SVG counts downwards


def test_every_bar_has_a_colour():
    styled = set(re.findall(r"svg \.bar\.(s\d) ", (Path(charts.__file__).with_name("report.css")).read_text()))
    bars = re.findall(r"class='bar (s\d+)'", bar_chart({str(n): (0.5, None) for n in range(9)}, "shares"))
    assert len(bars) == 9
    assert set(bars) == styled


def test_names_stand_whole_beside_their_bars_and_below_their_lines():
    """A long name ends short of the bars and begins inside the chart; a legend is below the axis, each key its own."""
    svg = bar_chart({"base_held_out": (0.5, None), "a" * 40: (0.5, None)}, "shares")
    left = float(re.search(r"<rect class='bar s0' x='([\d.]+)'", svg)[1])
    names = re.findall(r"<text class='name' x='([\d.]+)'[^>]*>([^<]*)<", svg)
    assert [text for _, text in names] == ["base_held_out", "…" + "a" * 23]
    assert all(float(x) - charts._LETTER * len(text) >= 0 and float(x) < left for x, text in names)
    svg = line_chart({name: [(1, 0.0), (2, 1.0)] for name in "abc"}, "step", "loss", 240)
    keys = re.findall(r"<rect class='key s\d' x='([\d.]+)' y='([\d.]+)'", svg)
    assert len(set(keys)) == 3
    assert all(240 <= float(y) < 280 for _, y in keys)
    assert "viewBox='0 0 560 280'" in svg


@pytest.mark.parametrize("field", REQUIRED)
def test_a_report_without_a_required_field_is_an_error(tmp_path, field):
    with pytest.raises(ValueError, match=f"lacks {field}"):
        write_report(tmp_path, {name: value for name, value in REPORT.items() if name != field}, {}, [])
    assert os.listdir(tmp_path) == []


def test_examples_pair_the_two_results():
    def result(answers: dict[str, tuple[str, bool]]) -> dict:
        rows = [
            {
                "id": key,
                "question": f"{key}?",
                "expected": "1",
                "answer": text,
                "finished": finished,
                "correct": finished and text == "1",
            }
            for key, (text, finished) in answers.items()
        ]
        return {"answers": rows}

    base, tuned = result({"a": ("0", True), "b": ("1", False)}), result({"b": ("1", True), "a": ("2", True)})
    assert examples_from(base, tuned) == [
        {"question": "a?", "expected": "1", "before": "0", "after": "2", "before_right": False, "after_right": False},
        {"question": "b?", "expected": "1", "before": "1 …", "after": "1", "before_right": False, "after_right": True},
    ]
    assert len(examples_from(base, tuned, count=1)) == 1
