"""An aggregator in a folder: ``photon aggregator``.

::

    DIR/aggregator.json     hosts, ports, proxy (class Aggregator)
    DIR/flower.env          environment of terminals and services
    DIR/flower/config.toml  the connection by which flwr and photon reach the SuperLink
    DIR/keys/               authority, server certificate, secret of the SuperExec
    DIR/nodes/              NAME.pub of each silo that was admitted, NAME.node with Flower's number of it
    DIR/photon/             PHOTON_HOME: whose name a silo's name is
    DIR/superlink.db DIR/logs/ DIR/proxy/ DIR/systemd/
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from photon.deployment import keys as key_files
from photon.deployment.lines import AggregatorLine, SiloLine, aggregator_line
from photon.deployment.local import SUPEREXEC, SUPERLINK, Program
from photon.deployment.place import (
    AGGREGATOR_FILE,
    ENVIRONMENT,
    SILO_FILE,
    Place,
    check_as_noted,
    claim,
    environment_file,
    environment_of,
    is_loopback,
    place_of,
    read_settings_file,
    unit,
)
from photon.deployment.proxy import Proxy
from photon.deployment.superlink import (
    nodes_of,
    register,
    registration,
    say_command,
    superexec_command,
    superlink_command,
)
from photon.engine.deployment import Connection
from photon.engine.processes import flower_environment, is_healthy, stop_tree, wait_until_healthy
from photon.engine.signals import heard
from photon.errors import PhotonError, RunError
from photon.federation.names import ADMITTED, Admitted
from photon.federation.names import admit as let_in
from photon.federation.names import eject as keep_out
from photon.files.atomic import write_bytes, write_text

if TYPE_CHECKING:
    from photon.deployment.doctor import Finding

CONNECTION = "aggregator"
PORT = 8000
_LOCAL = "127.0.0.1"
_LOOK_SECONDS = 0.5


class Aggregator(BaseModel):
    """What an aggregator's operator has decided.

    Attributes
    ----------
    hosts
        Names and addresses of this machine; the first is the one that silos are told.
    port
        Where silos connect.
    proxy
        Whether a proxy listens there, and the SuperLink on the next port of this machine alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hosts: list[str] = Field(min_length=1, max_length=20)
    port: int = Field(PORT, ge=1, le=65534)
    proxy: bool

    @property
    def superlink(self) -> str:
        """Return the SuperLink's ``host:port`` on this machine."""
        return f"{_LOCAL}:{self.port + self.proxy}"

    @property
    def open_to_all(self) -> bool:
        """Whether others can reach the whole of the SuperLink."""
        return not self.proxy and not all(map(is_loopback, self.hosts))


class AggregatorPlace:
    """An aggregator's folder, after ``init``.

    Parameters
    ----------
    folder
        The folder.

    Raises
    ------
    PhotonError
        If it holds no aggregator.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = place_of(folder, SILO_FILE)
        init = f"photon aggregator init {self.folder}"
        self.settings = read_settings_file(self.folder, AGGREGATOR_FILE, Aggregator, init)
        self.keys = self.folder / "keys"
        self.home = self.folder / "flower"
        self.authority = self.keys / "authority.crt"

    @property
    def photon_home(self) -> Path:
        """Return the folder of what runs share."""
        return self.folder / "photon"

    @property
    def connection(self) -> Connection:
        """Return the SuperLink as ``flwr`` reaches it."""
        return Connection(CONNECTION, flower_environment(self.home))

    def line(self) -> AggregatorLine:
        """Return the line for silos."""
        return aggregator_line(self.settings.hosts[0], self.settings.port, self.authority)

    def programs(self) -> Iterator[Program]:
        """Yield what ``up`` starts, in this order."""
        settings, address = self.settings, self.settings.superlink
        host = "0.0.0.0" if settings.open_to_all else _LOCAL
        port = int(address.rpartition(":")[2])
        database = self.folder / "superlink.db"
        yield self._program(SUPERLINK, *superlink_command(host, port, database, self.keys))
        yield self._program(SUPEREXEC, *superexec_command(address, self.keys))
        if settings.proxy:
            yield self._program("proxy", *self.nginx(), "-g", "daemon off;")

    def nginx(self) -> list[str]:
        """Return the command of the proxy, without what to do."""
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        return [program or "nginx", "-e", "stderr", "-c", str(self.folder / "proxy" / "nginx.conf")]

    def is_up(self) -> bool:
        """Tell whether the SuperLink answers."""
        return is_healthy(self.settings.superlink, self.authority)

    def public_key(self, name: str) -> Path:
        """Return where a silo's public key lies."""
        return self.folder / "nodes" / f"{name}.pub"

    def node_file(self, name: str) -> Path:
        """Return where Flower's number of a silo's node is noted."""
        return self.folder / "nodes" / f"{name}.node"

    def register(self, name: str) -> None:
        """Register a silo's public key with the SuperLink, which runs, and show the command."""
        words = registration(self.public_key(name), CONNECTION, name)
        say_command(self.home, ["flwr", *words])
        node = register(self.connection, words)
        noted = self.node_file(name)
        if node is not None:
            write_text(noted, f"{node}\n")
            return
        known = {one["node-id"]: one["status"] for one in nodes_of(self.connection)}
        if noted.exists() and known.get(noted.read_text().strip()) == "unregistered":
            raise RunError(
                f"{name}: its key was unregistered, and a SuperLink takes no such key again; let the silo "
                "make a new one: remove its keys/, and photon silo init"
            )

    def _program(self, name: str, *command: str) -> Program:
        return Program(name, command, self.folder, self.home, self.folder / "logs" / f"{name}.log")


