"""The report: one HTML page with the figures of a run, or of several runs laid side by side.

The page needs nothing but itself: style, figures and the library that draws them are in it. Its content
security policy allows these two scripts alone, by their hashes, and forbids it to load anything.
"""

from collections.abc import Sequence
from pathlib import Path

from photon import __version__
from photon.errors import PhotonError
from photon.files import atomic
from photon.report.comparison import comparison_page
from photon.report.library import library, packed_library, script_json, source_of
from photon.report.page import Page
from photon.report.run import Run
from photon.report.script import BEGIN, SCRIPT
from photon.report.single import run_page
from photon.report.template import STYLE, TEMPLATE, templates


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write the report on one run, or on several side by side, to ``output``.

    Parameters
    ----------
    runs
        Run folders, with ``config.yaml`` and ``events.jsonl``; a run need not be finished.
    output
        The HTML file; what was there is replaced.

    Raises
    ------
    PhotonError
        ``runs`` is empty, a folder of it is not a run, or ``output`` cannot be written; the message names it.
    """
    if not runs:
        raise PhotonError("report: no run is named; name at least one folder that `photon train` made")
    write_page(report_page([Run.load(folder) for folder in runs]), output)


def report_page(runs: Sequence[Run]) -> Page:
    """Return the page on one run, or on several side by side."""
    return run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)


def write_page(page: Page, output: Path) -> None:
    """Write a page; whatever text it holds is escaped.

    Raises
    ------
    PhotonError
        ``output`` cannot be written.
    """
    # Half of a character, which a model may write, is none in a file.
    text = html_of(page).encode("utf-8", "replace").decode()
    try:
        atomic.write_text(output, text)
    except OSError as error:
        raise PhotonError(f"{output}: cannot be written ({error.strerror}); name another file") from error


def html_of(page: Page) -> str:
    """Return a page as one file of HTML."""
    charts = page.charts
    script = SCRIPT + BEGIN
    allowed = f"{source_of(script)} {source_of(library())}" if charts else "'none'"
    return (
        templates(page=TEMPLATE)
        .get_template("page")
        .render(
            page=page,
            version=__version__,
            style=STYLE,
            policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}",
            charts=script_json(charts),
            library=packed_library() if charts else "",
            script=script,
        )
    )
