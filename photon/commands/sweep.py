"""Hydra multirun: ``photon train -m outer=fedavg,diloco seed=0,1``."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from photon.config.compose import compose
from photon.config.explain import explain_hydra_error
from photon.config.folders import conf_dir
from photon.errors import PhotonError, RunError
from photon.preflight import preflight

SWEEP_DIR = "hydra.sweep.dir="


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
    check_sweep(overrides)
    folder = next((o.removeprefix(SWEEP_DIR) for o in overrides if o.startswith(SWEEP_DIR)), None)
    fixed = [o.partition("=")[0].lstrip("+~") for o in overrides if not _is_sweep(o)]
    # Folders are named after what differs; everything else stands in config.yaml.
    overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    if folder is None:
        folder = f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        overrides.append(f"{SWEEP_DIR}{folder}")
    sys.argv = ["photon train", "--multirun", *overrides]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(train_one)()

    from photon.report.write import write_report
    from photon.telemetry.summary import counted

    folders = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    runs = [path for path in folders if (path / "summary.json").is_file()]
    if runs:
        write_report(runs, Path(folder) / "report.html")
        told = f"{counted(len(runs), 'run')} side by side: {Path(folder) / 'report.html'}"
        Console().print(told, soft_wrap=True)
    if failed := [str(path) for path in folders if path not in runs]:
        raise RunError(f"{len(failed)} of {counted(len(folders), 'run')} failed: {', '.join(failed)}")


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
    preflight(compose(first))
    for place, values in enumerate(choices):
        for value in values[1:]:
            preflight(compose([*first[:place], value, *first[place + 1 :]]))
