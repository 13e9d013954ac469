"""The exported model that a path stands for: an export, a run, or one of its checkpoints."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from photon.evaluation.load import open_run_checkpoint


@contextmanager
def opened_export(path: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the folder of an exported model.

    Of a run that is finished it is the export that it has left; of another one, or a checkpoint, an export is
    made now, beside the others of the system's temporary folder, and removed in the end.

    Parameters
    ----------
    path
        An exported model, a run, or one of its checkpoints.
    say
        Told which round of a run it is.

    Raises
    ------
    PhotonError
        If ``path`` is none of them, is damaged, or its tokenizer stayed with the silos.
    """
    if (path / "config.json").is_file():
        yield path
        return
    checkpoint, _ = open_run_checkpoint(path)
    newest = checkpoint.state.round
    left = path / "export"
    if (left / "config.json").is_file() and _round_of_export(path) == newest:
        say(f"{left}: the export of round {newest}, the newest")
        yield left
        return
    from photon.evaluation.export import export_run

    say(f"{path}: the checkpoint of round {newest}, exported for now")
    with tempfile.TemporaryDirectory(prefix="photon-") as folder:
        made = Path(folder) / (path.resolve().name or "run")
        export_run(path, made)
        yield made


def _round_of_export(run_dir: Path) -> int | None:
    """Return the round whose model a run has exported at its end; None: it has not ended."""
    try:
        told = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return int(told["rounds"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
