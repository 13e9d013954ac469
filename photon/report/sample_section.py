"""What a report shows of the texts that a model wrote while it was trained."""

from photon.report.page import Panel, Table, Tables
from photon.report.run import Run
from photon.telemetry.samples import read_samples

#: Newest texts that are shown, and characters of one.
_MOST, _LONGEST = 50, 2_000


def sample_section(run: Run) -> list[tuple[str, list[Panel]]]:
    """Return the section; nothing where no text was written."""
    done = run.summary["rounds"]
    samples = [sample for sample in read_samples(run.folder) if sample.round <= done]
    if not samples:
        return []
    rows = [[str(sample.round), sample.text[:_LONGEST]] for sample in reversed(samples[-_MOST:])]
    note = "How the model went on from the prompt after a round, the newest first."
    table = Table(["round", "text"], rows, [None] * len(rows), wraps=True)
    return [("Text", [Tables("Text by round", note, [table])])]
