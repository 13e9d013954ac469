"""The folder of an aggregator or a silo: written once, completed after a crash, one program at a time."""

import contextlib
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel, ValidationError

from photon.engine.processes import flower_settings
from photon.errors import PhotonError, printable
from photon.files.atomic import name_beside, remove_leftovers, sync_files, write_bytes
from photon.files.owner import take
from photon.files.processes import is_gone

#: What runs here: a lock for as long as it does, and in it the process and when that began.
RUNNING = ".running"
ENVIRONMENT = "flower.env"
#: What the operator of each side has decided; by it a folder is known.
AGGREGATOR_FILE, SILO_FILE = "aggregator.json", "silo.json"
#: What a path may hold, since it goes into files of the shell, systemd and nginx, and into a node config.
_PLAIN = re.compile(r"[\w/.+@=,:~ -]+")

_Settings = TypeVar("_Settings", bound=BaseModel)


class Place:
    """A folder that `init` writes, file by file, and never writes over.

    Parameters
    ----------
    folder
        The folder; made for this user alone where it is missing.

    Attributes
    ----------
    wrote, kept
        Names of what was written now, and of what was there already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrote: list[str] = []
        self.kept: list[str] = []
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PhotonError(f"{printable(folder)}: cannot be a folder ({error.strerror})") from None
        remove_leftovers(folder)

    def file(self, name: str, text: str, *, mode: int = 0o600) -> None:
        """Write a file, unless there is one."""
        path = self.folder / name
        if self._is_there(name):
            return
        try:
            remove_leftovers(path.parent)
            write_bytes(path, text.encode(), mode=mode)
        except OSError as error:
            raise PhotonError(f"{path}: cannot be written ({error.strerror})") from None
        self.wrote.append(name)

    def directory(self, name: str, make: Callable[[Path], object]) -> None:
        """Let ``make`` write a folder, unless there is one: all of it or nothing, so keys stay pairs."""
        if self._is_there(name):
            return
        beside = name_beside(self.folder / name)
        make(beside)
        sync_files(beside)
        try:
            os.rename(beside, self.folder / name)
        except OSError as error:
            raise PhotonError(f"{self.folder / name}: cannot be written ({error.strerror})") from None
        self.wrote.append(name)

    def empty(self, name: str) -> None:
        """Make an empty folder, unless there is one."""
        try:
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise PhotonError(f"{self.folder / name}: cannot be a folder ({error.strerror})") from None

    def report(self) -> str:
        """Return what was done, in a line."""
        if not self.wrote:
            return f"{self.folder}: all is there already; nothing was changed"
        kept = f"; kept {', '.join(self.kept)}" if self.kept else ""
        return f"{self.folder}: wrote {', '.join(self.wrote)}{kept}"

    def _is_there(self, name: str) -> bool:
        there = os.path.lexists(self.folder / name)
        if there:
            self.kept.append(name)
        return there


def place_of(folder: Path, other: str) -> Path:
    """Return the absolute path of a folder that can be written into the files of other programs.

    Parameters
    ----------
    other
        File that tells that the folder belongs to the other side.

    Raises
    ------
    PhotonError
        If it cannot, or the folder is one of the other side.
    """
    folder = folder.expanduser().absolute()
    if not _PLAIN.fullmatch(str(folder)):
        raise PhotonError(
            f"{printable(folder)}: the path goes into files of other programs; choose a folder whose path "
            "has letters, digits, spaces and / . + @ = , : ~ _ - alone"
        )
    if (folder / other).exists():
        raise PhotonError(
            f"{folder}: {other} is there already; aggregator and silo need folders of their own"
        )
    return folder


def read_settings_file(folder: Path, name: str, kind: type[_Settings], init: str) -> _Settings:
    """Read what `init` noted in a folder.

    Raises
    ------
    PhotonError
        If there is nothing, or it was damaged.
    """
    file = folder / name
    try:
        return kind.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise PhotonError(f"{printable(folder)}: {name} is not there; begin with `{init}`") from None
    except OSError as error:
        raise PhotonError(f"{printable(file)}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PhotonError(f"{file}: {where}: {first['msg']}; mend it by hand") from None


def check_as_noted(folder: Path, options: Iterable[tuple[str, Any, Any]], mend: str) -> None:
    """Check that what is given is what `init` noted.

    Parameters
    ----------
    options
        Of each option its name, what is given (None: nothing), and what was noted.
    mend
        What to do if it is not.

    Raises
    ------
    PhotonError
        If it is not.
    """
    for option, given, noted in options:
        if given is not None and given != noted:
            shown = str(noted) if isinstance(noted, Path) else noted
            raise PhotonError(f"{folder}: {option} was {shown!r} when it was made{mend}")


def is_loopback(host: str) -> bool:
    """Tell whether a host is this very machine, reached from itself alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def environment_of(folder: Path, home: Path | None = None) -> dict[str, str]:
    """Return what the programs of a folder have in their environment.

    Parameters
    ----------
    home
        Folder for what an aggregator's runs share; None: a silo's, which has none.
    """
    own = {} if home is None else {"PHOTON_HOME": str(home)}
    return flower_settings(folder / "flower") | own


