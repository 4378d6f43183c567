"""The report in a real browser: Chromium, driven by Playwright; skipped where either is missing.

One browser and one page with hostile names serve all tests.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from featpipe import evaluate, extract, train
from featpipe.report import write_report
from tests.support.images import jpeg

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.thorough, pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")]

CLASSES = (
    "<script>document.title='owned'<∕script>",  # a slash is not possible in the name of a folder
    '"><img src=x onerror="document.title=\'owned\'">',
    "line\nbreak & \u202egnp.exe",
    "שלום",
    "long" + "g" * 200,
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The report of a model on images of classes with hostile names, compared with another model."""
    from featpipe import backbones
    from tests.support.networks import Tiny, tiny_transform

    home = tmp_path_factory.mktemp("report")
    for part, n_images in (("train", 8), ("test", 12)):
        for number, name in enumerate(CLASSES):
            folder = home / part / name
            folder.mkdir(parents=True)
            for i in range(n_images):
                seed = 1000 * (number // 2) + (100 if part == "test" else 0) + i  # pairs of classes look alike
                (folder / f"{i:02}<b>.jpg").write_bytes(jpeg(seed))
    tiny = backbones.load(Tiny(), transform=tiny_transform)
    caches = {
        part: extract(home / part, backbone=tiny, cache=home, out=home / f"{part}.h5") for part in ("train", "test")
    }
    model, baseline = train(caches["train"], "logistic", cv=2), train(caches["train"], "centroid")
    evaluation = evaluate(model, caches["test"], against=[baseline], trained_on=caches["train"])
    return write_report(home / "page.html", evaluation, command="featpipe evaluate …"), evaluation


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_and_problems(browser, page_file):
    """The page, with its console messages, errors and external requests."""
    problems: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: problems.append(request.url) if not is_local(request.url, page_file[0]) else None
    )
    page.goto(page_file[0].as_uri())
    yield page, problems
    page.close()


def is_local(url: str, file: Path) -> bool:
    return url.startswith("data:") or url.split("#")[0] == file.as_uri()


def test_the_page_has_no_errors_and_makes_no_network_requests(page_and_problems):
    page, problems = page_and_problems
    assert page.evaluate("document.documentElement.classList.contains('scripted')")
    assert page.title().startswith("logistic on")
    assert problems == []


def test_hostile_names_are_shown_as_text(page_and_problems):
    page, _ = page_and_problems
    assert page.locator("b >> text=.jpg").count() == 0
    for name in CLASSES[:2]:
        assert page.locator("th bdi", has_text=name[:12]).count() > 0
    assert page.evaluate("document.body.innerText.includes('\\u202e')") is False


def test_every_chart_is_drawn(page_and_problems, page_file):
    page, _ = page_and_problems
    charts = page.evaluate(
        "[...document.querySelectorAll('[data-chart]')].map(e => [e.dataset.chart, !!e.querySelector('svg')])"
    )
    assert {name for name, is_drawn in charts if is_drawn} >= {"reliability", "threshold"}
    assert all(is_drawn for _, is_drawn in charts)
    assert page.locator("svg style").count() == 0


def test_a_cell_of_the_matrix_opens_a_dialog_with_its_images(page_and_problems, page_file):
    page, problems = page_and_problems
    confusion = page_file[1].scores.confusion
    true_class, predicted = (int(i) for i in np.argwhere((confusion > 0) & ~np.eye(len(confusion), dtype=bool))[0])
    page.locator(f"[data-cell='{true_class},{predicted}']").click()
    dialog = page.locator("#dialog")
    assert dialog.is_visible()
    assert dialog.locator("figure").count() == confusion[true_class, predicted]
    assert all(
        source.startswith("data:image/webp;base64,")
        for source in dialog.locator("img").evaluate_all("images => images.map(image => image.src)")
    )
    assert dialog.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator(f"[data-cell='{true_class},{predicted}']").focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    page.locator("#dialog-close").click()
    assert not dialog.is_visible()
    assert problems == []


def test_the_threshold_slider_shows_the_accuracy_of_answers(page_and_problems, page_file):
    page, _ = page_and_problems
    evaluation = page_file[1]
    slider = page.locator("#threshold")
    slider.focus()
    threshold = int(100 * np.median(evaluation.predicted.max(axis=1))) / 100
    slider.evaluate("(input, to) => { input.value = to; input.dispatchEvent(new Event('input')); }", threshold - 0.01)
    page.keyboard.press("ArrowRight")
    assert page.locator("#threshold-value").inner_text() == f"{threshold:.2f}"
    is_answered = evaluation.predicted.max(axis=1) >= threshold
    is_correct = evaluation.judged.is_correct[is_answered]
    accuracy, n_wrong = 100 * is_correct.mean(), (~is_correct).sum()
    expected = f"({is_answered.sum()}), {accuracy:.1f} % of them correctly, {n_wrong} wrongly"
    assert expected in page.locator("#threshold-outcome").inner_text()


def test_the_map_is_navigated_with_arrow_keys_and_hover(page_and_problems):
    page, problems = page_and_problems
    canvas = page.locator("#map-canvas")
    canvas.scroll_into_view_if_needed()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    card = page.locator("#map-card")
    first = card.inner_text()
    assert "%" in first
    assert page.locator("#map-image").evaluate("image => image.naturalWidth") > 0
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert card.inner_text() != first
    page.keyboard.press("Escape")
    assert card.is_hidden()
    box = canvas.bounding_box()
    for share in np.linspace(0.1, 0.9, 40):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        if card.is_visible():
            break
    assert card.is_visible()
    page.mouse.move(box["x"] + 5, box["y"] - 40)
    page.locator("#map-class").select_option("wrong")
    page.locator("#map-colour").select_option("sure")
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_contrast_is_sufficient_and_nothing_overflows(page_and_problems, scheme, width):
    page, problems = page_and_problems
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    assert problems == []
    page.set_viewport_size({"width": 1200, "height": 900})


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = (name) => {
    const [r, g, b] = style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((h) => linear(parseInt(h, 16)));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const paper = luminance("--paper");
  return Object.fromEntries(["--ink", "--muted", "--right", "--wrong"].map((n) => [n, ratio(luminance(n), paper)]));
}"""


def test_every_control_can_be_focused(page_and_problems):
    page, _ = page_and_problems
    unreachable = page.evaluate(
        "[...document.querySelectorAll('[data-cell], a, button, input, select, canvas, summary')]"
        ".filter(e => e.tabIndex < 0).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unreachable == []


def test_the_page_prints_without_controls(page_and_problems, tmp_path):
    page, problems = page_and_problems
    page.emulate_media(media="print")
    assert not page.locator(".slider").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.locator("[data-chart=reliability] svg").is_visible()
    assert len(page.pdf()) > 10_000
    page.emulate_media(media="screen")
    assert problems == []


def test_without_scripts_tables_and_galleries_are_visible(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file[0].as_uri())
    assert page.locator("figure img").first.is_visible()
    assert not page.locator("#map-canvas").is_visible()
    assert page.locator(".chart summary").first.is_visible()
    context.close()
