import base64
import hashlib
import json
import math
import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from featpipe.errors import ConfigError
from featpipe.metrics import Interval, score
from featpipe.report import BaselineRow, ComparisonRow, Gallery, Page, ReportImage, ReportTable, render_page, write_page
from featpipe.report.charts import Axis, make_axis, make_confusion_matrix, make_training_curve

HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "{{ 7 * 7 }}",
    "</style><svg onload=alert(1)>",
    "line\nbreak\ttab\x00nul",
    "\u202egnp.exe",
    "שלום",
    "x" * 10_000,
    "\ud800 lone",
    "",
]


def make_scores(classes, m=200, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, len(classes), m)
    p = rng.random((m, len(classes)))
    p[np.arange(m), codes] += 0.5 * rng.random(m) + 0.4
    p /= p.sum(axis=1, keepdims=True)
    return score("classification", [classes[code] for code in codes], p, classes, bootstrap=100)


def make_static_page(text=lambda plain: plain, classes=("brick", "grass", "gravel")):
    return Page(
        title=text("Textures"),
        lead=text("Nearly all are right."),
        key_figures=[("Samples", "940"), (text("Classes"), text("17"))],
        comparison=[
            ComparisonRow(text("logistic"), Interval(0.92, 0.901, 0.938), 0.34, text("softmax"), is_selected=True),
            ComparisonRow("raw pixels", Interval(0.29, 0.251, 0.333), 125.0),
            ComparisonRow("majority", Interval(0.11)),
        ],
        scores=make_scores([*classes]),
        examples=[
            ReportImage(b"\xff\xd8right", text("a.png"), "brick", "brick", 0.97),
            ReportImage(b"\xff\xd8wrong", "b.png", text("brick"), "grass", 0.51),
            ReportImage(b"\xff\xd8unknown", "c.png", None, text("grass"), 0.999),
        ],
        unreadable=[(text("damaged"), 2)],
        provenance=[(text("Backbone"), text("efficientnet_lite0"))],
        curves={text("loss"): [2.5, 1.0, math.nan, 0.5]},
    )


def make_scripted_page(text=lambda plain: plain, classes=("brick", "grass", "gravel")):
    """A page with the parts that only evaluations have, scripts included."""
    images = [
        ReportImage(b"RIFFwebp", text("d.png"), text("brick"), "grass", 0.7, 3, b"RIFFtwin", text("0.99 to e.png"))
    ]
    return replace(
        make_static_page(text, classes),
        notes=[text("Read the intervals.")],
        protocol=[(text("Scored"), text("all rows"))],
        baselines=[
            BaselineRow(
                text("mlp"), Interval(0.9, 0.8, 0.95), Interval(0.02, -0.01, 0.05), 0.0004, text("McNemar"), 5, 1
            )
        ],
        galleries=[
            Gallery(
                "mistakes",
                text("Mistakes"),
                text("Look."),
                ReportTable(["id", "p"], [[text("d.png"), 0.7]], 90),
                images,
            ),
            Gallery("outliers", text("Outliers"), text("Look."), ReportTable(["id"], []), note=text("not checked")),
        ],
        tables={"reliability": ReportTable([text("rows")], [[text("0.1"), 3, None]])},
        captions={"reliability": text("Overconfident.")},
        script_data={
            "task": "classification",
            "classes": [text(name) for name in classes],
            "ids": [text("a.png")],
            "pictures": {"0": b"RIFFmore"},
            "projection": text("principal components"),
            "of": 1,
        },
    )


