"""The figures of a run in MLflow (``pip install 'photon-fl[mlflow]'``)."""

import hashlib
import math
import os
import re
from typing import Any

from photon import DISTRIBUTION
from photon.errors import PhotonError
from photon.telemetry.aside import Aside
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.listener import ListenerRun
from photon.telemetry.rows import Rows, leaves, numbers_of

#: Tag by which a run that goes on is found again.
_TAG = "photon.run"
#: What MLflow takes in one call.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 500


class MlflowListener:
    """Listener that logs the figures of each round and evaluation; a figure's step is the round.

    Parameters
    ----------
    uri
        Tracking server or store, as of ``MLFLOW_TRACKING_URI``; None: what that variable says.
    experiment
        Name of the experiment, which is made where it is missing.
    name
        Of the run.
    run_dir
        The run's folder. A run of the experiment that has the same goes on.
    config
        The resolved configuration, stored with the run.

    Raises
    ------
    PhotonError
        MLflow is not installed, or cannot begin a run.
    """

    def __init__(
        self, uri: str | None, experiment: str, name: str, run_dir: str, config: dict[str, Any]
    ) -> None:
        # It would tell its makers how it is used.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise PhotonError(
                f"telemetry=mlflow needs MLflow; run: pip install '{DISTRIBUTION}[mlflow]'"
            ) from None
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = self._find_or_create(experiment, name, run_dir, config)
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            raise PhotonError(
                f"MLflow cannot begin a run ({reason}); check MLFLOW_TRACKING_URI, or the listener's uri"
            ) from None
        self._rows = Rows()

    def _find_or_create(self, experiment: str, name: str, run_dir: str, config: dict[str, Any]) -> str:
        known = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if known is None else known.experiment_id
        # A path may have signs that a filter cannot hold.
        key = hashlib.sha256(run_dir.encode(errors="surrogateescape")).hexdigest()[:32]
        found = self._client.search_runs([where], filter_string=f"tags.`{_TAG}` = '{key}'", max_results=1)
        if found:
            run_id: str = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        run_id = self._client.create_run(where, tags={_TAG: key}, run_name=name).info.run_id
        self._log_config(run_id, config)
        return run_id

    def _log_config(self, run_id: str, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_name(key), str(value)[:_LONGEST_PARAM]) for key, value in leaves(config, ".")]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])

    def __call__(self, event: Event) -> None:
        """Log what ``event`` tells."""
        if (row := self._rows.of(event)) is not None:
            self._log(row.values, row.time, row.round)
        elif isinstance(event, RunFinished):
            summary = {f"summary/{key}": value for key, value in numbers_of(event.summary).items()}
            self._log(summary, event.time, 0)
            self._client.set_terminated(self._run_id, "FINISHED")
        elif isinstance(event, RunInterrupted):
            self._client.set_terminated(self._run_id, "KILLED")

    def _log(self, values: dict[str, float], time: float, step: int) -> None:
        from mlflow.entities import Metric

        # A store of MLflow's takes no NaN.
        metrics = [
            Metric(_name(name), value, int(time * 1000), step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MOST_METRICS])

    def close(self) -> None:
        """Do nothing: each event is logged at once."""


def mlflow(
    run: ListenerRun, *, uri: str | None = None, experiment: str = "photon", name: str | None = None
) -> Aside:
    """Return what logs a run to MLflow; ``name`` is the run's, by default its folder's."""

    def begin() -> MlflowListener:
        config = run.config.model_dump(by_alias=True)
        return MlflowListener(uri, experiment, name or run.run_dir.name, str(run.run_dir), config)

    return Aside(begin, "MLflow")


def _name(name: str) -> str:
    """Return a name that MLflow takes.

    It has one slash at most: a store in a folder has a file for each name, and none may be a folder, too.
    """
    group, _, rest = re.sub(r"[^\w\-. /]", "_", name).partition("/")
    return f"{group}/{rest.replace('/', '.')}" if rest else group