def init(
    folder: Path, hosts: Sequence[str], port: int | None, proxy: bool | None
) -> tuple[AggregatorPlace, str]:
    """Write all that an aggregator needs, or what is missing of it.

    Parameters
    ----------
    hosts
        Names and addresses of this machine; none: as noted, or the machine's own name.
    port
        Where silos connect; None: as noted, or 8000.
    proxy
        Whether a proxy listens there; None: as noted, or if others than this machine are to connect.

    Returns
    -------
    tuple
        The folder, and what was done, in a line.

    Raises
    ------
    PhotonError
        If something that is given is wrong, or differs from what was noted.
    """
    folder = place_of(folder, SILO_FILE)
    chosen = _chosen(folder, hosts, port, proxy)
    place = Place(folder)
    place.file(AGGREGATOR_FILE, chosen.model_dump_json(indent=1) + "\n")
    found = AggregatorPlace(folder)
    environment = environment_of(folder, found.photon_home)
    place.file(ENVIRONMENT, environment_file(environment))
    place.directory("keys", lambda beside: _make_keys(beside, chosen.hosts))
    connection = {"address": chosen.superlink, "root-certificates": str(found.authority)}
    text = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})
    place.file("flower/config.toml", text)
    if chosen.proxy:
        proxied = Proxy(
            listen=str(chosen.port),
            superlink=chosen.superlink,
            name="localhost",
            certificate=found.keys / "server.crt",
            key=found.keys / "server.key",
            authority=found.authority,
            scratch=folder / "proxy",
        )
        place.file("proxy/nginx.conf", proxied.configuration())
    photon = str(Path(sys.executable).parent / "photon")
    command = [photon, "aggregator", "up", str(folder)]
    place.file("systemd/photon-aggregator.service", unit("Photon aggregator", folder, command))
    return found, place.report()


def _chosen(folder: Path, hosts: Sequence[str], port: int | None, proxy: bool | None) -> Aggregator:
    if (folder / AGGREGATOR_FILE).exists():
        noted = read_settings_file(folder, AGGREGATOR_FILE, Aggregator, "photon aggregator init")
        options = (
            ("--host", list(dict.fromkeys(hosts)) or None, noted.hosts),
            ("--port", port, noted.port),
            ("--proxy", proxy, noted.proxy),
        )
        check_as_noted(folder, options, ", and silos may have been told; choose another folder")
        return noted
    hosts = list(dict.fromkeys(hosts)) or [socket.getfqdn()]
    for host in hosts:
        if (problem := key_files.host_problem(host)) is not None:
            raise PhotonError(f"--host {host!r}: {problem}")
    if len(hosts) > 20:
        raise PhotonError(f"--host: {len(hosts)} are too many; 20 at most")
    needed = not all(map(is_loopback, hosts))
    return Aggregator(
        hosts=hosts, port=PORT if port is None else port, proxy=needed if proxy is None else proxy
    )


