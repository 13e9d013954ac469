"""Hydra multirun: ``photon train -m outer=fedavg,diloco seed=0,1``."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from photon.config.compose import compose
from photon.config.explain import explain_hydra_error
from photon.config.folders import conf_dir
from photon.errors import PhotonError, RunError
from photon.preflight import preflight

SWEEP_DIR = "hydra.sweep.dir="
#: File of a run's folder that whoever trains one combination writes first.
JOB = ".job"
#: Environment variable with the process that sweeps.
SWEEPER = "PHOTON_SWEEPER"


def sweep(arguments: list[str], train_one: Callable[[Any], None]) -> None:
    """Train every combination, one run folder each, and lay the runs side by side in one report.

    Every value of the sweep is checked before the first run starts.

    Parameters
    ----------
    arguments
        Hydra's command line, with ``-m`` or ``--multirun``.
    train_one
        Trains one combination, from what Hydra composed. Parallel runs import it by its name.

    Raises
    ------
    PhotonError
        If a value is wrong.
    RunError
        If runs failed; the others are trained and compared all the same.
    """
    import hydra

    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if any(_key(override) == "run_dir" for override in overrides):
        raise PhotonError(
            "run_dir: each run of a sweep has a folder of its own; set hydra.sweep.dir, below which they lie"
        )
    check_sweep(overrides)
    folder = next((o.removeprefix(SWEEP_DIR) for o in overrides if o.startswith(SWEEP_DIR)), None)
    fixed = [_key(o) for o in overrides if not _is_sweep(o)]
    # Folders are named after what differs; everything else stands in config.yaml.
    overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    if folder is None:
        folder = f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        overrides.append(f"{SWEEP_DIR}{folder}")
    sys.argv = ["photon train", "--multirun", *overrides]
    os.environ[SWEEPER] = str(os.getpid())
    before = _states(Path(folder))
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(train_one)()
    _report(Path(folder), before)


def _report(folder: Path, before: Mapping[Path, "_State"]) -> None:
    """Lay the runs of this sweep side by side; what an earlier one has left in the folder is none of them."""
    from photon.report.write import write_report
    from photon.telemetry.summary import counted

    old = _State(None, None)
    now = {path: state for path, state in _states(folder).items() if state.job != before.get(path, old).job}
    runs = [path for path, state in now.items() if state.summary != before.get(path, old).summary]
    if runs:
        write_report(runs, folder / "report.html")
        told = f"{counted(len(runs), 'run')} side by side: {folder / 'report.html'}"
        Console().print(told, soft_wrap=True)
    if failed := [str(path) for path in now if path not in runs]:
        raise RunError(f"{len(failed)} of {counted(len(now), 'run')} failed: {', '.join(failed)}")


class _State(NamedTuple):
    """When a job began in a folder, and when that ended well; None: never."""

    job: int | None
    summary: int | None


def _states(folder: Path) -> dict[Path, _State]:
    def written(path: Path) -> int | None:
        return path.stat().st_mtime_ns if path.is_file() else None

    return {
        path: _State(written(path / JOB), written(path / "summary.json"))
        for path in sorted(folder.glob("*"))
        if path.is_dir()
    }


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


def check_sweep(overrides: list[str]) -> None:
    """Compose each value of a sweep once, the other keys at their first value.

    Raises
    ------
    PhotonError
        For the first value that the configuration does not take.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from photon.federation.run_tasks import check_tasks

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise PhotonError(explain_hydra_error(error)) from error
    choices = []
    for text, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            key = text.partition("=")[0]
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    first = [values[0] for values in choices]
    checked: set[str] = set()

    def check(chosen: list[str]) -> None:
        config = preflight(compose(chosen))
        # Task files are read once for all runs that ask them alike.
        if (tasks := config.evaluation.model_dump_json()) not in checked:
            check_tasks(config)
            checked.add(tasks)

    check(first)
    for place, values in enumerate(choices):
        for value in values[1:]:
            check([*first[:place], value, *first[place + 1 :]])
