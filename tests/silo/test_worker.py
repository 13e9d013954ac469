"""The silo worker: real processes, a real socket, a real silo."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from photon import code
from photon.client_app import WORKER
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.files.processes import is_gone
from photon.link.frames import Frame, read_frame, write_frame
from photon.link.messages import BODY, Describe, Description, TrainReport, TrainRequest, pack, unpack
from photon.link.records import decode_groups, encode_groups
from photon.models.build import build_model
from photon.node import answer
from photon.silo import worker_client
from photon.silo.worker_client import LOG, SOCKET, ask_worker, find_worker, has_worker
from photon.training.groups import read_params
from tests.conftest import small_run

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="the worker needs Unix sockets")


#: Local steps that take minutes.
LONG = 100_000


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run_dir = tmp_path_factory.mktemp("config") / "run"
    return small_run("federation=deployment", "training.batch_size=4", data=corpus, run_dir=run_dir)


@contextmanager
def node_below(folder: Path, corpus: Path) -> Iterator[dict[str, str]]:
    yield {"data-dir": str(corpus), "state-dir": str(folder)}
    for process in workers(folder):
        process.kill()
        process.wait(10)


@pytest.fixture
def node(corpus: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    with node_below(tmp_path / "state", corpus) as settings:
        yield settings


@pytest.fixture(scope="module")
def busy_node(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return one node for all who only need a worker that trains: it imports torch, for seconds.

    Each asks for a run of its own. One who ends the worker starts the next one's.
    """
    with node_below(tmp_path_factory.mktemp("busy") / "state", corpus) as settings:
        yield settings


