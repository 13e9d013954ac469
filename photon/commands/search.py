"""What a sweep tries: each value checked before the first run starts, and what Optuna needs."""

import hashlib
import logging
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from photon import DISTRIBUTION
from photon.commands.hydra_line import in_one_line, key_of
from photon.commands.jobs import Plan
from photon.config.compose import compose
from photon.config.explain import explain_hydra_error
from photon.config.folders import conf_dir
from photon.errors import PhotonError
from photon.preflight import preflight

#: Characters of the names of all swept values up to which a run's folder is named after them.
_LONGEST_NAME = 200
_OPTUNA = "hydra/sweeper=optuna"
#: What says how a sweep works, and nothing of what it trains.
_HOW = ("hydra/launcher", "hydra.launcher.", "hydra.sweep.dir", "hydra.sweeper.n_trials")
_REFUSED = {
    "run_dir": "each run of a sweep has a folder of its own; set hydra.sweep.dir, below which they lie",
    "hydra.sweep.subdir": "runs lie directly in hydra.sweep.dir, each named after its values; leave it out",
    "hydra.sweeper.params": "give each key its values as an override, as in 'seed=range(0,8)'",
    "hydra.sweeper.search_space": "give each key its values as an override, as in 'seed=range(0,8)'",
    "hydra.sweeper.direction": "the best run is the one with the smallest figure, or with --maximize the "
    "largest; leave it out",
}


class Search(NamedTuple):
    """What a sweep tries: its plan, the overrides to add for Hydra, and the folder."""

    plan: Plan
    settings: list[str]
    folder: str


def read_search(overrides: Sequence[str], metric: str, *, maximize: bool) -> Search:
    """Read what a sweep tries, and compose each value once, the other keys at their first value.

    Raises
    ------
    PhotonError
        For the first value that the configuration does not take, a search that the sweeper cannot do, or a
        sweeper that is not installed.
    """
    for override in overrides:
        for key, why in _REFUSED.items():
            if key_of(override) == key or key_of(override).startswith(f"{key}."):
                raise PhotonError(f"{key_of(override)}: {why}")
    if _OPTUNA in overrides and find_spec("optuna") is None:
        raise PhotonError(f"{_OPTUNA}: needs Optuna; run: pip install '{DISTRIBUTION}[sweep]'")
    choices, swept = _choices(overrides)
    first = [values[0] for values in choices]
    sweep = _hydra_settings(first)
    is_grid = sweep["sweeper"]["_target_"].endswith("BasicSweeper")
    for override in (one for one in overrides if "interval(" in one and key_of(one) in swept and is_grid):
        raise PhotonError(
            f"{override}: an interval has no values to go through; list them, or let Optuna choose with "
            f"{_OPTUNA} (pip install '{DISTRIBUTION}[sweep]')"
        )
    settings = [] if is_grid else _optuna_settings(overrides, sweep["sweeper"], swept, maximize=maximize)
    configuration = _check(choices)
    fixed = [key_of(one) for one in overrides if key_of(one) not in swept]
    # Folders are named after what differs; everything else stands in config.yaml.
    settings.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]")
    named = [max(map(len, values)) for values in choices if key_of(values[0]) in swept]
    if sum(named) + len(named) > _LONGEST_NAME or any("/" in one for values in choices for one in values[1:]):
        settings.append("hydra.sweep.subdir=${hydra.job.num}")
    what = [one for one in overrides if not key_of(one).startswith(_HOW)]
    return Search(Plan(what, swept, metric, maximize, configuration), settings, sweep["dir"])