def _make_keys(folder: Path, hosts: Sequence[str]) -> None:
    key_files.make_authority(folder)
    key_files.make_server_certificate(folder, list(dict.fromkeys([*hosts, "localhost", _LOCAL])))
    write_bytes(folder / "superexec", secrets.token_bytes(32), mode=0o600)


def check(place: AggregatorPlace) -> "Iterator[Finding]":
    """Yield what could keep an aggregator from coming up."""
    from photon.deployment.doctor import Finding, versions

    yield versions("silos' side")
    try:
        for name in ("authority.key", "server.key", "superexec"):
            # The authority's key may lie elsewhere.
            if name != "authority.key" or (place.keys / name).exists():
                key_files.check_private(place.keys / name)
        yield Finding("keys", "ok", f"{place.keys}, for this user alone")
        yield _certificate(place)
    except FileNotFoundError as error:
        yield Finding("keys", "fail", f"{error.filename}: missing; put it back, or choose another folder")
    except PhotonError as error:
        yield Finding("keys", "fail", str(error))
    yield from _ports(place)
    if place.settings.proxy:
        yield _proxy(place)
    elif place.settings.open_to_all:
        said = (
            "no proxy: whoever reaches the port can register nodes and start code on silos; for a trial in a "
            "network of your own alone"
        )
        yield Finding("proxy", "warn", said)


def _certificate(place: AggregatorPlace) -> "Finding":
    from cryptography.hazmat.primitives import serialization

    from photon.deployment.doctor import Finding, expiry

    certificate = key_files.read_certificate(place.keys / "server.crt")
    hosts = " ".join(f"--host {host}" for host in [*place.settings.hosts, "localhost", _LOCAL])
    mend = f"renew it with photon keys server {place.keys} {hosts} --force"
    lacks = set(place.settings.hosts) - set(key_files.certificate_hosts(certificate))
    if lacks:
        return Finding("certificate", "fail", f"not for {', '.join(sorted(lacks))}: {mend}")
    return expiry(certificate.public_bytes(serialization.Encoding.DER), mend)


def _ports(place: AggregatorPlace) -> "Iterator[Finding]":
    from photon.deployment.doctor import Finding

    settings = place.settings
    everywhere = "" if settings.proxy or settings.open_to_all else _LOCAL
    wanted = [(everywhere, settings.port)]
    if settings.proxy:
        wanted.append((_LOCAL, settings.port + 1))
    for host, port in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                mend = "stop what listens there, or choose another port with init --port in a new folder"
                yield Finding("port", "fail", f"{port}: {error.strerror}; {mend}")
            else:
                yield Finding("port", "ok", f"{port} on {host or 'all addresses'}")


def _proxy(place: AggregatorPlace) -> "Finding":
    from photon.deployment.doctor import Finding

    command = place.nginx()
    try:
        done = subprocess.run([*command, "-t", "-q"], capture_output=True, text=True, check=False)
    except OSError:
        said = "nginx is not there: install it (Debian: nginx-light), or init a new folder with --no-proxy"
        return Finding("proxy", "fail", said)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding("proxy", "fail", f"nginx does not take its configuration: {last}")
    return Finding("proxy", "ok", f"{command[0]} passes on /v1/fleet and /health alone")


def up(place: AggregatorPlace) -> None:
    """Run the aggregator until this process is interrupted; then end all that it started.

    Raises
    ------
    PhotonError
        If it is running already.
    RunError
        If it does not come up, or loses a program for good.
    """
    lock = claim(place.folder, "the aggregator")
    os.umask(0o077)
    os.environ.update(environment_of(place.folder, place.photon_home))
    started: list[tuple[Program, subprocess.Popen[bytes]]] = []
    try:
        for program in place.programs():
            say_command(program.home, program.command)
            started.append((program, program.start(supervised=True)))
            if program.name == SUPERLINK:
                wait_until_healthy(started[-1][1], place.settings.superlink, program.log, place.authority)
        if place.settings.proxy:
            address = f"{_LOCAL}:{place.settings.port}"
            wait_until_healthy(started[-1][1], address, started[-1][0].log, place.authority)
        for name in _unregistered(place):
            place.register(name)
        print(f"\n{_how_to_go_on(place)}", flush=True)
        while True:
            for program, process in started:
                if process.poll() is not None:
                    raise RunError(f"the supervisor of the {program.name} has ended; see {program.log}")
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        print("stopping", flush=True)
        _stop(started)
        heard()
    except BaseException:
        _stop(started)
        raise
    finally:
        os.close(lock)


