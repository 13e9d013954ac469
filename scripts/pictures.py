"""Make the pictures of a run that the documents show: the live view in a terminal, and the report.

    python scripts/pictures.py runs/quickstart

Needs Chromium for the report (`--browser` names it), and the run's `events.jsonl` and `report.html`.
"""

import argparse
import re
import subprocess
import tempfile
from io import StringIO
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from photon.telemetry.display import Display
from photon.telemetry.events import RoundFinished, SiloFinished
from photon.telemetry.log import current_history, read_events

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"


def terminal(run_dir: Path) -> str:
    """Return the live view as SVG, as it was when two silos of the last round were done."""
    events = current_history(read_events(run_dir / "events.jsonl"))
    last = max(event.round for event in events if isinstance(event, RoundFinished))
    replies = [
        place for place, event in enumerate(events) if isinstance(event, SiloFinished) and event.round == last
    ]
    seen = events[: replies[min(1, len(replies) - 1)] + 1]
    console = Console(record=True, file=StringIO(), force_terminal=True, width=88, height=40)
    console.print(Display(console, history=seen, clock=lambda: seen[-1].time))
    # Without the fonts that it would fetch.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="photon train", code_format=form, unique_id="photon")


def report(run_dir: Path, picture: Path, browser: str) -> None:
    """Take a picture of the upper part of the report."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", "--window-size=1200,1260", "--virtual-time-budget=4000"),
                *(f"--screenshot={picture}", (run_dir / "report.html").resolve().as_uri()),
            ],
            check=True,
            capture_output=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--browser", default="chromium")
    asked = parser.parse_args()
    (PICTURES / "terminal.svg").write_text(terminal(asked.run_dir))
    report(asked.run_dir, PICTURES / "report.png", asked.browser)


if __name__ == "__main__":
    main()
