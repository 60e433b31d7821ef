"""The reports in a real browser, on a desk and on a phone: layout, hover, zoom, dark mode; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tempo.observability.records import append
from megatron_tempo.observability.start import start_record
from megatron_tempo.report.comparison import write_comparison
from megatron_tempo.report.html import write_report
from tests.support.browser import Browser, executable
from tests.unit.test_report import HOSTILE, evaluation_record, write_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(executable() is None, reason="no Chromium: python -m tests.support.browser installs it"),
]

DESK, PHONE = 1280, 390


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / "a"), write_run(folder / "b-with-a-long-name", scores=(0.17, 0.28, 0.4))]
    runs += [write_run(folder / f"seed{seed}", stage2=20, calibrated=False) for seed in range(6)]
    append(runs[0] / "starts.jsonl", start_record(0, 2, [], {}))
    (folder / "evaluated").mkdir()
    append(folder / "evaluated" / "evaluations.jsonl", evaluation_record(0, "alone", "aime", 0.5))
    short = write_run(folder / "short", stage1=1, stage2=0, calibrated=False)
    append(short / "evaluations.jsonl", evaluation_record(1, "after", HOSTILE.replace("\ud800", ""), 0.5))
    return {
        "report": write_report(runs[0]),
        "short": write_report(short),
        "one evaluation": write_report(folder / "evaluated"),
        "comparison": write_comparison(runs, folder / "comparison.html"),
    }


@pytest.mark.parametrize("width", [DESK, PHONE])
@pytest.mark.parametrize("name", ["report", "short", "one evaluation", "comparison"])
def test_all_is_drawn_within_the_window_and_nothing_is_fetched(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width)
    assert browser.messages == []
    assert browser.requests == [pages[name].resolve().as_uri()]
    figures = browser.value("document.querySelectorAll('figure[data-chart]:not(details *)').length")
    assert browser.value("[...document.querySelectorAll('figure canvas')].filter(c => c.width > 100).length") == figures
    assert figures >= 1
    assert browser.value("document.querySelectorAll('figure.zoomed').length") == 0
    # Nothing is wider than the window, on a phone no table is wider than its frame, and no letter is cut off.
    assert browser.value("document.documentElement.scrollWidth") == width
    if width == PHONE:
        assert (
            browser.value("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
            == 0
        )
    outside = (
        f"[...document.querySelectorAll('td,th,dd,.key-list li')].filter(e => e.getBoundingClientRect().right > {width}"
    )
    if name != "comparison" or width == PHONE:
        assert browser.value(f"{outside} && e.offsetParent).map(e => e.textContent)") == []
    assert browser.value("typeof alert") == "function"


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_legends_are_below_the_charts_and_the_charts_show_ink(
    browser: Browser, pages: dict[str, Path], width: int
) -> None:
    browser.open(pages["report"], width)
    below = """[...document.querySelectorAll('figure[data-chart]')].every(f => f.querySelector('.key-list')
        .getBoundingClientRect().top >= f.querySelector('.plot').getBoundingClientRect().bottom - 1)"""
    assert browser.value(below)
    # The colour of the first curve is on every canvas.
    drawn = """[...document.querySelectorAll('figure[data-chart]')].map(f => {
        const c = f.querySelector('canvas'), p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let n = 0;
        for (let i = 0; i < p.length; i += 4) n += p[i] < 30 && Math.abs(p[i + 1] - 114) < 40 && p[i + 2] > 140;
        return n;
    })"""
    assert min(browser.value(drawn)) > 20


def place(browser: Browser, share: float) -> tuple[float, float]:
    """A point of the first chart, at this share of its width."""
    browser.value("document.querySelector('figure .u-over').scrollIntoView({block: 'center'})")
    script = (
        "(r => [r.left, r.top, r.width, r.height])(document.querySelector('figure .u-over').getBoundingClientRect())"
    )
    left, top, width, height = browser.value(script)
    return left + share * width, top + height / 2


def test_hover_tells_numbers_and_a_drag_zooms(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], DESK)
    key = "document.querySelector('figure .key-list').innerText"
    assert "0.69" not in browser.value(key)
    browser.mouse("Moved", *place(browser, 0.999))
    assert "".join(browser.value(key).split()) == "iteration100avg@160.690pass@80.890"
    scale = "(s => [s.min, s.max])(document.querySelector('figure').plot.scales.x)"
    assert browser.value(scale) == [0, 100]
    start, y = place(browser, 0.2)
    browser.drag(start, y, place(browser, 0.6)[0])
    low, high = browser.value(scale)
    assert (low, high) == (pytest.approx(20, abs=2), pytest.approx(60, abs=2))
    reset = "getComputedStyle(document.querySelector('figure .reset')).display"
    assert browser.value(reset) == "block"
    browser.value("document.querySelector('figure .reset').click()")
    browser.value("new Promise(done => setTimeout(done, 50))")
    assert browser.value(scale) == [0, 100]
    assert browser.value(reset) == "none"


def touch(browser: Browser, kind: str, *points: tuple[float, float]) -> None:
    places = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    browser.call("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=places)


def test_a_finger_tells_numbers_and_two_fingers_zoom(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], PHONE)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
    try:
        touch(browser, "Start", place(browser, 0.99))
        key = browser.value("document.querySelector('figure .key-list').innerText")
        assert "".join(key.split()) == "iteration100avg@160.690pass@80.890"
        touch(browser, "End")
        touch(browser, "Start", place(browser, 0.4), place(browser, 0.6))
        touch(browser, "Move", place(browser, 0.3), place(browser, 0.7))
        touch(browser, "End")
        browser.value("new Promise(done => setTimeout(done, 50))")
        low, high = browser.value("(s => [s.min, s.max])(document.querySelector('figure').plot.scales.x)")
        assert (low, high) == (pytest.approx(25, abs=4), pytest.approx(75, abs=4))  # twice as large, around 50
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_click_on_a_name_hides_its_curve_with_its_band(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], DESK)
    shown = "document.querySelector('figure').plot.series.slice(1).map(s => s.show)"
    assert browser.value(shown) == [True] * 6
    browser.value("document.querySelector('figure .key-list button').click()")
    assert browser.value(shown) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_dark_mode_is_dark_and_legible(browser: Browser, pages: dict[str, Path], name: str) -> None:
    luminance = """(e => { const [r, g, b] = getComputedStyle(e[0])[e[1]].match(/[0-9.]+/g).map(v => {
        v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; })"""
    for dark in (False, True):
        browser.open(pages[name], DESK, dark=dark)
        ground = browser.value(f"{luminance}([document.body, 'backgroundColor'])")
        assert (ground < 0.05) == dark
        paper = browser.value(f"{luminance}([document.querySelector('.card'), 'backgroundColor'])")
        for element in ("document.body", "document.querySelector('.note')", "document.querySelector('th')"):
            ink = browser.value(f"{luminance}([{element}, 'color'])")
            for behind in (ground, paper):
                contrast = (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05)
                assert contrast >= 4.5, (element, dark)  # WCAG 2.2, AA
    axis = browser.value("document.querySelector('figure').plot.axes[0].stroke()")
    assert axis == browser.value("getComputedStyle(document.documentElement).getPropertyValue('--muted').trim()")
