"""``scripts/federation.sh``: bring a federation on this machine up, look at it, take it down.

Every command of Flower that is run is printed, so that the same can be done by hand.
"""

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from photon.config.compose import compose
from photon.config.folders import photon_home
from photon.data.prepared import PreparedData, is_prepared
from photon.data.separate import separate_silo
from photon.deployment.local import CONNECTION, LocalFederation, Program
from photon.deployment.superlink import say_command
from photon.engine.executor import executor_of
from photon.engine.processes import flower_settings, stop_tree
from photon.errors import PhotonError, RunError
from photon.flower_compat import parse_node_config
from photon.telemetry.summary import counted

ONLINE_SECONDS = 120.0


def up(
    folder: Path,
    *,
    silos: str,
    data: Path | None,
    secure: bool,
    gateways: Sequence[Path] = (),
    node_config: str = "",
) -> None:
    """Start a SuperLink, a SuperExec and a SuperNode per silo, each under a supervisor.

    Parameters
    ----------
    folder
        Where the federation lies; one that was taken down goes on with its keys, data and silos' state.
    silos
        How many of the data's silos, or their names with commas between.
    data
        Prepared data; None: the embedded corpus. Each silo is given a folder with its own part.
    secure
        Whether to use TLS and node keys.
    gateways
        YAML files of federations that take part as silos do.
    node_config
        What the node configs of the silos with data say beside their folders.

    Raises
    ------
    PhotonError
        If a federation is running in ``folder`` already, there are no such silos, or a gateway's file is
        wrong.
    RunError
        If it does not come up.
    """
    # Here, because they import torch: to look at a federation, or to take it down, should not take seconds.
    from photon.silo.site import read_settings
    from photon.subfederation.gateway import read_gateway

    if _running(folder):
        raise PhotonError(f"{folder}: a federation is running there; stop it with federation.sh down")
    source = PreparedData.open(data or _embedded())
    federations = {read_gateway(file).name: file.absolute() for file in gateways}
    read_settings(parse_node_config(node_config))
    federation = LocalFederation.create(
        folder,
        _choose(silos, source),
        secure=secure,
        gateways=federations,
        node_config=node_config,
    )
    # The aggregator has no text; it needs the tokenizer to export a model that others can use.
    tokenizer = folder / "aggregator" / "tokenizer"
    shutil.copytree(source.tokenizer_path, tokenizer, dirs_exist_ok=True)
    for silo in set(federation.silos) - set(federations):
        own = federation.silo_folder(silo) / "data"
        if not is_prepared(own):
            separate_silo(source, silo, own)
    _say_settings(federation)
    try:
        _start_all(federation)
    except BaseException:
        down(folder)
        raise
    print(f"\n{counted(len(federation.silos), 'silo')} online. Train from the folder of the checkout:\n")
    print(f"export FLWR_HOME={shlex.quote(str(federation.home))}")
    run_dir = federation.folder / "runs" / "first"
    overrides = " ".join(_overrides(federation, run_dir))
    print(f"flwr run . {CONNECTION} --stream --run-config \"overrides='{overrides}'\"")
    print(f"\nLook at it from another terminal with photon watch {run_dir}, or do both at once:\n")
    print(f"photon train {overrides}")


def status(folder: Path) -> bool:
    """Print which programs run and how many nodes are online; return whether all is well."""
    federation = LocalFederation.open(folder)
    well = True
    running = dict(_running(folder))
    for program in federation.programs():
        process = running.get(program.name)
        children = process.children() if process else []
        state = f"running, pid {children[0].pid}" if children else "starting" if process else "stopped"
        # Without one, a SuperNode is online all the same, and answers nothing.
        lacks = (
            bool(process and children) and program.name in federation.silos and executor_of(process) is None
        )
        print(f"{program.name:<12} {'without a SuperExec' if lacks else state:<24} {program.log}")
        well = well and bool(children) and not lacks
    if well:
        online = federation.nodes_online()
        print(f"{online} of {len(federation.silos)} nodes online at {federation.address}")
        well = online == len(federation.silos)
    return well


