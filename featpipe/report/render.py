"""Render a page as HTML, and write it atomically."""

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
from featpipe.report.page import MAX_NAME_CHARACTERS, Page
from featpipe.storage import atomic_write

MAX_MATRIX_CLASSES = 40  # with more, the page lists the most confused pairs instead of the confusion matrix
MAX_LISTED_CLASSES = 20  # in that case, the scores of the other classes are collapsed

# Control characters, and characters that override or embed a writing direction. The marks that right-to-left names
# need are kept.
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
    """Write a page to a file atomically: an interrupted write leaves the previous file.

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
    """Render a page as self-contained HTML: styles, scripts, data and images are embedded."""
    template, style, scripts = _load_template_and_assets()
    compared_metric = METRICS.get(page.comparison_metric, Metric(page.comparison_metric, ""))
    interval_bounds = [bound for row in page.comparison for bound in (row.score.value, row.score.low, row.score.high)]
    return template.render(
        page=page,
        style=style,
        scripts=scripts if page.script_data else (),
        policy=_make_content_security_policy(style, scripts if page.script_data else ()),
        data=_to_script_json(page.script_data) if page.script_data else "",
        axis=make_axis(interval_bounds),
        comparison_metric=compared_metric,
        curves=[make_training_curve(name, values) for name, values in page.curves.items()],
        sections=_list_sections(page),
        **_make_score_context(page.scores),
    )


def _list_sections(page: Page) -> list[tuple[str, str]]:
    """List the sections to which the page links: anchor and title."""
    sections = [
        ("comparison", "Comparison", page.comparison),
        ("scores", "Scores", page.scores),
        ("uncertainty", "Uncertainty", page.tables.keys() - {"learning"}),
        ("confusion", "Confusion matrix", page.scores is not None and page.scores.confusion is not None),
        ("findings", "Findings", page.galleries),
        ("map", "Map", page.script_data),
        ("learning", "Learning curve", "learning" in page.tables),
        ("protocol", "Protocol", page.protocol),
        ("provenance", "Provenance", page.provenance),
    ]
    return [(anchor, title) for anchor, title, is_present in sections if is_present]


def _make_score_context(scores: Scores | None) -> dict[str, Any]:
    """Make the variables of the template that show scores."""
    if scores is None:
        return {"metrics": [], "class_columns": [], "weakest": [], "others": [], "matrix": [], "pairs": []}
    metrics = {name: METRICS.get(name, Metric(name, "")) for name in scores.metrics}
    class_rows = scores.weakest()
    has_many_classes = len(scores.classes) > MAX_MATRIX_CLASSES
    n_listed = MAX_LISTED_CLASSES if has_many_classes else len(class_rows)
    return {
        "metrics": [(metric.title, metric.meaning, scores.metrics[name]) for name, metric in metrics.items()],
        "class_columns": [
            (key, title) for key, title in _CLASS_COLUMN_TITLES.items() if class_rows and key in class_rows[0]
        ],
        "weakest": class_rows[:n_listed],
        "others": class_rows[n_listed:],
        "matrix": [] if has_many_classes else make_confusion_matrix(scores),
        "pairs": [pair for pair in scores.confused(20 if has_many_classes else 5) if has_many_classes or pair[2] > 1],
    }


@cache
def _load_template_and_assets() -> tuple[Template, str, tuple[str, ...]]:
    """Load the template, the style sheet and the scripts: D3, Observable Plot and page.js."""
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
        escape_invisible=_escape_invisible,
        short=_truncate_name,
        duration=_format_duration,
        data_uri=_to_data_uri,
        percent=_format_percent,
        p_value=_format_p_value,
    )
    scripts = tuple(
        (package_files / name).read_text("utf-8").strip()
        for name in ("vendor/d3.min.js", "vendor/plot.min.js", "page.js")
    )
    return environment.get_template("page.html"), (package_files / "style.css").read_text("utf-8"), scripts


def _make_content_security_policy(style: str, scripts: Sequence[str]) -> str:
    """Allow only the embedded scripts, the embedded style sheet and embedded images."""
    directives = ["default-src 'none'", "img-src data:", f"style-src {_hash_for_policy(style)}"]
    if scripts:
        directives.append(f"script-src {' '.join(map(_hash_for_policy, scripts))}")
    return "; ".join([*directives, "base-uri 'none'", "form-action 'none'"])


@cache
def _hash_for_policy(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _to_script_json(value: object) -> str:
    """Encode as JSON that is safe within a script element; invisible characters in texts are escaped."""
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
    """Escape characters that are invisible in HTML or change the order of others."""
    return _INVISIBLE_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _truncate_name(text: str) -> str:
    """Limit the length of a name in the page; the style sheet truncates it further to the available space."""
    return text if len(text) <= MAX_NAME_CHARACTERS else text[: MAX_NAME_CHARACTERS - 1] + "…"


def _format_percent(probability: float) -> str:
    """Format a probability, never rounded up to 100 % or down to 0 %."""
    if 0.995 <= probability < 1:
        return "> 99 %"
    return f"{100 * probability:.0f} %" if probability >= 0.01 or probability == 0 else "< 1 %"


def _format_duration(seconds: float) -> str:
    """Format a duration.

    Examples
    --------
    >>> _format_duration(0.034), _format_duration(12.3), _format_duration(250)
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
