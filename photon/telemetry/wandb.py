"""The metrics of a run in Weights & Biases, for those who have it (``pip install 'photon-fl[wandb]'``)."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from photon import DISTRIBUTION
from photon.errors import PhotonError
from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    Event,
    RoundFinished,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SiloFailed,
    SiloFinished,
    TasksEvaluated,
)
from photon.telemetry.listener import ListenerRun

#: Events that are rows.
_LOGGED = (RoundFinished, Diagnostics, Evaluated, TasksEvaluated)


class WandbListener:
    """Listener that logs the figures of each round and evaluation.

    Every metric is plotted over ``round``; ``tokens`` is logged beside for those who prefer it.

    Parameters
    ----------
    mode
        ``"online"`` sends as the run goes; ``"offline"`` writes below ``run_dir`` only, to be sent later
        with ``wandb sync``.
    project
        The project at Weights & Biases.
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
        self,
        mode: Literal["offline", "online"],
        project: str,
        run_dir: Path,
        config: dict[str, Any],
        run_id: str,
        rows: int = 0,
    ) -> None:
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
                mode=mode,
                project=project,
                dir=str(run_dir),
                config=config,
                id=run_id,
                name=run_dir.name,
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
        self._replies: list[SiloFinished] = []
        self._failures = 0
        # Online, W&B itself knows how far the run is.
        self._rows = rows if mode == "offline" else None

    def __call__(self, event: Event) -> None:
        """Log what ``event`` tells."""
        if isinstance(event, RunStarted):
            self._replies, self._failures = [], 0
        elif isinstance(event, SiloFinished):
            self._replies.append(event)
        elif isinstance(event, SiloFailed):
            self._failures += 1
        elif isinstance(event, RoundFinished):
            metrics = _round_metrics(event) | _silo_metrics(self._replies, self._failures)
            self._log({key: value for key, value in metrics.items() if value is not None})
            self._replies, self._failures = [], 0
        elif isinstance(event, Diagnostics):
            values = {f"diagnostics/{name}": value for name, value in event.values.items()}
            self._log({"round": event.round, **values})
        elif isinstance(event, Evaluated):
            self._log(_evaluation_metrics(event))
        elif isinstance(event, TasksEvaluated):
            self._log(_task_metrics(event))
        elif isinstance(event, RunFinished):
            self._run.summary.update(event.summary)
            self.close()
        elif isinstance(event, RunInterrupted):
            self.close(exit_code=1)

    def _log(self, row: Mapping[str, object]) -> None:
        self._run.log(dict(row), step=self._rows)
        if self._rows is not None:
            self._rows += 1

    def close(self, exit_code: int = 0) -> None:
        """Write out what is left; nothing can be logged after that. Closing again does nothing."""
        self._run.finish(exit_code=exit_code)


def weights_and_biases(run: ListenerRun) -> WandbListener | None:
    """Return what logs a run to Weights & Biases as ``telemetry.wandb`` wants it."""
    settings = run.config.telemetry.wandb
    if settings.mode == "off":
        return None
    return WandbListener(
        mode=settings.mode,
        project=settings.project,
        run_dir=run.run_dir,
        config=run.config.model_dump(by_alias=True),
        rows=sum(isinstance(event, _LOGGED) for event in run.history),
        run_id=f"{run.run_dir.name}-{zlib.crc32(str(run.run_dir).encode()):08x}",
    )


def _round_metrics(event: RoundFinished) -> dict[str, float | None]:
    return {
        "round": event.round,
        "global_step": event.global_step,
        "tokens": event.tokens,
        "train/loss": event.train_loss,
        "server/pseudo_gradient_norm": event.pseudo_gradient_norm,
        "server/parameter_norm": event.parameter_norm,
        "server/silo_cosine": event.silo_cosine,
        "server/consensus": event.consensus,
        "link/bytes_up": event.bytes_up,
        "link/bytes_down": event.bytes_down,
        "seconds/round": event.seconds["round"],
        "seconds/training": event.seconds["training"],
        "seconds/fold": event.seconds["fold"],
        "seconds/outer": event.seconds["outer"],
        "seconds/evaluate": event.seconds["evaluate"],
        "seconds/checkpoint": event.seconds["checkpoint"],
        "seconds/overhead": event.seconds["overhead"],
        **{f"link/bytes_up/{group}": count for group, count in event.group_bytes_up.items()},
        **{f"link/bytes_down/{group}": count for group, count in event.group_bytes_down.items()},
    }


def _silo_metrics(replies: list[SiloFinished], failures: int) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {"silos/finished": len(replies), "silos/failed": failures}
    for event in replies:
        prefix = f"silo/{event.silo}"
        metrics |= {
            f"{prefix}/loss": event.loss,
            f"{prefix}/learning_rate": event.learning_rate,
            f"{prefix}/gradient_norm": event.gradient_norm,
            f"{prefix}/update_norm": event.update_norm,
            f"{prefix}/tokens_per_second": event.tokens_per_second,
            f"{prefix}/mfu": event.mfu,
            f"{prefix}/seconds": event.seconds["total"],
        }
    return metrics


def _evaluation_metrics(event: Evaluated) -> dict[str, float]:
    metrics = {
        "round": event.round,
        "tokens": event.tokens_trained,
        "validation/loss": event.loss,
        "validation/perplexity": event.perplexity,
    }
    metrics["validation/silos"] = len(event.per_silo)
    if event.error is not None:
        metrics["validation/error"] = event.error
    for name, silo in event.per_silo.items():
        metrics[f"validation/{name}/loss"] = silo["loss"]
        metrics[f"validation/{name}/perplexity"] = silo["perplexity"]
    return metrics


def _task_metrics(event: TasksEvaluated) -> dict[str, float]:
    metrics: dict[str, float] = {
        "round": event.round,
        "tokens": event.tokens_trained,
        "tasks/failed": float(event.failure is not None),
    }
    for task, found in event.tasks.items():
        metrics |= {f"tasks/{task}/{name}": value for name, value in found["metrics"].items()}
    for suite, means in event.suites.items():
        known = {"accuracy": means["accuracy"], "above_chance": means["above_chance"]}
        metrics |= {f"tasks/{suite}/{name}": value for name, value in known.items() if value is not None}
    return metrics
