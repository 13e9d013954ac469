"""The HTML of the pages: every place by its name, as a page begins with it and is told of it later."""

from typing import Any

from photon import __version__
from photon.report.library import script_json
from photon.report.page import Page, Panel, Table
from photon.report.template import STYLE, templates
from photon.ui.health import Progress
from photon.ui.log import Line
from photon.ui.template import FRAME, LIVE, LIVE_STYLE

#: The places of a run's page, from the top down.
PLACES = ("head", "attention", "silos", "sections", "tables", "log", "rest")


def fragments(
    name: str,
    page: Page | None,
    *,
    progress: Progress | None = None,
    attention: list[tuple[str, str]] | None = None,
    silos: Table | None = None,
    log: list[Line] | None = None,
    fault: str = "",
) -> dict[str, str]:
    """Return the HTML of each place of a run's page; without a page, what is the matter.

    Charts are not in it: they are drawn by the page's script.
    """
    template = _live()
    if page is None or progress is None:
        return dict.fromkeys(PLACES, "") | {"head": str(template.fault(name, fault))}
    html = {
        "head": str(template.head(page, name, progress)),
        "attention": str(template.attention(attention or [])),
        "silos": str(template.silos(silos)),
        "sections": str(template.sections(page)),
        "tables": str(template.tables(page)),
        "log": str(template.log(log or [])),
        "rest": str(template.rest(page)),
    }
    # Panels without a chart are HTML that changes; the frame of the others stays.
    for _, panels in page.panels:
        for panel_name, panel in panels:
            if not hasattr(panel, "chart"):
                html[f"in-{panel_name}"] = str(template.inside(panel))
    return html


def figures(panel: Panel) -> str:
    """Return the table of the figures behind a chart."""
    return str(_live().figures(panel))


def framed(title: str, body: str, data: dict[str, Any]) -> str:
    """Return a whole page around ``body``, which is HTML, with what its script needs."""
    return (
        templates(frame=FRAME)
        .get_template("frame")
        .render(title=title, body=body, data=script_json(data), version=__version__, style=STYLE + LIVE_STYLE)
    )


def run_body(html: dict[str, str]) -> str:
    """Return the body of a run's page."""
    return str(_live().body(PLACES, html))


def comparison_body(page: Page) -> str:
    """Return the body of a page on several runs."""
    return str(_live().comparison(page))


def placed(place: str, html: str) -> str:
    """Return HTML in a place that news can fill anew."""
    return f'<div id="place-{place}">{html}</div>'


def list_body(rows: list[dict[str, Any]], where: list[str]) -> str:
    """Return the body of the list of runs."""
    return str(_live().runs(rows, where))


def list_rows(rows: list[dict[str, Any]]) -> str:
    """Return the rows of the list of runs."""
    return str(_live().run_rows(rows))


def _live() -> Any:
    """Return the macros of the pages."""
    return templates(live=LIVE).get_template("live").module