def _unregistered(place: AggregatorPlace) -> list[str]:
    """Return the silos that were admitted while the SuperLink was down, and not ejected since."""
    admitted = Admitted.read(place.photon_home / ADMITTED).names
    return [
        name
        for name in sorted(admitted)
        if place.public_key(name).exists() and not place.node_file(name).exists()
    ]


def _stop(started: Sequence[tuple[Program, subprocess.Popen[bytes]]]) -> None:
    for _, process in reversed(started):
        stop_tree(process, at_once=False, patience=15.0)


def _how_to_go_on(place: AggregatorPlace) -> str:
    settings, env = place.settings, place.folder / ENVIRONMENT
    return (
        f"The aggregator is up at {settings.hosts[0]}:{settings.port}; logs are in {place.folder / 'logs'}. "
        "Ctrl-C ends it.\n"
        "The line for silos:\n\n"
        f"{place.line().line()}\n\n"
        f"Admit a silo:     photon aggregator admit {place.folder} LINE\n"
        f"Who is online:    photon aggregator status {place.folder}\n"
        f"Train:            set -a; . {env}; set +a; photon train federation=deployment …"
    )


def admit(place: AggregatorPlace, line: SiloLine) -> str:
    """Let a silo take part: its name belongs to its key, and the SuperLink knows the key.

    Returns
    -------
    str
        What is so now, in a line.

    Raises
    ------
    PhotonError
        If the name belongs to another key, or the key was ejected.
    RunError
        If the SuperLink does not take the key.
    """
    os.environ.update(environment_of(place.folder, place.photon_home))
    decided, file = place.photon_home / ADMITTED, place.public_key(line.name)
    if line.fingerprint in Admitted.read(decided).ejected:
        raise PhotonError(
            f"{line.name}: its key {line.fingerprint} was ejected; let the silo make a new one (remove its "
            "keys/, and photon silo init)"
        )
    try:
        let_in(decided, line.name, line.fingerprint)
        if not file.exists() or file.read_bytes() != line.public_key():
            # Another key is another node.
            place.node_file(line.name).unlink(missing_ok=True)
            write_bytes(file, line.public_key(), mode=0o600)
    except OSError as error:
        raise PhotonError(f"{place.folder}: cannot be written ({error.strerror})") from None
    who = f"{line.name} belongs to {line.fingerprint}"
    if not place.is_up():
        return f"{who}; it is registered when `photon aggregator up {place.folder}` starts"
    place.register(line.name)
    return f"{who} and is registered"


def remove(place: AggregatorPlace, name: str) -> str:
    """Turn a silo away: its key stays out, and the name is free.

    Returns
    -------
    str
        What is so now, in a line.

    Raises
    ------
    PhotonError
        If no silo was admitted under that name.
    RunError
        If the SuperLink does not let the node go.
    """
    noted, decided = place.node_file(name), place.photon_home / ADMITTED
    if name not in Admitted.read(decided).names or not noted.exists():
        left = "the SuperLink was not told of its key by `photon aggregator admit`"
    else:
        words = ["supernode", "unregister", noted.read_text().strip(), CONNECTION]
        if place.is_up():
            say_command(place.home, ["flwr", *words])
            place.connection.flwr(*words)
            noted.unlink()
            left = "its node is unregistered"
        else:
            left = f"when the SuperLink is up, run: flwr {' '.join(words)}"
    # Last: while the name is there, a second call does what the first one did not come to.
    fingerprint = keep_out(decided, name)
    place.public_key(name).unlink(missing_ok=True)
    return f"{name} is free, and {fingerprint} stays out; {left}"
