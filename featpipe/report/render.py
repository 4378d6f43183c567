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

from featpipe.errors import ConfigError
from featpipe.metrics import METRICS, Metric, Scores, format_score
from featpipe.report.charts import make_axis, make_confusion_matrix, make_training_curve
from featpipe.report.page import Page
from featpipe.storage import atomic_write

__all__ = ["render_page", "write_page"]

# More classes than this make a matrix that nobody reads: the most confused pairs stand in its place.
_MAX_MATRIX_CLASSES = 40
# More classes than this are folded away behind the weakest ones.
_MAX_UNFOLDED_CLASSES = 20

# Control characters, and those that override or embed a direction of writing; the marks that right-to-left names
# need of themselves stay.
_INVISIBLE_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_CLASS_COLUMN_TITLES = {
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


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write a page to a file; under its final name it is whole, or as it was before.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    target = Path(path)
    data = render_page(page).encode("utf-8", "backslashreplace")
    try:
        with atomic_write(target) as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot write the report: {error.strerror}; name a file in a folder that can be written"
        ) from error
    return target


def render_page(page: Page) -> str:
    """The page as HTML that asks nothing of the network: styles, scripts, data and pictures inside."""
    template, style, scripts = _load_template_and_assets()
    compared_metric = METRICS.get(page.comparison_score, Metric(page.comparison_score, ""))
    interval_bounds = [bound for row in page.comparison for bound in (row.score.value, row.score.low, row.score.high)]
    return template.render(
        page=page,
        style=style,
        scripts=scripts if page.drawn else (),
        policy=_make_content_security_policy(style, scripts if page.drawn else ()),
        data=_to_script_json(page.drawn) if page.drawn else "",
        axis=make_axis(interval_bounds),
        compared={"name": compared_metric.title, "meaning": compared_metric.meaning},
        curves=[make_training_curve(name, values) for name, values in page.curves.items()],
        contents=_list_sections(page),
        **_make_score_context(page.scores),
    )


def _list_sections(page: Page) -> list[tuple[str, str]]:
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
    return [(target, title) for target, title, is_present in sections if is_present]


def _make_score_context(scores: Scores | None) -> dict[str, Any]:
    """What the template shows of some scores."""
    if scores is None:
        return {"metrics": [], "columns": [], "weakest": [], "others": [], "matrix": [], "pairs": []}
    metric_rows = [
        (metric.title, metric.meaning, scores.metrics[name])
        for name, metric in ((name, METRICS.get(name, Metric(name, ""))) for name in scores.metrics)
    ]
    class_rows = scores.weakest()
    has_many_classes = len(scores.classes) > _MAX_MATRIX_CLASSES
    n_unfolded = _MAX_UNFOLDED_CLASSES if has_many_classes else len(class_rows)
    return {
        "metrics": metric_rows,
        "columns": [(key, title) for key, title in _CLASS_COLUMN_TITLES.items() if class_rows and key in class_rows[0]],
        "weakest": class_rows[:n_unfolded],
        "others": class_rows[n_unfolded:],
        "matrix": [] if has_many_classes else make_confusion_matrix(scores),
        "pairs": [pair for pair in scores.confused(20 if has_many_classes else 5) if has_many_classes or pair[2] > 1],
    }


@cache
def _load_template_and_assets() -> tuple[Template, str, tuple[str, ...]]:
    """The template, the style sheet and the scripts: D3 and Observable Plot, then our own."""
    package_files = files("featpipe.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (package_files / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_format_cell,
        plain=_escape_invisible,
        short=_truncate_name,
        seconds=_format_duration,
        data_uri=_to_data_uri,
        percent=_format_percent,
        chance=_format_p_value,
    )
    scripts = tuple(
        (package_files / name).read_text("utf-8").strip()
        for name in ("vendor/d3.min.js", "vendor/plot.min.js", "page.js")
    )
    return environment.get_template("page.html"), (package_files / "style.css").read_text("utf-8"), scripts


def _make_content_security_policy(style: str, scripts: Sequence[str]) -> str:
    """What a browser may do for this page: run these scripts, use this style, show pictures that are inside it."""
    directives = ["default-src 'none'", "img-src data:", f"style-src {_csp_hash(style)}"]
    if scripts:
        directives.append(f"script-src {' '.join(map(_csp_hash, scripts))}")
    return "; ".join([*directives, "base-uri 'none'", "form-action 'none'"])


@cache
def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _to_script_json(value: object) -> str:
    """As it can stand within a script element: no character of HTML in it, texts as `_plain` makes them."""
    text = json.dumps(_escape_invisible_in(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escape_invisible_in(value: object) -> Any:
    if isinstance(value, str):
        return _escape_invisible(value)
    if isinstance(value, bytes):
        return _to_data_uri(value)
    if isinstance(value, Mapping):
        return {_escape_invisible(str(key)): _escape_invisible_in(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape_invisible_in(item) for item in value]
    return value


def _format_cell(value: object) -> str:
    if isinstance(value, str):
        return _truncate_name(_escape_invisible(value))
    if value is None:
        return "–"
    return format_score(value) if isinstance(value, float) else f"{value:,}"


def _format_p_value(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {format_score(p_value)}"


def _escape_invisible(text: str) -> str:
    """Text with the characters made visible that would vanish in HTML, or show the others in a false order."""
    return _INVISIBLE_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _truncate_name(text: str) -> str:
    """What of a long name is laid out at all; the style sheet cuts it further to the room there is."""
    return text if len(text) <= 200 else text[:199] + "…"


def _format_percent(probability: float) -> str:
    """A probability as people read it, never rounded up to certainty."""
    if 0.995 <= probability < 1:
        return "> 99 %"
    return f"{100 * probability:.0f} %" if probability >= 0.01 or probability == 0 else "< 1 %"


def _format_duration(seconds: float) -> str:
    """A duration as people read it.

    Examples
    --------
    >>> _seconds(0.034), _seconds(12.3), _seconds(250)
    ('0.03 s', '12 s', '4 min 10 s')
    """
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {remaining_seconds:02} s" if minutes else f"{remaining_seconds} s"


def _to_data_uri(image_bytes: bytes) -> str:
    image_format = "webp" if image_bytes[:4] == b"RIFF" else "jpeg"
    return f"data:image/{image_format};base64," + base64.b64encode(image_bytes).decode("ascii")
