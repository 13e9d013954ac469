"""The figures of a run in TensorBoard (``pip install 'photon-fl[tensorboard]'``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from photon import DISTRIBUTION
from photon.errors import PhotonError
from photon.telemetry.aside import Aside
from photon.telemetry.events import Event, RunStarted
from photon.telemetry.listener import ListenerRun
from photon.telemetry.rows import Rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardListener:
    """Listener that writes event files; a figure's step is the round.

    Parameters
    ----------
    folder
        Where the files go. What an earlier attempt told of rounds that are done again is left out when the
        files are read.

    Raises
    ------
    PhotonError
        TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise PhotonError(
                f"telemetry=tensorboard needs TensorBoard; run: pip install '{DISTRIBUTION}[tensorboard]'"
            ) from None
        self._folder = folder
        self._rows = Rows()
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Write what ``event`` tells."""
        if isinstance(event, RunStarted):
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            first = 0 if event.resumed_from is None else event.resumed_from + 1
            self._writer = SummaryWriter(str(self._folder), purge_step=first)
        row = self._rows.of(event)
        if row is None or self._writer is None:
            return
        for name, value in row.values.items():
            self._writer.add_scalar(name, value, row.round, walltime=row.time)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def tensorboard(run: ListenerRun, *, folder: str = "tensorboard") -> Aside:
    """Return what writes TensorBoard's files to a folder; a relative one is below the run's."""
    return Aside(lambda: TensorBoardListener(run.run_dir / folder), "TensorBoard")
