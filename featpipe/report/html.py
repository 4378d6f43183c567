"""From a page to HTML, and to a file that is whole or absent."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from featpipe.durable import whole_file
from featpipe.errors import ConfigError
from featpipe.report.charts import axis_of, curve_of, matrix_of
from featpipe.report.page import Page
from featpipe.scores import METRICS, Scores, number

__all__ = ["render", "write"]

# More classes than this make a matrix that nobody reads: the most confused pairs stand in its place.
_MATRIX = 40
# More classes than this are folded away behind the weakest ones.
_WEAKEST = 20

# Control characters, and those that override or embed a direction of writing; the marks that right-to-left names
# need of themselves stay.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_COLUMNS = {
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "support": "Rows",
    "average_precision": "Average precision",
    "mae": "Mean abs. error",
    "rmse": "RMSE",
    "r2": "R²",
    "spearman": "Spearman",
}


def write(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page to a file; under its final name it is whole, or as it was before.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    target = Path(path)
    data = render(page).encode("utf-8", "backslashreplace")
    try:
        with whole_file(target) as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot write the report: {error.strerror}; name a file in a folder that can be written"
        ) from error
    return target


def render(page: Page) -> str:
    """The page as HTML that asks nothing of the network: styles, scripts, data and pictures inside."""
    template, style, scripts = _parts()
    name, meaning = METRICS.get(page.comparison_score, (page.comparison_score, ""))
    bounds = [bound for row in page.comparison for bound in (row.score.value, row.score.low, row.score.high)]
    return template.render(
        page=page,
        style=style,
        scripts=scripts if page.drawn else (),
        policy=_policy(style, scripts if page.drawn else ()),
        data=_json(page.drawn) if page.drawn else "",
        axis=axis_of(bounds),
        compared={"name": name, "meaning": meaning},
        curves=[curve_of(name, values) for name, values in page.curves.items()],
        contents=_contents(page),
        **_scored(page.scores),
    )


def _contents(page: Page) -> list[tuple[str, str]]:
    """The sections that people jump to."""
    sections = [
        ("comparison", "Comparison", page.comparison),
        ("scores", "Scores", page.scores),
        ("sure", "How sure", page.tables.keys() - {"learning"}),
        ("confusion", "Confusions", page.scores is not None and page.scores.confusion is not None),
        ("next", "Look at next", page.galleries),
        ("map", "Map", page.drawn),
        ("learning", "More labels", "learning" in page.tables),
        ("how", "How it was judged", page.how),
        ("provenance", "Repeat", page.provenance),
    ]
    return [(target, title) for target, title, there in sections if there]


def _scored(scores: Scores | None) -> dict[str, Any]:
    """What the template shows of some scores."""
    if scores is None:
        return {"metrics": [], "columns": [], "weakest": [], "others": [], "matrix": [], "pairs": []}
    metrics = [(*METRICS.get(name, (name, "")), score) for name, score in scores.metrics.items()]
    rows = scores.weakest()
    large = len(scores.classes) > _MATRIX
    shown = _WEAKEST if large else len(rows)
    return {
        "metrics": metrics,
        "columns": [(key, title) for key, title in _COLUMNS.items() if rows and key in rows[0]],
        "weakest": rows[:shown],
        "others": rows[shown:],
        "matrix": [] if large else matrix_of(scores),
        "pairs": [pair for pair in scores.confused(20 if large else 5) if large or pair[2] > 1],
    }


@cache
def _parts() -> tuple[Template, str, tuple[str, ...]]:
    """The template, the style sheet and the scripts: D3 and Observable Plot, then our own."""
    room = files("featpipe.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (room / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_cell, plain=_plain, short=_short, seconds=_seconds, data_uri=_data_uri, percent=_percent, chance=_chance
    )
    scripts = tuple(
        (room / name).read_text("utf-8").strip() for name in ("vendor/d3.min.js", "vendor/plot.min.js", "page.js")
    )
    return environment.get_template("page.html"), (room / "style.css").read_text("utf-8"), scripts


def _policy(style: str, scripts: Sequence[str]) -> str:
    """What a browser may do for this page: run these scripts, use this style, show pictures that are inside it."""
    parts = ["default-src 'none'", "img-src data:", f"style-src {_hash(style)}"]
    if scripts:
        parts.append(f"script-src {' '.join(map(_hash, scripts))}")
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


@cache
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """As it can stand within a script element: no character of HTML in it, texts as `_plain` makes them."""
    text = json.dumps(_visible(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _visible(value: object) -> Any:
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, bytes):
        return _data_uri(value)
    if isinstance(value, Mapping):
        return {_plain(str(key)): _visible(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_visible(item) for item in value]
    return value


def _cell(value: object) -> str:
    if isinstance(value, str):
        return _short(_plain(value))
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else f"{value:,}"


def _chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {number(p)}"


def _plain(text: str) -> str:
    """Text with the characters made visible that would vanish in HTML, or show the others in a false order."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _short(text: str) -> str:
    """What of a long name is laid out at all; the style sheet cuts it further to the room there is."""
    return text if len(text) <= 200 else text[:199] + "…"


def _percent(share: float) -> str:
    """A probability as people read it, never rounded up to certainty."""
    if 0.995 <= share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "< 1 %"


def _seconds(seconds: float) -> str:
    """A duration as people read it.

    Examples
    --------
    >>> _seconds(0.034), _seconds(12.3), _seconds(250)
    ('0.03 s', '12 s', '4 min 10 s')
    """
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _data_uri(picture: bytes) -> str:
    kind = "webp" if picture[:4] == b"RIFF" else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode("ascii")
