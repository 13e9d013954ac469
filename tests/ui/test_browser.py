"""Pages as a browser shows them: drawn, followed, switched, and with nothing in them that runs by itself."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from photon.report.write import write_report
from photon.telemetry.events import RoundFinished
from tests.report.browser import Browser
from tests.telemetry.synthetic import synthetic_events
from tests.ui.conftest import Serve, begin_run, tell

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def _no_faults(browser: Browser) -> Iterator[None]:
    """Let no page tell of an error, and none break its policy."""
    browser.faults.clear()
    yield
    assert browser.faults == []


#: How many pixels of a canvas have any colour.
INK = """
(() => {
  const canvases = (one) => [...one.querySelectorAll('*')].flatMap(
    (each) => [...(each.tagName === 'CANVAS' ? [each] : []),
               ...(each.shadowRoot ? canvases(each.shadowRoot) : [])]);
  const drawn = ({width, height}) => width && height;
  const opaque = (canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
    .data.filter((value, place) => place % 4 === 3 && value).length;
  return [...document.querySelectorAll('figure[data-drawn]')].map(
    (figure) => canvases(figure).filter(drawn).reduce((sum, canvas) => sum + opaque(canvas), 0));
})()
"""


def test_a_report_opens_from_the_disk(runs: Path, tmp_path: Path, browser: Browser) -> None:
    write_report([runs / "first"], tmp_path / "report.html")
    for width, dark in ((1400, False), (420, True)):
        browser.open((tmp_path / "report.html").as_uri(), width=width, dark=dark)
        # What is drawn is there once the browser has painted it.
        browser.until(f"{INK}.every((ink) => ink > 500)")
        assert browser.value("document.querySelectorAll('figure[data-drawn]').length") == 12
        assert browser.value("document.documentElement.scrollWidth") <= width, "nothing is cut off"
    ink = browser.value("getComputedStyle(document.body).backgroundColor")
    assert ink == "rgb(16, 20, 24)", "dark"
    printed = browser.ask("Page.printToPDF", printBackground=True)
    assert len(printed["data"]) > 50_000


def test_a_name_of_a_legend_hides_its_line(runs: Path, tmp_path: Path, browser: Browser) -> None:
    write_report([runs / "first"], tmp_path / "report.html")
    browser.open((tmp_path / "report.html").as_uri())
    state = "[...document.querySelectorAll('#training-loss .legend button')].map((b) => b.ariaPressed).join()"
    assert browser.value(state) == "true,true,true,true,true"
    shown = "Bokeh.documents.flatMap((d) => [...d.all_models ?? d._all_models.values()])" + (
        ".filter((m) => m.type === 'GlyphRenderer' && !m.visible).length"
    )
    assert browser.value(shown) == 0
    browser.value("document.querySelector('#training-loss .legend button').click()")
    assert browser.value(state) == "false,true,true,true,true"
    assert browser.value(shown) == 2, "its line and its dots"
    browser.value("document.querySelector('#training-loss .legend button').click()")
    assert browser.value(shown) == 0


def test_a_page_follows_its_run(tmp_path: Path, serve: Serve, browser: Browser) -> None:
    events = list(synthetic_events())
    ends = [place for place, event in enumerate(events) if isinstance(event, RoundFinished)]
    run = tmp_path / "live"
    begin_run(run, events, ends[4] + 1)
    browser.open(f"{serve(tmp_path)}/run?id=live")
    browser.value("document.querySelector('#training-loss .plot').firstChild.id = 'the-same'")
    assert "5 of 10 rounds" in browser.value("document.querySelector('.pill').textContent")
    tell(run, events[ends[4] + 1 : ends[6] + 1])
    browser.until("document.querySelector('.pill').textContent.includes('7 of 10 rounds')")
    assert browser.value("document.querySelector('#the-same') !== null"), "the chart was not drawn anew"
    browser.value("document.querySelector('#training-loss details').open = true")
    browser.until("document.querySelectorAll('#training-loss tbody tr').length === 7")
    # Another run in its place: shorter, and all is drawn anew.
    os.truncate(run / "events.jsonl", 0)
    tell(run, events[: ends[1] + 1])
    browser.until("document.querySelector('.pill').textContent.includes('2 of 10 rounds')")
    assert browser.value("document.getElementById('lost').hidden")
    browser.value("document.querySelector('[data-filter]').value = 'round 2 done'")
    browser.value(
        "document.querySelector('[data-filter]').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    found = "[...document.querySelectorAll('#log-lines tr')].filter((row) => !row.hidden).length"
    assert browser.value(found) == 1


def test_runs_are_compared_by_a_click(runs: Path, serve: Serve, browser: Browser) -> None:
    browser.open(serve(runs))
    assert browser.value("document.getElementById('compare').disabled")
    browser.value("document.querySelectorAll('input[name=id]').forEach((box) => box.click())")
    browser.value("document.getElementById('compare').click()")
    browser.until("location.pathname === '/compare' && document.documentElement?.dataset.charts === 'drawn'")
    assert browser.value("document.querySelectorAll('figure[data-drawn]').length") == 8


def test_a_comparison_follows_its_runs(runs: Path, serve: Serve, browser: Browser) -> None:
    events = list(synthetic_events())
    ends = [place for place, event in enumerate(events) if isinstance(event, RoundFinished)]
    begin_run(runs / "live", events, ends[2] + 1)
    browser.open(f"{serve(runs)}/compare?id=first&id=live")
    rows = "document.querySelectorAll('#training-loss tbody tr').length"
    browser.until("document.documentElement?.dataset.charts === 'drawn'")
    version = browser.value("document.documentElement.dataset.version")
    browser.value("document.querySelector('#training-loss details').open = true")
    before = browser.value("document.querySelector('#training-loss').textContent.length")
    tell(runs / "live", events[ends[2] + 1 : ends[6] + 1])
    browser.until(f"document.documentElement.dataset.version !== '{version}'")
    browser.until("document.querySelectorAll('figure[data-drawn]').length === 8")
    assert browser.value("document.querySelector('#training-loss details').open"), "what was open stays so"
    assert browser.value("document.querySelector('#training-loss').textContent.length") > before
    assert browser.value(rows) >= 7
    assert browser.value("document.getElementById('lost').hidden")


def test_nothing_that_a_silo_wrote_runs(tmp_path: Path, serve: Serve, browser: Browser) -> None:
    evil = '<img src=x onerror="window.harm = 1"><script>window.harm = 1</script>'
    run = tmp_path / "live"
    run.mkdir()
    (run / "config.yaml").write_text(f"note: '{evil}'\n")
    lines = [event.to_json().replace('"cpp"', json.dumps(evil)) for event in synthetic_events()]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    write_report([run], tmp_path / "report.html")
    for page in (f"{serve(tmp_path)}/run?id=live", (tmp_path / "report.html").as_uri()):
        browser.open(page)
        # The text under the pointer is a silo's, too.
        box = browser.value(
            "(() => { const at = document.querySelector('#training-loss .plot'); at.scrollIntoView(); "
            "const box = at.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
        )
        for step in range(0, 100, 2):
            x, y = box[0] + box[2] * step / 100, box[1] + box[3] * (0.2 + 0.006 * step)
            browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert browser.value("window.harm === undefined")
        assert browser.value("document.querySelectorAll('img').length") == 0
        assert browser.value("document.querySelector('#training-loss .legend button').textContent") == evil