def environment_file(settings: Mapping[str, str]) -> str:
    """Return the text of a file that shells and systemd read alike."""
    head = "# For terminals: set -a; . ./flower.env; set +a    For systemd: EnvironmentFile=\n"
    return head + "".join(f'{name}="{value}"\n' for name, value in settings.items())


def unit(
    description: str, folder: Path, command: Iterable[str], *, after: str = "network-online.target"
) -> str:
    """Return a systemd unit that keeps a command running in a folder, as the user who wrote it.

    Parameters
    ----------
    after
        What is to run before.
    """
    words = " ".join(f'"{word}"' if " " in word else word for word in command)
    account = _user_name()
    at_home = any(
        place.is_relative_to(base) for place in (folder, Path(sys.prefix)) for base in ("/home", "/root")
    )
    return f"""\
[Unit]
Description={description}
After={after}
Wants={after}

[Service]
User={account}
WorkingDirectory={folder}
EnvironmentFile={folder / ENVIRONMENT}
ExecStart={words}
Restart=always
RestartSec=5
# Bad input does not mend itself.
RestartPreventExitStatus=2
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectHome={"no" if at_home else "yes"}
ProtectSystem=strict
ReadWritePaths="{folder}"

[Install]
WantedBy=multi-user.target
"""


def _user_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def refuse_second(folder: Path, what: str) -> None:
    """Raise the error of `claim` at once if another process runs here, and touch nothing."""
    if (process := running(folder)) is not None:
        raise _running_already(folder, what, process)


def claim(folder: Path, what: str) -> int:
    """Note that this process runs here, until it ends; what it becomes by exec keeps the claim.

    Returns
    -------
    int
        Descriptor of the lock.

    Raises
    ------
    PhotonError
        If another process does.
    """
    try:
        lock = os.open(folder / RUNNING, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise PhotonError(f"{folder / RUNNING}: cannot be written ({error.strerror})") from None
    if not take(lock, 0.5):
        process = running(folder)
        os.close(lock)
        raise _running_already(folder, what, process)
    own = psutil.Process()
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{own.pid} {own.create_time()}\n".encode(), 0)
    os.set_inheritable(lock, True)
    return lock


def _running_already(folder: Path, what: str, process: psutil.Process | None) -> PhotonError:
    as_what = f" as process {process.pid}" if process else ""
    return PhotonError(f"{folder}: {what} is running already{as_what}; stop that first")


def running(folder: Path) -> psutil.Process | None:
    """Return the process that has claimed a folder and still runs; another one with its number is none."""
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        pid, began = (folder / RUNNING).read_text().split()
        process = psutil.Process(int(pid))
        if process.create_time() == float(began) and not is_gone(process):
            return process
    return None
