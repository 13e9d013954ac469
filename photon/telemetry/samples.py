"""Text that the model writes every few rounds: a listener, and what it has written down."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from photon.errors import PhotonError
from photon.telemetry.events import Checkpointed, Event
from photon.telemetry.listener import ListenerRun

#: The file, in the run's folder: one sample a line.
SAMPLES = "samples.jsonl"
#: Bytes at the end of the file that are read.
_MOST_BYTES = 2**20


class Sample(NamedTuple):
    """What the model wrote after a round, its prompt first."""

    round: int
    text: str


class TextSamples:
    """Let the model continue ``telemetry.sample_prompt`` after every so many rounds.

    Parameters
    ----------
    run
        The run.
    every
        Rounds from one sample to the next; the last round has one, too.

    Raises
    ------
    PhotonError
        ``every`` is no positive number, or ``telemetry.sample_tokens`` is 0.
    """

    def __init__(self, run: ListenerRun, *, every: int = 10) -> None:
        if every < 1:
            raise PhotonError(f"telemetry.listeners: every={every} of TextSamples: must be at least 1")
        if not run.config.telemetry.sample_tokens:
            raise PhotonError(
                "telemetry.sample_tokens=0: TextSamples has nothing to do; set it, or leave the listener out"
            )
        self._run = run
        self._every = every

    def __call__(self, event: Event) -> None:
        """Append a sample, once the round's checkpoint is on the disk."""
        if not isinstance(event, Checkpointed):
            return
        if event.round % self._every and event.round != self._run.config.rounds:
            return
        from photon.evaluation.export import export_run
        from photon.evaluation.generate import generate_text

        telemetry = self._run.config.telemetry
        with tempfile.TemporaryDirectory(dir=self._run.run_dir, prefix=".sample-") as folder:
            export_run(self._run.run_dir / event.path, Path(folder) / "model")
            text = generate_text(
                Path(folder) / "model", telemetry.sample_prompt, max_new_tokens=telemetry.sample_tokens
            )
        line = json.dumps({"round": event.round, "text": text})
        with (self._run.run_dir / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def read_samples(run_dir: Path) -> list[Sample]:
    """Return a run's samples by round, of one done again the last; what is damaged is left out."""
    try:
        with (run_dir / SAMPLES).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _MOST_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    found: dict[int, Sample] = {}
    for line in lines:
        try:
            content = json.loads(line)
            sample = Sample(int(content["round"]), str(content["text"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        found[sample.round] = sample
    return [found[number] for number in sorted(found)]