class ParsedPage(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self._style = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style and self.cdata_elem != "script":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def test_the_page_contains_all_scores_with_intervals():
    page = make_static_page()
    words = ParsedPage(render_page(page)).words
    for expected in ("940", "0.920 0.901–0.938", "0.34 s", "2 min 05 s", "0.290 0.251–0.333", "97 %", "> 99 %"):
        assert expected in words
    for interval in page.scores.metrics.values():
        assert f"{interval.value:.3f} {interval.low:.3f}–{interval.high:.3f}" in words
    for row in page.scores.per_class:
        low, high = row["recall_interval"]
        recall = f"{row['recall']:.3f} {low:.3f}–{high:.3f} {row['support']}"
        low, high = row["precision_interval"]
        assert f"{row['f1']:.3f} {row['precision']:.3f} {low:.3f}–{high:.3f} {recall}" in words


def test_bar_lengths_are_the_scores():
    html = render_page(make_static_page())
    assert re.findall(r'class="bar" x="0.00%" y="8" height="16" width="([\d.]+)%"', html) == [
        "92.00",
        "29.00",
        "11.00",
    ]
    assert '<line x1="90.10%" x2="93.80%" y1="16" y2="16"/>' in html


def test_the_confusion_matrix_has_every_count():
    page = make_static_page()
    words = ParsedPage(render_page(page)).words
    for true_class, counts in enumerate(page.scores.confusion.tolist()):
        for predicted, rows in enumerate(counts):
            if rows and true_class != predicted:
                names = f"{page.scores.classes[true_class]} predicted as {page.scores.classes[predicted]}"
                assert re.search(rf"{rows} {rows} of {sum(counts)} \(\d+ %\): {names}", words)


def test_errors_are_marked_by_text_and_not_by_colour_alone():
    words = ParsedPage(render_page(make_static_page())).words
    assert "✗ grass 51 % labelled brick b.png" in words
    assert "✓ brick 97 % a.png" in words
    assert "✗" not in words.split("c.png")[0].split("b.png")[1]


def test_images_are_embedded_in_the_page():
    html = render_page(make_static_page())
    sources = [value for tag, name, value in ParsedPage(html).attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(value.removeprefix("data:image/jpeg;base64,")) for value in sources] == [
        b"\xff\xd8right",
        b"\xff\xd8wrong",
        b"\xff\xd8unknown",
    ]


SCRIPT = re.compile(r"<script[^>]*>.*?</script>", re.DOTALL)


@pytest.mark.parametrize("make_page", [make_static_page, make_scripted_page])
def test_the_page_makes_no_network_requests(make_page):
    html = render_page(make_page())
    parsed = ParsedPage(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", SCRIPT.sub("", html))
    assert not {"link", "iframe", "object", "form", "base"} & set(parsed.tags)
    assert ("script" in parsed.tags) == (make_page is make_scripted_page)
    for _, name, value in parsed.attributes:
        assert not name.startswith("on")
        assert name != "style"
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "data:image/webp;base64,", "#"))


def hash_sources(texts):
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]


def find_policy(html):
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', html)
    return policy


def test_the_content_security_policy_of_a_static_page_allows_no_script():
    html = render_page(make_static_page())
    (style,) = hash_sources(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert find_policy(html) == (
        f"default-src 'none'; img-src data:; style-src {style}; base-uri 'none'; form-action 'none'"
    )


def test_the_content_security_policy_allows_only_the_embedded_scripts():
    html = render_page(make_scripted_page())
    (style,) = hash_sources(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    scripts = hash_sources(re.findall(r"<script>(.*?)</script>", html, re.DOTALL))
    assert len(scripts) == 3
    assert find_policy(html) == (
        f"default-src 'none'; img-src data:; style-src {style}; script-src {' '.join(scripts)}; "
        "base-uri 'none'; form-action 'none'"
    )


def load_script_data(html):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert not re.search("[<>&\n]", text)
    return json.loads(text)


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text[:12]))
def test_hostile_texts_are_data_of_the_script_and_nothing_else(text):
    page = make_scripted_page(lambda _: text, classes=(text, "grass", "gravel"))
    data = load_script_data(render_page(page))
    plain = re.sub("[\x00-\x1f\u202e]", lambda match: match[0].encode("unicode_escape").decode(), text)
    assert data["ids"] == [plain]
    assert data["pictures"] == {"0": "data:image/webp;base64," + base64.b64encode(b"RIFFmore").decode()}


def test_findings_baselines_notes_and_protocol_are_in_the_text():
    words = ParsedPage(render_page(make_scripted_page())).words
    for expected in (
        "Mistakes 90",
        "✗ grass 70 % labelled brick 0.99 to e.png d.png",
        "1 of 90",
        "not checked",
        "mlp 0.900 0.800–0.950 +0.020 -0.010 to +0.050 p < 0.001 McNemar 5 1",
        "Read the intervals.",
        "Scored all rows",
    ):
        assert expected in words


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text[:12]))
def test_hostile_text_adds_no_tags_or_attributes(text):
    plain = ParsedPage(render_page(make_scripted_page()))
    parsed = ParsedPage(render_page(make_scripted_page(lambda _: text, classes=(text, "grass", "gravel"))))
    assert set(parsed.tags) <= set(plain.tags)
    assert {(tag, name) for tag, name, _ in parsed.attributes} <= {(tag, n) for tag, n, _ in plain.attributes}


def test_a_long_name_is_truncated_with_the_full_name_as_title():
    parsed = ParsedPage(render_page(make_static_page(classes=("x" * 10_000, "grass", "gravel"))))
    assert ("bdi", "title", "x" * 10_000) in parsed.attributes
    assert max(len(text) for text in parsed.text) < 500


def test_names_cannot_change_the_writing_direction_of_others():
    parsed = ParsedPage(render_page(make_static_page(classes=("\u202egnp.exe", "שלום", "gravel"))))
    assert "\u202e" not in parsed.words
    assert "\\u202egnp.exe" in parsed.words
    assert ("bdi", "title", "שלום") in parsed.attributes


def test_an_empty_page_shows_only_its_title():
    parsed = ParsedPage(render_page(Page("Nothing yet")))
    assert parsed.words == "Nothing yet Nothing yet"
    assert "section" not in parsed.tags