def workers(folder: Path) -> list[psutil.Process]:
    """Return the workers of one state folder, among all processes of the machine."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "photon.worker" in words and str(folder) in words and not is_gone(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def the_worker(node: dict[str, str]) -> psutil.Process:
    (process,) = workers(Path(node["state-dir"]))
    return process


def greeting(node: dict[str, str]) -> int:
    """Find or start the worker, which imports torch only for a message, and return its process id."""
    with find_worker(Path(node["state-dir"]), WORKER) as worker:
        return worker.pid


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def query(config: RunConfig) -> RecordDict:
    return RecordDict({BODY: pack(Describe(), config)})


def train_message(config: RunConfig, **changes: object) -> RecordDict:
    request = {
        "run_id": "run",
        "model_id": "model-1",
        "round": 1,
        "silo": "alpha",
        "members": ["alpha"],
        "global_step": 0,
        "steps": 3,
        "batch_size": 4,
        "last_round": 0,
        "position": 0,
        "cohort": 1,
    }
    content = encode_groups({"params": read_params(build_model(config.model, 300, seed=1))})
    content[BODY] = pack(TrainRequest.model_validate(request | changes), config)
    return content


def lasting(config: RunConfig) -> RunConfig:
    """Return the configuration of a run whose rounds take minutes."""
    return config.model_copy(update={"local_steps": LONG})


def second_round(config: RunConfig, position: int, **changes: object) -> RecordDict:
    following = {"model_id": "model-2", "round": 2, "global_step": 4, "last_round": 1, "position": position}
    return train_message(config, **(following | changes))


def assert_same_training(one: RecordDict, other: RecordDict) -> None:
    reports = [unpack(content, TrainReport).model_dump(exclude={"seconds"}) for content in (one, other)]
    assert reports[0] == reports[1]
    params, expected = (decode_groups(content)["params"] for content in (one, other))
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name], expected[name]) for name in params)


def test_who_has_a_worker(config, small_config, node):
    assert has_worker(query(config), node)
    assert not has_worker(query(config), {**node, "worker": False})
    assert not has_worker(query(config), {})
    assert not has_worker(query(small_config("federation=inprocess")), node)
    assert not has_worker(query(small_config("federation=simulation")), node)
    assert not has_worker(RecordDict({BODY: ConfigRecord({"engine": ["deployment"]})}), node)
    with pytest.raises(PhotonError, match="worker='no' is neither true nor false"):
        has_worker(query(config), {**node, "worker": "no"})


def test_the_silo_app_imports_nothing_heavy():
    heavy = ["torch", "transformers", "pydantic", "hydra", "omegaconf", "datasets", "filelock", "psutil"]
    program = f"import sys, photon.client_app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_worker_serves_round_after_round_with_the_same_weights_as_without(config, busy_node, tmp_path):
    node = busy_node
    alone = {**node, "state-dir": str(tmp_path / "alone")}
    begin = time.monotonic()
    first = ask_worker("train", train_message(config), node, WORKER)
    first_took = time.monotonic() - begin
    assert_same_training(first, answer("train", train_message(config), alone))
    worker = the_worker(node)
    assert worker.cmdline()[0] == sys.executable

    position = unpack(first, TrainReport).position
    begin = time.monotonic()
    second = ask_worker("train", second_round(config, position), node, WORKER)
    took = time.monotonic() - begin
    assert_same_training(second, answer("train", second_round(config, position), alone))
    assert the_worker(node).pid == worker.pid
    # Neither torch is imported nor a model built again; both take seconds.
    assert took < first_took / 3

    silos = unpack(ask_worker("query", query(config), node, WORKER), Description).silos
    assert [silo.name for silo in silos] == ["alpha", "beta", "gamma"]
    assert the_worker(node).pid == worker.pid

    state = Path(node["state-dir"])
    modes = {name: stat.S_IMODE((state / name).stat().st_mode) for name in (".", SOCKET, LOG)}
    assert modes == {".": 0o700, SOCKET: 0o600, LOG: 0o600}


@pytest.mark.slow
def test_work_that_nobody_waits_for_is_given_up(config, busy_node):
    node = busy_node
    greeting(node)
    worker = the_worker(node)
    log = Path(node["state-dir"]) / LOG
    begun = log.read_text().count("train: begun")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(Path(node["state-dir"]) / SOCKET))
        with connection.makefile("rwb") as stream:
            read_frame(stream)
            request = {"message_type": "train", "node_config": node}
            endless = train_message(lasting(config), run_id="given-up", steps=LONG)
            write_frame(stream, Frame(request, endless))
            wait_until(lambda: log.read_text().count("train: begun") > begun)
    wait_until(lambda: is_gone(worker))
    reply = ask_worker("train", train_message(config, run_id="given-up"), node, WORKER)
    assert unpack(reply, TrainReport).position == 12


def test_a_killed_worker_is_told_and_the_next_one_trains_the_same_windows(config, busy_node, tmp_path):
    node = busy_node
    alone = {**node, "state-dir": str(tmp_path / "alone")}
    position = unpack(answer("train", train_message(config, run_id="killed"), alone), TrainReport).position
    expected = answer("train", second_round(config, position, run_id="killed"), alone)
    ask_worker("train", train_message(config, run_id="killed"), node, WORKER)
    worker = the_worker(node)
    log = Path(node["state-dir"]) / LOG
    begun = log.read_text().count("train: begun")
    endless = second_round(lasting(config), position, run_id="killed", steps=LONG, global_step=LONG)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(ask_worker, "train", endless, node, WORKER)
        wait_until(lambda: log.read_text().count("train: begun") > begun)
        busy = worker.cpu_times().user
        wait_until(lambda: worker.cpu_times().user > busy + 1.0)  # at its local steps by now
        worker.kill()
        with pytest.raises(PhotonError, match=rf"process {worker.pid} ended while .* train .*{LOG}.*begun$"):
            long.result(20)
    reply = ask_worker("train", second_round(config, position, run_id="killed"), node, WORKER)
    assert_same_training(reply, expected)
    assert the_worker(node).pid != worker.pid


@pytest.mark.slow
def test_errors_come_back_as_one_line_and_an_unforeseen_one_costs_the_worker_its_place(config, busy_node):
    node = busy_node
    bodiless = RecordDict({BODY: ConfigRecord({"config": config.text})})
    with pytest.raises(PhotonError, match=r"^message: it has no photon body"):
        ask_worker("train", bodiless, node, WORKER)
    worker = the_worker(node)
    with pytest.raises(PhotonError, match=r"^message: it brings no configuration$"):
        ask_worker("train", RecordDict(), node, WORKER)
    assert the_worker(node).pid == worker.pid
    with find_worker(Path(node["state-dir"]), WORKER) as found:
        write_frame(found.stream, Frame({}, query(config)))
        assert read_frame(found.stream).fields["error"].startswith("KeyError: 'message_type'; see ")
    wait_until(lambda: is_gone(worker))
    assert greeting(node) != worker.pid
    assert "Traceback" in (Path(node["state-dir"]) / LOG).read_text()


def test_what_is_no_message_does_not_disturb_the_worker(node):
    pid = greeting(node)
    for sent in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"photon01" + b"\xff" * 8,
        b"photon01\x02" + bytes(7) + b"{}",
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(Path(node["state-dir"]) / SOCKET))
            connection.sendall(sent)
    assert greeting(node) == pid


CALLER = """
import pathlib, sys
from photon.silo.worker_client import find_worker
with find_worker(pathlib.Path(sys.argv[1]), 'photon.worker') as worker:
    print(worker.pid, flush=True)
