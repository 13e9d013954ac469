"""Several machines of one silo that train together: where they meet, and how the others hear of jobs.

The first machine hosts a store. The processes of all machines meet there, and each of the other machines
has one program, `serve_machine`, which starts that machine's processes, reads the name of one job's folder
after the other from the store and passes it on. Folders are seen by all machines: of a job only its name
travels. Whoever reaches the store can name a folder, so a machine works below one folder alone, and the
store belongs into the silo's own network.
"""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

import photon
from photon.config.training import TrainingSection
from photon.errors import PhotonError

#: Seconds until the other machines must have come, and of silence until one counts as gone.
ARRIVAL_SECONDS, SILENCE_SECONDS = 300.0, 30.0
_BEAT_SECONDS, _LOOK_SECONDS, _RETRY_SECONDS = 2.0, 0.1, 1.0
#: Processes of a silo, at most, for which a machine starts its share.
MOST_PROCESSES = 16_384
_SETTING, _FAILED = "photon/setting", "photon/failed"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Machines:
    """The machines of a silo.

    Attributes
    ----------
    count
        How many there are.
    processes
        Processes on all of them together; each has as many as the others.
    host, port
        Where they meet: an address of the first machine. Port 0 takes a free one, for one machine alone.
    """

    count: int
    processes: int
    host: str = _LOOPBACK
    port: int = 0

    @classmethod
    def of(cls, training: TrainingSection) -> "Machines":
        """Return the machines on which a silo trains.

        Raises
        ------
        PhotonError
            When they are to meet at what is no ``HOST:PORT``.
        """
        if training.rendezvous is None:
            return cls(training.machines, training.processes)
        return cls(training.machines, training.processes, *split_address(training.rendezvous))

    @property
    def each(self) -> int:
        """Processes of one machine."""
        return self.processes // self.count


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.

    Raises
    ------
    PhotonError
        When it is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise PhotonError(f"{text!r} is no HOST:PORT, such as 10.0.0.1:29500")
    return host.strip("[]"), int(port)


class Meeting:
    """The store at which processes meet, on the machine that has the jobs.

    Parameters
    ----------
    machines
        Which machines are expected.

    Raises
    ------
    PhotonError
        When this machine cannot listen there.
    """

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        try:
            self._store = dist.TCPStore(machines.host, machines.port, is_master=True, wait_for_workers=False)
        except (RuntimeError, OSError, ValueError) as error:
            raise PhotonError(
                f"training.rendezvous={machines.host}:{machines.port}: this machine cannot listen there "
                f"({' '.join(str(error).split())[:200]}); name an address of it and a free port"
            ) from error
        setting = {"count": machines.count, "processes": machines.processes, "versions": versions()}
        self._store.set(_SETTING, json.dumps(setting))
        self._jobs = 0
        self._beats: dict[int, tuple[int, float]] = {}

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._store.port)

    def publish(self, folder: Path) -> None:
        """Tell the other machines of a job.

        Raises
        ------
        PhotonError
            When one of them does not come in time.
        """
        until = time.monotonic() + ARRIVAL_SECONDS
        for machine in range(1, self.machines.count):
            while not self._store.check([_key("here", machine)]):
                if time.monotonic() > until:
                    raise PhotonError(self._absent(machine))
                time.sleep(_LOOK_SECONDS)
        self._store.set(_key("job", self._jobs), str(folder))
        self._jobs += 1

    def _absent(self, machine: int) -> str:
        address = f"{self.machines.host}:{self.port}"
        return (
            f"training.machines={self.machines.count}: machine {machine} has not come to {address} within "
            f"{ARRIVAL_SECONDS:.0f} s; start `photon silo machine {address} --machine {machine}` there"
        )

    def trouble(self) -> str | None:
        """Return why the job cannot be done, if another machine has said so or has fallen silent."""
        if self._store.check([_FAILED]):
            return self._store.get(_FAILED).decode(errors="replace")
        now = time.monotonic()
        for machine in range(1, self.machines.count):
            beat = int(self._store.add(_key("beat", machine), 0))
            before, since = self._beats.get(machine, (-1, now))
            if beat != before:
                self._beats[machine] = (beat, now)
            elif now - since > SILENCE_SECONDS:
                return f"machine {machine} has been silent for {SILENCE_SECONDS:.0f} s"
        return None