@pytest.mark.parametrize(
    "scores",
    [
        score("regression", [1.0, 2.0, 4.0], [1.5, 2.0, 3.0], ["height"], bootstrap=10),
        score("regression", [[1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [2.0, 1.5]], ["height", "width"], bootstrap=10),
        score("multilabel", [[1, 0], [0, 1]], [[0.9, 0.2], [0.4, 0.4]], ["sky", "sea"], bootstrap=10),
        score("classification", ["a"], [[1.0]], ["a"]),
        score("classification", ["a"], [[0.5, 0.5]], ["a", "never seen"]),
    ],
    ids=["one target", "two targets", "labels", "one class", "an absent class"],
)
def test_scores_of_every_task_are_rendered(scores):
    words = ParsedPage(render_page(Page("Scores", scores=scores))).words
    for interval in scores.metrics.values():
        assert f"{interval.value:.3f}" in words
    assert len(scores.classes) == 1 or all(name in words for name in scores.classes)


def test_a_thousand_classes_show_confused_pairs_instead_of_a_matrix():
    classes = [f"class {i:04d}" for i in range(1000)]
    scores = make_scores(classes, m=3000)
    start = time.perf_counter()
    html = render_page(Page("Many", scores=scores))
    assert time.perf_counter() - start < 2
    assert len(html) < 10_000_000
    assert 'class="matrix' not in html
    words = ParsedPage(html).words
    for true_class, predicted, rows in scores.confused(20):
        assert f"{true_class} {predicted} {rows}" in words
    assert all(name in words for name in classes)


def test_the_bar_of_a_negative_score_ends_at_zero():
    axis = make_axis([-0.5, 1.0])
    assert (axis.low, axis.high) == (-0.5, 1.0)
    html = render_page(
        Page("R²", comparison=[ComparisonRow("mean", Interval(-0.5, -0.75, -0.25))], comparison_metric="r2")
    )
    assert "-0.750 to -0.250" in html
    assert re.search(r'class="bar" x="37.50%" y="8" height="16" width="62.50%"', html)


@pytest.mark.parametrize("values", [[], [0.0], [math.nan], [5e-324], [1e-9], [1e12, -3.0], [math.inf, 2.0]])
def test_an_axis_contains_zero_and_every_finite_value(values):
    axis = make_axis(values)
    finite_values = [value for value in values if math.isfinite(value)]
    assert axis.low <= min([0, *finite_values])
    assert axis.high >= max([0, *finite_values])
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 7


def test_axis_positions_are_clipped():
    assert Axis(0, 1, ()).position(7.0) == "100.00%"
    assert Axis(0, 1, ()).position(-7.0) == "0.00%"


def test_a_training_curve_has_gaps_at_values_that_are_not_finite():
    curve = make_training_curve("loss", [3.0, 2.0, math.nan, 1.0])
    assert curve.path == "M0.00 2.00L33.33 20.00M100.00 38.00"
    assert (curve.first, curve.last, curve.epochs) == ("3.000", "1.000", 4)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0], [2.0, 2.0]])
def test_training_curves_without_range_are_rendered(values):
    assert "nan" not in make_training_curve("loss", values).path
    assert render_page(Page("Curves", curves={"loss": values}))


def test_the_colour_level_of_a_cell_follows_its_share_of_the_true_class():
    p = np.eye(2)[[0] * 9 + [1] + [1] * 10]
    table = make_confusion_matrix(score("classification", ["a"] * 10 + ["b"] * 10, p, ["a", "b"], bootstrap=0))
    assert [(cell.rows, cell.level, cell.is_correct) for _, _, row in table for cell in row] == [
        (9, 5, True),
        (1, 3, False),
        (0, 0, False),
        (10, 5, True),
    ]


def test_rendering_is_deterministic(tmp_path):
    first, second = (
        write_page(make_static_page(), tmp_path / "1.html"),
        write_page(make_static_page(), tmp_path / "2.html"),
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_page_is_written_without_leftover_files(tmp_path):
    path = tmp_path / "report.html"
    assert write_page(make_static_page(), str(path)) == path
    assert path.read_text("utf-8") == render_page(make_static_page())
    assert os.listdir(tmp_path) == ["report.html"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_page(tmp_path, monkeypatch, call):
    path = tmp_path / "report.html"
    path.write_text("before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"featpipe.report.render.os.{call}", fail)
    with pytest.raises(ConfigError, match=r"report\.html: cannot write the report: No space left on device"):
        write_page(make_static_page(), path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_missing_folder_is_created(tmp_path):
    assert write_page(Page("t"), tmp_path / "new" / "page.html").is_file()


def test_a_folder_that_cannot_be_created_raises_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot write the report: .*; name a file in a folder that can be written"):
        write_page(Page("t"), tmp_path / "file" / "page.html")
