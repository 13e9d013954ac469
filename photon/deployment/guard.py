"""A SuperNode that runs only code that its silo has approved.

Flower's SuperNode starts ``flower-superexec``, and that one a program per message, ``flwr-clientapp``, which
unpacks and runs whatever came. Here both look for their programs in a folder of the silo's own and nowhere
else. There they find this module for every kind of task: it runs nothing but what `ApprovedCode` says.
"""

import importlib
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from photon import code
from photon.deployment.approved import ApprovedCode, Started, approval, now
from photon.deployment.bundle import Bundle, digest
from photon.engine.app_folder import app_folder
from photon.engine.processes import POLL_VARIABLE, TASK_POLL_SECONDS
from photon.errors import PhotonError
from photon.files.atomic import write_bytes
from photon.flower_compat import TASK_PROGRAMS, answer_task, build_bundle

_STATE, _PATH = "PHOTON_SILO_STATE", "PHOTON_SILO_PATH"


def own_bundle(approved: ApprovedCode) -> Bundle:
    """Return the bundle that the installed Photon makes of itself."""
    approved.make()
    # A service may have no other folder to write to.
    with app_folder(approved.folder) as app:
        return Bundle.read(build_bundle(app))


def become_supernode(arguments: list[str], node_config: str, state: Path) -> NoReturn:
    """Let this process become a SuperNode that runs only approved code.

    Parameters
    ----------
    arguments
        Of ``flower-supernode``, without the node config.
    node_config
        The node config.
    state
        The node's state folder.

    Raises
    ------
    PhotonError
        If an argument would lead around the approval, or the state folder cannot be used.
    """
    # Options may be shortened.
    for option, why in (("--is", "another SuperExec"), ("--allow-r", "packages that the bundle asks for")):
        if any(argument.startswith(option) for argument in arguments):
            raise PhotonError(f"photon silo run: {option}… would let {why} run unseen; leave it out")
    approved = ApprovedCode(state)
    own = approval(own_bundle(approved))
    approved.note_start(Started(date=now(), arguments=arguments, node_config=node_config, own=own))
    programs = _programs(approved.folder / "bin")
    environment = code.environment() | {
        POLL_VARIABLE: os.environ.get(POLL_VARIABLE, TASK_POLL_SECONDS),
        "PATH": str(programs),
        _PATH: _path(),
        _STATE: str(approved.state),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    supernode = _find("flower-supernode")
    # It is started again when its SuperExec has ended, which it would not notice.
    supervised = [*code.command("photon.deployment.supervise"), "--until-it-ends", supernode]
    os.execve(supervised[0], [*supervised, *arguments, "--node-config", node_config], environment)


def _programs(folder: Path) -> Path:
    """Make the folder of all programs that a guarded SuperNode and its SuperExec find."""
    shutil.rmtree(folder, ignore_errors=True)
    commands = {name: [*code.command(__name__), name] for name in TASK_PROGRAMS}
    commands["flower-superexec"] = [_find("flower-superexec")]
    for name, command in commands.items():
        write_bytes(folder / name, f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'.encode(), mode=0o700)
        if not os.access(folder / name, os.X_OK):
            raise PhotonError(f"state-dir: nothing may run from {folder}; mount it without noexec")
    return folder


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def _find(program: str) -> str:
    found = shutil.which(program, path=_path())
    if found is None:
        raise PhotonError(f"{program}: not found beside {sys.executable}; reinstall photon")
    return str(Path(found).absolute())


def load(reference: str, folder: Path | None) -> Callable[..., Any]:
    """Return the object ``module:object`` of a folder; None: of what is installed.

    Raises
    ------
    PhotonError
        If the module is not in the folder.
    """
    if folder is not None:
        # What is installed may have the same name, and Python would note what it has compiled.
        own = {path.stem for path in folder.iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        importlib.invalidate_caches()
    module, _, attributes = reference.partition(":")
    found: Any = importlib.import_module(module)
    if folder is not None and not Path(found.__file__ or "").is_relative_to(folder):
        raise PhotonError(f"bundle: {reference} is not in it")
    app: Callable[..., Any] = reduce(getattr, attributes.split("."), found)
    return app


def end_when_revoked(approved: ApprovedCode, sha256: str, look_seconds: float = 2.0) -> None:
    """End this process when its application is no longer approved: one message may last for a whole run."""
    try:
        while any(one.sha256 == sha256 for one in approved.approvals()):
            time.sleep(look_seconds)
        why = "is no longer approved"
    except PhotonError as error:
        why = f"is stopped: {error}"
    sys.stderr.write(f"photon: the application with the SHA-256 {sha256} {why}\n")
    os._exit(1)


def main() -> None:
    """Do the task that a SuperExec has started this program for."""
    approved = ApprovedCode(Path(os.environ[_STATE]))
    os.environ["PATH"] = os.environ[_PATH]

    def choose(content: bytes, app: str, version: str) -> Callable[..., Any]:
        reference, folder = approved.judge(content, app, version)
        if folder is not None:
            threading.Thread(target=end_when_revoked, args=(approved, digest(content)), daemon=True).start()
        return load(reference, folder)

    # The first argument is the name that this program was found by.
    answer_task(sys.argv[2:], choose)


if __name__ == "__main__":
    main()
