"""The figures of a run in Weights & Biases, for those who have it (``pip install 'photon-fl[wandb]'``)."""

import zlib
from pathlib import Path
from typing import Any

from photon import DISTRIBUTION
from photon.config.trackers import WandbSection
from photon.errors import PhotonError
from photon.telemetry.aside import Aside
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.listener import ListenerRun
from photon.telemetry.rows import ROW_EVENTS, Rows, numbers_of


class WandbListener:
    """Listener that logs the figures of each round and evaluation.

    Every metric is plotted over ``round``; ``tokens`` is logged beside for those who prefer it.

    Parameters
    ----------
    settings
        Where to log, and under which names. Offline, files are written below ``run_dir`` only, to be sent
        later with ``wandb sync``.
    run_dir
        The run folder; the files go to ``run_dir/wandb``.
    config
        The resolved configuration, stored with the run.
    run_id
        The run's id; a run that is resumed goes on under the same one.
    rows
        Rows that earlier attempts have logged. Offline, W&B would count from 0 again, and parts of a run that
        begin at the same step hide each other once they are sent.

    Raises
    ------
    PhotonError
        Weights & Biases is not installed, or cannot begin a run; the message says how to mend it.
    """

    def __init__(
        self, settings: WandbSection, run_dir: Path, config: dict[str, Any], run_id: str, rows: int = 0
    ) -> None:
        mode = settings.mode
        try:
            import wandb
        except ImportError:
            raise PhotonError(
                f"telemetry.wandb.mode={mode} needs Weights & Biases; run: "
                f"pip install '{DISTRIBUTION}[wandb]'"
            ) from None
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                mode="online" if mode == "online" else "offline",
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=settings.tags,
                dir=str(run_dir),
                config=config,
                id=run_id,
                name=settings.name or run_dir.name,
                # Offline there is no run to be resumed yet; the parts meet when they are sent.
                resume="allow" if mode == "online" else None,
                # The console belongs to the display, and the code and machine to the user.
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            raise PhotonError(
                f"Weights & Biases cannot begin a run ({error}); log in with `wandb login`, "
                "or set telemetry.wandb.mode=offline"
            ) from None
        self._run.define_metric("*", step_metric="round")
        self._rows = Rows()
        # Online, W&B itself knows how far the run is.
        self._step = rows if mode == "offline" else None

    def __call__(self, event: Event) -> None:
        """Log what ``event`` tells."""
        if (row := self._rows.of(event)) is not None:
            self._run.log({"round": row.round, **row.values}, step=self._step)
            if self._step is not None:
                self._step += 1
        elif isinstance(event, RunFinished):
            self._run.summary.update(numbers_of(event.summary))
        elif isinstance(event, RunInterrupted):
            self.close(exit_code=1)

    def close(self, exit_code: int = 0) -> None:
        """Write out what is left; nothing can be logged after that. Closing again does nothing."""
        self._run.finish(exit_code=exit_code)


def weights_and_biases(run: ListenerRun) -> Aside | None:
    """Return what logs a run to Weights & Biases as ``telemetry.wandb`` wants it."""
    settings = run.config.telemetry.wandb
    if settings.mode == "off":
        return None

    def begin() -> WandbListener:
        return WandbListener(
            settings,
            run_dir=run.run_dir,
            config=run.config.model_dump(by_alias=True),
            rows=sum(isinstance(event, ROW_EVENTS) for event in run.history),
            run_id=f"{run.run_dir.name}-{zlib.crc32(str(run.run_dir).encode()):08x}",
        )

    # What has not been sent yet is, at the end.
    return Aside(begin, "Weights & Biases", ends_within=120.0)
