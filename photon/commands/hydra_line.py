"""Hydra's command line, as far as ``photon train`` takes it: overrides, ``-m``, and what prints and stops."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import typer
import typer.core
from click import Context, HelpFormatter

from photon.components import nearest
from photon.config.compose import compose
from photon.config.explain import explain_hydra_error, first_line, group_options
from photon.config.folders import conf_dir
from photon.errors import PhotonError

_LONG = {
    "-c": "--cfg",
    "-cd": "--config-dir",
    "-cn": "--config-name",
    "-cp": "--config-path",
    "-i": "--info",
    "-m": "--multirun",
    "-p": "--package",
    "-r": "--run",
    "-sc": "--shell-completion",
}
#: What Hydra prints in place of running, and of what.
_PRINTS = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--hydra-help": (),
}
_ONE_CONFIGURATION = (
    "there is one configuration, conf/config.yaml, whose groups overrides choose; "
    "start from the file of an earlier run with --config FILE"
)
_REFUSED = {
    "--config-dir": _ONE_CONFIGURATION,
    "--config-name": _ONE_CONFIGURATION,
    "--config-path": _ONE_CONFIGURATION,
    "--experimental-rerun": "go on with `photon resume RUN_DIR`, or train the same again with "
    "`photon train --config RUN_DIR/config.yaml`",
    "--run": "to run is what `photon train` does; leave it out",
    "--shell-completion": "`photon --install-completion` installs it",
}


class Line(NamedTuple):
    """What stands on a command line of Hydra's: overrides, whether they are a sweep, and what to print."""

    overrides: list[str]
    multirun: bool
    prints: list[str]


def read_line(arguments: Sequence[str]) -> Line:
    """Read a command line.

    Raises
    ------
    PhotonError
        For an option that means nothing here, or a value that it does not take.
    """
    overrides: list[str] = []
    prints: list[str] = []
    details: list[str] = []
    multirun = False
    left = list(arguments)
    while left:
        given = left.pop(0)
        name, equals, value = given.partition("=")
        name = _LONG.get(name, name)
        if not name.startswith("-"):
            overrides.append(given)
        elif name == "--multirun":
            multirun = True
        elif name in _REFUSED:
            raise PhotonError(f"{name}: {_REFUSED[name]}")
        elif name in _PRINTS:
            if not equals and _PRINTS[name]:
                # Hydra prints all where --info says nothing of what.
                value = left.pop(0) if left and left[0] in _PRINTS[name] else _unsaid(name, left)
            prints = [name, *([_known(name, value)] if _PRINTS[name] else [])]
        elif name == "--package":
            details += [name, value if equals else left.pop(0) if left else ""]
        elif name == "--resolve":
            details.append(name)
        else:
            options = (*_PRINTS, "--multirun", "--config", "--show", "--metric", "--maximize", "--resolve")
            near = nearest(name, options)
            raise PhotonError(
                f"{given}: no such option{near}; overrides look like key=value, see `photon train --help`"
            )
    if details and prints[:1] != ["--cfg"]:
        raise PhotonError(f"{details[0]}: says what `--cfg` prints; add --cfg job")
    if prints and multirun:
        raise PhotonError(f"{prints[0]}: prints one configuration; leave out -m, and give each key one value")
    return Line(overrides, multirun, [*prints, *details])


def _unsaid(name: str, left: Sequence[str]) -> str:
    if name == "--info":
        return "all"
    return left[0] if left and "=" not in left[0] else ""


def _known(name: str, value: str) -> str:
    if value in _PRINTS[name]:
        return value
    given = f"{name} {value}".rstrip()
    raise PhotonError(f"{given}: expected {' or '.join(_PRINTS[name])}{nearest(value, _PRINTS[name])}")


def print_and_stop(line: Line) -> None:
    """Let Hydra print what a line asks for; what is wrong with its overrides is told as for a run."""
    compose(line.overrides)
    call_hydra([*line.prints, *line.overrides], _nothing)


def _nothing(_: Any) -> None:
    """Run nothing: what Hydra was asked for is printed before."""


def call_hydra(arguments: Sequence[str], task: Callable[[Any], Any]) -> None:
    """Give a command line to Hydra.

    Raises
    ------
    PhotonError
        For what Hydra does not take, in one line.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["photon train", *arguments]
    # Else Hydra prints what happens and ends the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise PhotonError(explain_hydra_error(error)) from error
    except SystemExit as end:
        if end.code not in (0, None):
            raise PhotonError(f"Hydra refused {' '.join(arguments)}") from None
    finally:
        sys.argv = before[0]
        if before[1] is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


class HelpsWithGroups(typer.core.TyperCommand):
    """A command whose help ends with the groups of ``conf/`` and their options, as Hydra's own does."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the help."""
        super().format_help(ctx, formatter)
        typer.echo("Groups of the configuration, chosen as in strategy=diloco:\n")
        for folder in sorted(path for path in conf_dir().iterdir() if path.is_dir()):
            typer.echo(f"  {folder.name}: {', '.join(group_options(folder.name))}")
        typer.echo(
            "\nAny key can be set, as in optimizer.lr=1e-3; `photon train --cfg job` prints them all.\n"
        )


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def in_one_line(error: Exception) -> str:
    """Return what an error of a library says, in one line that begins with its type."""
    return f"{type(error).__name__}: {first_line(error)}"