def down(folder: Path) -> None:
    """Stop what ``up`` started and nothing else: silos first, then the rest."""
    stopped = 0
    for name, process in reversed(_running(folder)):
        stop_tree(process, at_once=False, patience=15.0)
        _pid_file(folder, name).unlink(missing_ok=True)
        stopped += 1
    print(f"stopped {stopped} programs" if stopped else "nothing was running")


def _start_all(federation: LocalFederation) -> None:
    superlink = federation.superlink()
    process = _start(federation, superlink)
    federation.wait_until_up(process)
    _start(federation, federation.superexec())
    for silo in federation.silos:
        if federation.secure:
            say_command(federation.home, ["flwr", *federation.registration(silo)])
            federation.register(silo)
        _start(federation, federation.supernode(silo))
    end = time.monotonic() + ONLINE_SECONDS
    while (online := federation.nodes_online()) < len(federation.silos):
        if time.monotonic() > end:
            raise RunError(
                f"{online} of {len(federation.silos)} nodes came online; see {superlink.log.parent}"
            )
        time.sleep(1.0)


def _start(federation: LocalFederation, program: Program) -> subprocess.Popen[bytes]:
    say_command(program.home, program.command)
    process = program.start(supervised=True, outlives=True)
    file = _pid_file(federation.folder, program.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A pid alone may belong to another process one day.
    file.write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}\n")
    return process


def _running(folder: Path) -> list[tuple[str, psutil.Process]]:
    """Return the supervisors that still run, in the order of the federation's programs."""
    if not (folder / "federation.json").exists():
        return []
    running = []
    for program in LocalFederation.open(folder).programs():
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            pid, created = _pid_file(folder, program.name).read_text().split()
            process = psutil.Process(int(pid))
            if process.create_time() == float(created) and process.status() != psutil.STATUS_ZOMBIE:
                running.append((program.name, process))
    return running


def _pid_file(folder: Path, name: str) -> Path:
    return folder / "pids" / name


def _embedded() -> Path:
    from photon.data.embedded import ensure_embedded

    config = compose()
    return ensure_embedded(
        photon_home(), sequence_length=config.model.sequence_length, vocab_size=config.data.vocab_size
    )


def _overrides(federation: LocalFederation, run_dir: Path) -> list[str]:
    """Return what to train the federation with."""
    count = len(federation.silos)
    default = compose(["federation=deployment"]).cohort
    return [
        "federation=deployment",
        f"federation.silos={count}",
        # So few that the default cohort is too many all train.
        *(["cohort=null"] if default is not None and count < default else []),
        "data=prepared",
        f"data.path={federation.folder / 'aggregator'}",
        f"run_dir={run_dir}",
    ]


def _choose(silos: str, data: PreparedData) -> list[str]:
    if silos.isdigit():
        names = data.silo_names[: int(silos)]
        if not names or int(silos) > len(data.silo_names):
            raise PhotonError(f"--silos {silos}: {data.path} has {len(data.silo_names)} silos")
        return names
    names = [name for name in silos.split(",") if name] or data.silo_names
    for name in names:
        if name not in data.silo_names:
            raise PhotonError(f"--silos: {data.path} has no silo {name!r}: {', '.join(data.silo_names)}")
    return names


def _say_settings(federation: LocalFederation) -> None:
    settings = flower_settings(federation.home)
    del settings["FLWR_HOME"]
    print("export " + " ".join(f"{name}={value}" for name, value in settings.items()))


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="federation.sh", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in ("up", "status", "down")}
    for one in parsers.values():
        one.add_argument("--folder", type=Path, default=photon_home() / "federation")
    parsers["up"].add_argument("--silos", default="")
    parsers["up"].add_argument("--data", type=Path)
    parsers["up"].add_argument("--gateway", type=Path, action="append", default=[], metavar="FILE")
    parsers["up"].add_argument("--node-config", default="", metavar="SETTINGS")
    parsers["up"].add_argument("--insecure", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    try:
        if arguments.command == "up":
            up(
                folder,
                silos=arguments.silos,
                data=arguments.data,
                secure=not arguments.insecure,
                gateways=arguments.gateway,
                node_config=arguments.node_config,
            )
        elif arguments.command == "down":
            down(folder)
        elif not status(folder):
            sys.exit(1)
    except (PhotonError, RunError) as error:
        print(f"photon: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, PhotonError) else 1)


if __name__ == "__main__":
    main()