def _choices(overrides: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return for each override those that stand for its values, and the keys that have several.

    Of an interval, and of a range that is searched, both ends stand for all.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    choices, swept = [], []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text in overrides:
            try:
                (override,) = parser.parse_overrides([text])
                if override.is_sweep_override():
                    key = text.partition("=")[0]
                    choices.append([f"{key}={value}" for value in _values(override, _OPTUNA in overrides)])
                    swept.append(key_of(text))
                else:
                    choices.append([text])
            except HydraException as error:
                raise PhotonError(f"{text}: {explain_hydra_error(error).removeprefix('config: ')}") from error
            if not choices[-1]:
                raise PhotonError(f"{text}: gives no value at all")
    return choices, swept


def _values(override: Any, is_searched: bool) -> list[str]:
    value = override.value()
    if override.is_interval_sweep():
        return [str(value.start), str(value.end)]
    if override.is_range_sweep() and is_searched:
        return [str(value.start), str(value.stop)]
    return list(override.sweep_string_iterator())


def _hydra_settings(overrides: Sequence[str]) -> Any:
    """Return the folder of a sweep and the settings of its sweeper."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    of_hydra = [one for one in overrides if key_of(one).startswith(("hydra.", "hydra/"))]
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra_compose("config", overrides=of_hydra, return_hydra_config=True)
        sweeper = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
        return {"dir": str(config.hydra.sweep.dir), "sweeper": sweeper}
    except (HydraException, OmegaConfBaseException) as error:
        raise PhotonError(explain_hydra_error(error)) from error


def _optuna_settings(
    overrides: Sequence[str], sweeper: dict[str, Any], swept: Sequence[str], *, maximize: bool
) -> list[str]:
    """Return what Optuna is told beside what the user has said."""
    if not swept:
        raise PhotonError(
            f"{_OPTUNA}: no key has more than one value; give some, as in 'optimizer.lr=interval(1e-4,1e-2)'"
        )
    import optuna

    # How runs ended is told by them, and by the ranking.
    optuna.logging.disable_default_handler()
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
    if (storage := sweeper.get("storage")) is not None:
        _check_storage(storage)
    settings = [f"hydra.sweeper.direction={'maximize' if maximize else 'minimize'}"]
    given = [key_of(one) for one in overrides]
    if "hydra.sweeper.max_failure_rate" not in given:
        # A run that fails is a result, too.
        settings.append("hydra.sweeper.max_failure_rate=1.0")
    sampler = sweeper.get("sampler") or {}
    if "seed" in sampler and sampler["seed"] is None:
        # The same draws again when the sweep goes on.
        settings.append("hydra.sweeper.sampler.seed=0")
    return settings


def _check_storage(storage: Any) -> None:
    """Check that Optuna can keep a study where it is told to."""
    import optuna

    try:
        with TemporaryDirectory() as folder:
            # A file that is made to try it would be left behind.
            is_file = str(storage).startswith("sqlite")
            optuna.storages.get_storage(f"sqlite:///{folder}/study.db" if is_file else storage)
    except Exception as error:
        versions = " and ".join(f"{name} {version(name)}" for name in ("optuna", "SQLAlchemy"))
        raise PhotonError(
            f"hydra.sweeper.storage={storage}: {versions} cannot work with it here "
            f"({in_one_line(error).removesuffix(': AssertionError')}); leave it out: a sweep that is started "
            "again in its folder goes on without"
        ) from error


def _check(choices: Sequence[Sequence[str]]) -> str:
    """Check every value, and return a hash of what they compose to."""
    from photon.data.source import check_path
    from photon.federation.run_tasks import check_tasks

    first = [values[0] for values in choices]
    checked: set[str] = set()
    digest = hashlib.sha256()

    def check(chosen: list[str]) -> None:
        config = preflight(compose(chosen))
        digest.update(config.text.encode())
        has_text = config.federation.engine != "deployment"
        # Text and task files are read once for all runs that name them alike.
        if (data := f"{has_text} {config.data.path}") not in checked:
            check_path(config.data, has_text=has_text)
            checked.add(data)
        if (tasks := config.evaluation.model_dump_json()) not in checked:
            check_tasks(config)
            checked.add(tasks)

    check(first)
    for place, values in enumerate(choices):
        for value in values[1:]:
            check([*first[:place], value, *first[place + 1 :]])
    return digest.hexdigest()
