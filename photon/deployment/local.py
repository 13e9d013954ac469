"""A federation of real processes on one machine: what an aggregator and its silos start, side by side.

::

    DIR/federation.json      what it consists of (class LocalFederation)
    DIR/aggregator/          keys/ (authority, certificate), flower/ (connections, apps), superlink.db
    DIR/silos/NAME/          keys/ (its key pair), data/, state/, flower/ of one silo
    DIR/logs/ DIR/pids/      one file per program
"""

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from photon.deployment.keys import make_authority, make_node_key, make_server_certificate
from photon.deployment.superlink import nodes_of, register, registration, superexec_command, superlink_command
from photon.engine.deployment import Connection
from photon.engine.processes import (
    START_SECONDS,
    dying_with_us,
    flower_environment,
    free_port,
    is_healthy,
)
from photon.errors import PhotonError, RunError
from photon.files.atomic import write_bytes, write_text

CONNECTION = "federation"
HOST = "127.0.0.1"
SUPERLINK, SUPEREXEC = "superlink", "superexec"


@dataclass(frozen=True)
class Program:
    """One program of the federation.

    Attributes
    ----------
    name
        ``superlink``, ``superexec`` or the silo's name: also of its log and pid file.
    command
        The program and its arguments.
    folder
        Where it works.
    home
        Its ``FLWR_HOME``.
    log
        Where its output goes.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    home: Path
    log: Path

    def start(self, *, supervised: bool, outlives: bool = False) -> subprocess.Popen[bytes]:
        """Start the program.

        Parameters
        ----------
        supervised
            Have it started again whenever it ends.
        outlives
            Let it go on when this process has ended; otherwise it ends with this process.
        """
        for folder in (self.folder, self.home, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        supervisor = [sys.executable, "-m", "photon.deployment.supervise", "--log", str(self.log)]
        before = [*([] if outlives else dying_with_us()), *(supervisor if supervised else [])]
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*before, *self.command],
                cwd=self.folder,
                env=flower_environment(self.home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class LocalFederation(BaseModel):
    """An aggregator and silos, each with files and ports of its own, on this machine.

    Attributes
    ----------
    folder
        Where everything lies.
    port
        The SuperLink's.
    silos
        The port of each silo's SuperNode, by the silo's name.
    secure
        Whether they speak TLS and nodes show a registered key.
    gateways
        The YAML file of each silo that is a federation behind a SuperLink of its own.
    node_config
        What the other silos' node configs say beside their folders.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    port: int
    silos: dict[str, int]
    secure: bool
    gateways: dict[str, Path] = {}
    node_config: str = ""

    @classmethod
    def create(
        cls,
        folder: Path,
        silos: list[str],
        *,
        secure: bool,
        gateways: Mapping[str, Path] | None = None,
        node_config: str = "",
    ) -> "LocalFederation":
        """Choose ports, make keys where they are missing, and note all that in ``folder``."""
        folder = folder.absolute()
        names = [*silos, *(gateways or {})]
        ports = _free_ports(1 + len(names))
        made = cls(
            folder=folder,
            port=ports[0],
            silos=dict(zip(names, ports[1:], strict=True)),
            secure=secure,
            gateways=dict(gateways or {}),
            node_config=node_config,
        )
        if secure:
            made._make_keys()
        write_text(folder / "federation.json", made.model_dump_json(indent=1) + "\n")
        connection: dict[str, Any] = {"address": made.address}
        connection |= {"root-certificates": str(made.authority)} if secure else {"insecure": True}
        settings = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        write_text(made.home / "config.toml", tomli_w.dumps(settings))
        return made

    @classmethod
    def open(cls, folder: Path) -> "LocalFederation":
        """Read what :meth:`create` noted.

        Raises
        ------
        PhotonError
            If there is none in ``folder``.
        """
        file = folder.absolute() / "federation.json"
        try:
            return cls.model_validate_json(file.read_text())
        except FileNotFoundError:
            raise PhotonError(f"{folder}: holds no federation; start one with federation.sh up") from None
        except ValidationError as error:
            raise PhotonError(f"{file}: damaged ({error.errors()[0]['msg']}); remove the folder") from None

    @property
    def address(self) -> str:
        """Return the SuperLink's ``host:port``."""
        return f"{HOST}:{self.port}"

    @property
    def home(self) -> Path:
        """Return the aggregator's ``FLWR_HOME``, which knows the connection."""
        return self.folder / "aggregator" / "flower"

    @property
    def keys(self) -> Path:
        """Return the folder of the aggregator's keys."""
        return self.folder / "aggregator" / "keys"

    @property
    def authority(self) -> Path | None:
        """Return the certificate that silos check the aggregator by; None without TLS."""
        return self.keys / "authority.crt" if self.secure else None

    @property
    def connection(self) -> Connection:
        """Return the SuperLink as ``flwr`` reaches it."""
        return Connection(CONNECTION, flower_environment(self.home))

    def silo_folder(self, silo: str) -> Path:
        """Return where a silo's data, state and Flower's files lie."""
        return self.folder / "silos" / silo

    def node_key(self, silo: str) -> Path:
        """Return a silo's private key; the public one ends in ``.pub``."""
        return self.silo_folder(silo) / "keys" / silo

    def superlink(self) -> Program:
        """Return the aggregator's SuperLink, whose database survives it."""
        database = self.folder / "aggregator" / "superlink.db"
        return self._program(
            SUPERLINK, *superlink_command(HOST, self.port, database, self.keys if self.secure else None)
        )

    def superexec(self) -> Program:
        """Return what starts ServerApps: a process of its own, so that runs outlive a SuperLink."""
        return self._program(SUPEREXEC, *superexec_command(self.address, self.keys if self.secure else None))

    def supernode(self, silo: str) -> Program:
        """Return a silo's SuperNode, which runs this very Photon and nothing that a run brings."""
        own = self.silo_folder(silo)
        if silo in self.gateways:
            what = f'federation="{self.gateways[silo]}"'
        else:
            what = f'{self.node_config} data-dir="{own / "data"}"'.strip()
        node_config = f'{what} state-dir="{own / "state"}"'
        key = ["--auth-supernode-private-key", str(self.node_key(silo))] if self.secure else []
        return self._program(
            silo,
            *("photon", "silo", "run", "--superlink", self.address, *self._trust(), *key),
            *("--host", HOST, "--port", str(self.silos[silo]), "--node-config", node_config),
        )

    def programs(self) -> Iterator[Program]:
        """Yield all programs in the order in which they start."""
        yield self.superlink()
        yield self.superexec()
        yield from map(self.supernode, self.silos)

    def registration(self, silo: str) -> list[str]:
        """Return the ``flwr`` command that registers a silo's public key."""
        return registration(f"{self.node_key(silo)}.pub", CONNECTION, silo)

    def register(self, silo: str) -> None:
        """Register a silo's public key with the SuperLink, unless it knows it already.

        Raises
        ------
        RunError
            If the SuperLink does not take it.
        """
        register(self.connection, self.registration(silo))

    def wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the SuperLink answers.

        Raises
        ------
        RunError
            If ``process``, which started it, ends, or it does not answer in time.
        """
        log = self.superlink().log
        end = time.monotonic() + START_SECONDS
        while not is_healthy(self.address, self.authority):
            if process.poll() is not None or time.monotonic() > end:
                raise RunError(f"the SuperLink did not come up; see {log}")
            time.sleep(0.2)

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the SuperLink knows of the nodes: ``node-id``, ``status`` and more."""
        return nodes_of(self.connection)

    def nodes_online(self) -> int:
        """Count the nodes that the SuperLink takes for online."""
        return sum(node["status"] == "online" for node in self.nodes())

    def _trust(self) -> list[str]:
        return ["--root-certificates", str(self.authority)] if self.secure else ["--insecure"]

    def _program(self, name: str, *command: str) -> Program:
        folder = self.folder / "aggregator" if name in (SUPERLINK, SUPEREXEC) else self.silo_folder(name)
        return Program(name, command, folder, folder / "flower", self.folder / "logs" / f"{name}.log")

    def _make_keys(self) -> None:
        if not (self.keys / "authority.crt").exists():
            make_authority(self.keys)
        if not (self.keys / "server.crt").exists():
            make_server_certificate(self.keys, ["localhost", HOST])
        if not (self.keys / "superexec").exists():
            write_bytes(self.keys / "superexec", secrets.token_bytes(32), mode=0o600)
        for silo in self.silos:
            if not self.node_key(silo).exists():
                make_node_key(self.node_key(silo).parent, silo)


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)