"""


@pytest.fixture
def supernode(node, tmp_path):
    """Start two processes, one after the other, that find the worker below what looks like a SuperNode."""
    (tmp_path / "caller.py").write_text(CALLER)
    program = tmp_path / "flower-supernode"
    program.write_text(
        "import subprocess, sys, time\n"
        "for _ in range(2):\n"
        "    subprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, str(program), str(tmp_path / "caller.py"), node["state-dir"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_the_worker_outlives_the_processes_that_ask_and_dies_with_the_supernode(supernode, node):
    pid = int(supernode.stdout.readline())
    assert int(supernode.stdout.readline()) == pid
    time.sleep(0.6)
    worker = the_worker(node)
    assert worker.pid == pid
    supernode.kill()  # and nobody waits for it: a zombie counts as gone
    begin = time.monotonic()
    wait_until(lambda: is_gone(worker))
    assert time.monotonic() - begin < 5.0
    assert "SuperNode is gone" in (Path(node["state-dir"]) / LOG).read_text()


def test_two_messages_at_once_start_one_worker(node):
    with ThreadPoolExecutor() as pool:
        assert len(set(pool.map(lambda _: greeting(node), range(4)))) == 1
    log = (Path(node["state-dir"]) / LOG).read_text()
    assert log.count(" serves for process ") == 1


def test_a_worker_of_other_code_is_replaced(node, tmp_path, monkeypatch):
    # Flower unpacks every version of the app to a folder of its own.
    copy = tmp_path / "apps" / "photon.0.0.0"
    shutil.copytree(code.CODE_ROOT / "photon", copy / "photon", ignore=shutil.ignore_patterns("__pycache__"))
    with monkeypatch.context() as context:
        context.setattr(code, "CODE_ROOT", copy)
        context.setattr(code, "__file__", str(copy / "photon" / "code.py"))
        pid = greeting(node)
        old = the_worker(node)
        assert old.environ()["PYTHONPATH"].startswith(str(copy))
        assert greeting(node) == pid
        with open(copy / "photon" / "errors.py", "a") as changed:
            changed.write("# changed\n")
        assert greeting(node) != pid
    assert greeting(node) != pid
    assert is_gone(old)
    assert the_worker(node).environ()["PYTHONPATH"].startswith(str(code.CODE_ROOT))


def test_sigterm_ends_it(node):
    pid = greeting(node)
    worker = the_worker(node)
    worker.terminate()
    wait_until(lambda: is_gone(worker))
    assert greeting(node) != pid


def test_a_worker_that_cannot_start_is_told_with_its_last_line(config, node, monkeypatch):
    failing = [sys.executable, "-c", "raise ValueError('no such luck')"]
    monkeypatch.setattr(code, "command", lambda module: failing)
    with pytest.raises(PhotonError, match=rf"ended as soon as .*{LOG}.*ValueError: no such luck$"):
        ask_worker("query", query(config), node, WORKER)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="long paths go through /proc")
def test_long_paths(node, tmp_path, monkeypatch):
    node["state-dir"] = str(tmp_path / "state" / ("deep" * 20) / ("er" * 40))
    pid = greeting(node)
    assert greeting(node) == pid
    the_worker(node).kill()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(PhotonError, match="too long a path for a socket"):
        greeting(node)


def test_a_foreign_process_or_folder_is_refused(node, monkeypatch):
    here, there = socket.socketpair()
    with here, there:
        worker_client.check_peer(here)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        if hasattr(socket, "SO_PEERCRED"):
            with pytest.raises(PhotonError, match=r"belongs to uid \d+, not 4711"):
                worker_client.check_peer(here)
    with pytest.raises(PhotonError, match=r"state-dir: .* belongs to uid \d+, and this silo runs as 4711"):
        greeting(node)


def test_a_state_dir_that_others_could_read_is_closed_to_them(node):
    folder = Path(node["state-dir"])
    folder.mkdir(mode=0o755)
    greeting(node)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_group_of_two_processes_is_kept_across_rounds_and_ends_with_the_worker(
    small_config, node, tmp_path
):
    # Adam would blow up rounding where the gradient is zero but for it.
    one = small_config("federation=deployment", "optimizer=sgd", "training.device=cpu")
    config = small_config(
        "federation=deployment", "optimizer=sgd", "training.device=cpu", "training.processes=2"
    )
    first = ask_worker("train", train_message(config), node, WORKER)
    worker = the_worker(node)
    group = worker.children()
    assert len(group) == 2
    position = unpack(first, TrainReport).position
    second = ask_worker("train", second_round(config, position), node, WORKER)
    assert worker.children() == group
    # One process with the whole batch gives the same, up to rounding.
    alone = {**node, "state-dir": str(tmp_path / "alone")}
    answer("train", train_message(one), alone)
    expected = decode_groups(answer("train", second_round(one, position), alone))["params"]
    for name, tensor in decode_groups(second)["params"].items():
        torch.testing.assert_close(tensor, expected[name])
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: all(is_gone(process) for process in group))