def serve_machine(
    rendezvous: str,
    machine: int,
    below: Path,
    work: Callable[[Machines], contextlib.AbstractContextManager[Callable[[Path], None]]],
    say: Callable[[str], None],
) -> None:
    """Be a machine of a silo other than its first: do its part of each job, until the program is ended.

    Parameters
    ----------
    rendezvous
        ``HOST:PORT`` of the first machine.
    machine
        Which this is, from 1.
    below
        Folder that all jobs are in, as this machine sees it.
    work
        Starts this machine's processes and gives what has them do the job of a folder; leaving it ends them.
    say
        Tells what happens.

    Raises
    ------
    PhotonError
        When this machine has no place among those that meet there, or runs other versions.
    """
    host, port = split_address(rendezvous)
    below = below.resolve()
    while True:
        store = _joined(host, port, say)
        try:
            machines = _setting(store, host, port, machine)
            say(f"joined {rendezvous} as machine {machine} of {machines.count}")
            with _beating(host, port, machine), work(machines) as do:
                store.set(_key("here", machine), "1")
                for number in itertools.count():
                    job = _next_job(store, number)
                    try:
                        do(_checked(job, below))
                    except PhotonError as error:
                        store.set(_FAILED, f"machine {machine}: {error}")
                        # Nothing more comes from this store: the first machine begins anew.
                        raise ConnectionError from error
        except (RuntimeError, ConnectionError):
            # The store has gone: the silo has ended, or begins with other processes.
            say(f"{rendezvous} has gone")
        time.sleep(_RETRY_SECONDS)


def interface_to(host: str, port: int) -> str | None:
    """Return the name of the network interface by which this machine reaches a host; None: not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Nothing is sent: the system only chooses a route.
            probe.connect((host, port or 1))
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == own for one in addresses)), None)


def versions() -> str:
    """Return what must be alike on all machines."""
    return f"photon {photon.__version__}, torch {torch.__version__}"


def _joined(host: str, port: int, say: Callable[[str], None]) -> dist.TCPStore:
    said = False
    while True:
        try:
            return _client(host, port)
        except (RuntimeError, OSError, ValueError):
            if not said:
                say(f"waits for {host}:{port}")
            said = True
            time.sleep(_RETRY_SECONDS)


def _client(host: str, port: int) -> dist.TCPStore:
    with socket.create_connection((host, port), timeout=5):
        pass  # torch writes a page of its own if nobody is there
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))


def _setting(store: dist.TCPStore, host: str, port: int, machine: int) -> Machines:
    try:
        found = json.loads(store.get(_SETTING))
        machines = Machines(int(found["count"]), int(found["processes"]), host, port)
        versions_there = str(found["versions"])
    except (ValueError, KeyError, TypeError) as error:
        raise PhotonError(f"{host}:{port}: who meets there is no silo of Photon") from error
    if not 1 <= machines.count <= machines.processes <= MOST_PROCESSES:
        raise PhotonError(
            f"{host}:{port}: {machines.processes:,} processes on {machines.count:,} machines meet there; "
            f"each machine has one at least, and all together {MOST_PROCESSES:,} at most"
        )
    if machine >= machines.count:
        raise PhotonError(
            f"--machine {machine}: {machines.count} machines meet at {host}:{port}, from 0 to "
            f"{machines.count - 1}"
        )
    if versions_there != versions():
        raise PhotonError(f"the first machine has {versions_there}, and this one {versions()}")
    return machines


def _next_job(store: dist.TCPStore, number: int) -> Path:
    while not store.check([_key("job", number)]):
        time.sleep(_LOOK_SECONDS)
    return Path(store.get(_key("job", number)).decode(errors="replace"))


def _checked(folder: Path, below: Path) -> Path:
    if not folder.resolve().is_relative_to(below):
        raise PhotonError(f"{folder} is not below {below}; start it there with --below and the silo's state")
    if not (folder / "job.json").is_file():
        raise PhotonError(
            f"{folder} is not here; the machines of a silo share the folders of its state and of its data"
        )
    return folder


@contextlib.contextmanager
def _beating(host: str, port: int, machine: int) -> Iterator[None]:
    """Tell that this machine lives, while the block runs."""
    stopped = threading.Event()
    store = _client(host, port)

    def beat() -> None:
        with contextlib.suppress(RuntimeError):
            while not stopped.wait(_BEAT_SECONDS):
                store.add(_key("beat", machine), 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _key(kind: str, number: int) -> str:
    return f"photon/{kind}/{number}"
