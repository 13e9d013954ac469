"""What large payloads cost inside Flower's messages and through a store.

    python scripts/bench/store.py --only rounds                     # a deployment, 1 to 500 MB
    python scripts/bench/store.py --only transport                  # 5.3 GB through a folder
    python scripts/bench/store.py --only transport --store s3://bucket/prefix [--presigned]

``rounds`` starts a SuperLink and two SuperNodes (subprocess isolation, no TLS, loopback) and trains real
models of the named sizes for one local step a round, plain SGD, without evaluation. The overhead of a
round is its wall time less the slowest silo's training. Flower's own FedAvg runs on the same
deployment, with a client that adds a number to its arrays: equal bytes would not be sent again. The first
round, in which files come from disk for the first time, and the last one, after which Photon evaluates,
do not count.

``transport`` is the link alone, each side in a process of its own: the server writes a model of 1.3
billion float32 parameters from a mapped file, two silos read, verify and return it, and the server reads,
verifies and folds both replies. The mean must equal the model. For S3 the environment names the server
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION); the bucket must exist.

Memory is sampled from outside, see ``usage.py``.
"""

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from common import Report, at_least, parser, spread
from round_overhead import FLOWER_PYPROJECT, SEQUENCE_LENGTH, prepare_data
from usage import KINDS, Peak, Usage, sampled

MODELS = {
    1: {"n_layer": 1, "n_embd": 128},
    10: {"n_layer": 2, "n_embd": 320},
    50: {"n_layer": 4, "n_embd": 512},
    200: {"n_layer": 4, "n_embd": 1024},
    500: {"n_layer": 10, "n_embd": 1024},
}
CASES = ("inline", "store", "fedavg")
CONNECTION = "bench"
#: Flower's objects are addressed by their content, so both ways bring bytes that were not there before.
FEDAVG_APP = """\
import json, time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    number = np.float32(context.node_id % 1000)
    arrays = {name: Array(array.numpy() + number) for name, array in message.content["arrays"].items()}
    metrics = MetricRecord({"num-examples": 1.0})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    settings = json.loads(Path(context.run_config["settings"]).read_text())
    generator = np.random.default_rng(0)
    arrays = {n: Array(generator.random(s, np.float32)) for n, s in settings["shapes"].items()}
    ends = []
    FedAvg(fraction_evaluate=0.0).start(
        grid,
        ArrayRecord(arrays),
        num_rounds=settings["rounds"],
        evaluate_fn=lambda _round, _arrays: ends.append(time.time()),
    )
    Path(settings["output"]).write_text(json.dumps(ends))
"""
#: Not the first round, and not the last one, after which Photon evaluates.
COUNTED = slice(1, -1)


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    report = Report(arguments)
    with tempfile.TemporaryDirectory(prefix="photon-bench-", dir=arguments.folder) as name:
        if "rounds" in arguments.only:
            compare_rounds(report, Path(name), arguments)
        if "transport" in arguments.only:
            measure_transport(report, Path(name), arguments)
    report.close()


# --- rounds on a deployment ---------------------------------------------------------------------------


def compare_rounds(report: Report, folder: Path, arguments: argparse.Namespace) -> None:
    from photon.data.prepared import PreparedData
    from photon.data.separate import separate

    parts = folder / "parts"
    separate(PreparedData.open(prepare_data(folder)), parts)
    rows = []
    raw = []
    for size in arguments.size_mb:
        for name in arguments.case:
            case = run_case(name, size, parts, folder, arguments)
            rows.append(
                [
                    f"{case.payload / 1e6:.0f} MB, {name}",
                    spread(case.seconds, 1),
                    spread(case.cpu, 1),
                    *(str(case.peaks.get(kind, Peak())) for kind in KINDS.values()),
                ]
            )
            raw.append({"size": size, "case": name, **asdict(case)})
            report.say(" · ".join(rows[-1]))
    report.table(
        "Deployment, two silos: seconds of overhead a round, CPU seconds a round of all processes; most MiB "
        "resident (anonymous) in one process",
        ["payload", "overhead", "CPU", *KINDS.values()],
        rows,
        raw=raw,
    )


@dataclass
class Case:
    """What was measured of one case: seconds of overhead and of CPU a round, memory, bytes of the model."""

    seconds: list[float]
    cpu: list[float]
    peaks: dict[str, Peak]
    payload: int


def run_case(case: str, size: int, parts: Path, folder: Path, arguments: argparse.Namespace) -> Case:
    """Run one case; the rounds at the start do not count."""
    run_dir, ends = folder / "run", folder / "ends.json"
    store = arguments.store or str(folder / "store")
    config = config_of(size, case, run_dir, store, arguments.rounds)
    shapes = shapes_of(config)
    settings = folder / "run-config.toml"
    app: AbstractContextManager[Path]
    if case == "fedavg":
        app, result = nullcontext(fedavg_app(folder / "app")), ends
        given = {"shapes": shapes, "rounds": arguments.rounds, "output": str(ends)}
        (folder / "settings.json").write_text(json.dumps(given))
        settings.write_text(tomli_w.dumps({"settings": str(folder / "settings.json")}))
    else:
        from photon.engine.app_folder import app_folder

        app, result = app_folder(), run_dir / "summary.json"
        settings.write_text(tomli_w.dumps({"config": config.text}))
    usage = Usage()
    with (
        app as made,
        deployment(folder, parts, store) as (flwr, family),
        sampled(lambda: usage.sample(family()), 0.2),
    ):
        run = json.loads(
            flwr("run", str(made), CONNECTION, "--run-config", str(settings), "--format", "json")
        )
        wait_for(result, flwr, str(run["run-id"]), folder / "flower.log")
    if case == "fedavg":
        times = json.loads(ends.read_text())
        seconds = [b - a for a, b in itertools.pairwise(times)]
        ends.unlink()
    else:
        times, seconds = overheads(run_dir)
        shutil.rmtree(run_dir)
    payload = payload_of(shapes)
    return Case(seconds[COUNTED], usage.between(times)[COUNTED], dict(usage.peaks), payload)


def fedavg_app(app: Path) -> Path:
    (app / "fedavg_bench").mkdir(parents=True, exist_ok=True)
    (app / "pyproject.toml").write_text(FLOWER_PYPROJECT)
    (app / "fedavg_bench" / "__init__.py").write_text(FEDAVG_APP)
    return app


def wait_for(result: Path, flwr: Any, run_id: str, log: Path) -> None:
    """Wait until a run has written its result. Flower is asked seldom: each question starts a process."""
    next_question = time.monotonic() + 60
    while not result.exists():
        time.sleep(0.5)
        if time.monotonic() > next_question:
            next_question = time.monotonic() + 60
            status = json.loads(flwr("list", CONNECTION, "--run-id", run_id, "--format", "json"))["runs"][0]
            if status["status"].startswith("finished") and not result.exists():
                app_log = flwr("log", run_id, CONNECTION, "--show")
                raise SystemExit(f"{app_log[-3000:]}\n{log.read_text()[-3000:]}")


def config_of(size: int, case: str, run_dir: Path, store: str, rounds: int, *overrides: str) -> Any:
    from photon.config.compose import compose

    return compose(
        [
            *(
                "federation=deployment",
                "federation.silos=2",
                "cohort=2",
                f"run_dir={run_dir}",
                f"rounds={rounds}",
            ),
            *(f"model.architecture.{key}={value}" for key, value in MODELS[size].items()),
            *(
                "model.architecture.n_head=2",
                f"model.sequence_length={SEQUENCE_LENGTH}",
                "schedule.warmup_steps=0",
            ),
            *("local_steps=1", "training.batch_size=1", "training.threads=1", "training.precision=fp32"),
            *("optimizer=sgd", "strategy.local_state=reset", "checkpoint.keep=1"),
            *("evaluation.every=1000000", "evaluation.sequences=1", "telemetry.display=none"),
            *("telemetry.report=false", "telemetry.export=false"),
            *(f"link.transport={'store' if case == 'store' else 'inline'}", f"link.store.url={store}"),
            *overrides,
        ]
    )


def shapes_of(config: Any) -> dict[str, list[int]]:
    from photon.models.build import build_model

    model = build_model(config.model, 300, seed=0, device="meta")
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def overheads(run_dir: Path) -> tuple[list[float], list[float]]:
    """Return the moments in which the first round began and each round ended, and the rounds' overheads."""
    from photon.telemetry.events import RoundFinished, RoundStarted
    from photon.telemetry.log import read_events

    events = read_events(run_dir / "events.jsonl")
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    begin = next(event.time for event in events if isinstance(event, RoundStarted))
    overhead = [r.seconds["overhead"] - r.seconds["evaluate"] for r in rounds]
    return [begin, *(r.time for r in rounds)], overhead


@contextmanager
def deployment(folder: Path, parts: Path, store: str) -> Iterator[tuple[Any, Any]]:
    """Start a SuperLink and a SuperNode for each silo; yield ``flwr``, and who has come of them."""
    from photon.engine.processes import (
        flower_environment,
        free_port,
        stop_tree,
        wait_until_healthy,
    )

    home = folder / "flower"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    environment = flower_environment(home)
    address = f"127.0.0.1:{free_port()}"
    connection = {"address": address, "insecure": True}
    settings = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    (home / "config.toml").write_text(tomli_w.dumps(settings))
    log = folder / "flower.log"
    processes: list[psutil.Popen] = []

    def start(*words: str) -> None:
        with open(log, "ab") as output:
            processes.append(
                psutil.Popen(
                    words, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            )

    def flwr(*words: str) -> str:
        done = subprocess.run(
            ["flwr", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"flwr {words[0]}: {done.stderr[-2000:] or done.stdout[-2000:]}")
        return done.stdout

    def family() -> list[psutil.Process]:
        alive = [process for process in processes if process.poll() is None]
        # A silo's worker is nobody's child.
        mine = ("photon.worker", str(folder))
        workers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if all(any(word in part for part in process.info["cmdline"] or ()) for word in mine)
        ]
        return [*alive, *(child for process in alive for child in process.children(recursive=True)), *workers]

    try:
        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", address.rpartition(":")[2])
        wait_until_healthy(processes[0], address, log)
        for silo in sorted(parts.iterdir()):
            node = f'data-dir="{silo}" state-dir="{folder / "state" / silo.name}" store-url="{store}"'
            port = ("--port", str(free_port()))
            start("flower-supernode", "--insecure", "--superlink", address, *port, "--node-config", node)
        yield flwr, family
    finally:
        for process in reversed(processes):
            stop_tree(process, at_once=True)
        shutil.rmtree(folder / "state", ignore_errors=True)


# --- the transport alone ------------------------------------------------------------------------------


def measure_transport(report: Report, folder: Path, arguments: argparse.Namespace) -> None:
    store = arguments.store or str(folder / "store")
    shapes = big_shapes()
    make_model(folder / "model", shapes)
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    settings = (store, arguments.presigned, folder, shapes)
    server = spawn.Process(target=play_server, args=(there, *settings))
    server.start()
    requests = take(here, server)
    replies = []
    rows: list[list[Any]] = []
    for number, request in enumerate(requests):
        mine, its = spawn.Pipe()
        silo = spawn.Process(target=play_silo, args=(its, request, number, *settings))
        silo.start()
        reply, told = take(mine, silo)
        silo.join()
        replies.append(reply)
        rows.extend([f"silo {number + 1}: {what}", *rest] for what, *rest in told)
    here.send(replies)
    told = take(here, server)
    server.join()
    rows = [
        ["server: " + told[0][0], *told[0][1:]],
        *rows,
        *(["server: " + what, *rest] for what, *rest in told[1:]),
    ]
    payload = payload_of(shapes)
    report.table(
        f"{payload / 1e9:.2f} GB through {store.partition('://')[0] if '://' in store else 'a folder'}"
        f"{', presigned' if arguments.presigned else ''}: each side a process of its own",
        ["phase", "seconds", "MB/s", "peak MiB resident (anonymous)"],
        [
            [what, f"{seconds:.1f}", f"{copies * payload / 1e6 / seconds:,.0f}", str(Peak(*peak))]
            for what, seconds, copies, peak in rows
        ],
        raw=rows,
    )


def take(pipe: Any, process: Any) -> Any:
    while not pipe.poll(1):
        if not process.is_alive():
            raise SystemExit(f"a side ended with code {process.exitcode}")
    return pipe.recv()


def big_shapes() -> dict[str, list[int]]:
    from photon.config.compose import compose

    config = compose(["model=photon-1.3b", "federation=inprocess"])
    from photon.models.build import build_model

    model = build_model(config.model, 50277, seed=0, device="meta")
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def payload_of(shapes: dict[str, list[int]]) -> int:
    """Return the bytes of parameters of these shapes."""
    return 4 * sum(map(math.prod, shapes.values()))


def make_model(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write random parameters, a tensor at a time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        for shape in shapes.values():
            file.write(torch.randn(math.prod(shape), generator=generator).numpy().data)


def mapped(path: Path, shapes: dict[str, list[int]]) -> dict[str, Any]:
    import torch

    flat = torch.from_file(str(path), shared=True, size=path.stat().st_size // 4)
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def section(store: str, presigned: bool) -> Any:
    from photon.config.compose import compose

    signed = f"link.store.presigned={str(presigned).lower()}"
    return compose(["link.transport=store", f"link.store.url={store}", signed]).link


class Watch:
    """Seconds and memory of the phases of one process, beyond what it held before the first one."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float, int, tuple[int, int]]] = []

    @contextmanager
    def phase(self, what: str, copies: int) -> Iterator[None]:
        peak = Peak()
        begin = time.perf_counter()
        with sampled(lambda: peak.sample(os.getpid())):
            yield
        self.told.append((what, time.perf_counter() - begin, copies, (peak.resident, peak.anonymous)))


def texts(records: Any) -> dict[str, dict[str, Any]]:
    return {name: dict(record) for name, record in records.items()}


def from_texts(content: dict[str, dict[str, Any]]) -> Any:
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({name: ConfigRecord(record) for name, record in content.items()})


def play_server(pipe: Any, store: str, presigned: bool, folder: Path, shapes: dict[str, list[int]]) -> None:
    import torch

    from photon.link.transport import ServerLink
    from photon.strategy.fold import WeightedMean

    torch.set_num_threads(1)
    watch = Watch()
    link = ServerLink(section(store, presigned), folder / "server", 3600)
    groups = {"params": mapped(folder / "model", shapes)}
    with watch.phase("write the model", 1):
        records = link.send(groups, "bench", 1)
    tickets, requests = [], []
    for _ in range(2):
        request = from_texts(texts(records))
        tickets.append(link.admit(request, payload_of(shapes), "bench", 1))
        requests.append(texts(request))
    pipe.send(requests)
    replies = pipe.recv()
    mean = WeightedMean()
    with watch.phase("read, verify, fold two replies", 2):
        for ticket, reply in zip(tickets, replies, strict=True):
            mean.add(link.receive(from_texts(reply), ticket), 1.0)
    for name, tensor in mean.result()["params"].items():
        assert torch.equal(tensor, groups["params"][name]), name
    link.collect("bench", None)
    pipe.send(watch.told)


def play_silo(
    pipe: Any,
    request: Any,
    number: int,
    store: str,
    presigned: bool,
    folder: Path,
    shapes: dict[str, list[int]],
) -> None:
    import torch

    from photon.link.encoding import Pipelines, pack_groups
    from photon.link.records import dense_groups
    from photon.link.transport import SiloLink

    torch.set_num_threads(1)
    watch = Watch()
    link = SiloLink(None if presigned else store, folder / f"silo-{number}")
    content = from_texts(request)
    with watch.phase("read and verify the model", 1):
        groups = dense_groups(link.receive(content))
    with watch.phase("write the reply", 1):
        reply = link.send(pack_groups(groups, Pipelines()), content)
    pipe.send((texts(reply), watch.told))


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    parts = ["rounds", "transport"]
    made.add_argument("--only", nargs="+", choices=parts, default=parts)
    made.add_argument("--size-mb", type=int, nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    made.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument(
        "--rounds", type=at_least(3), default=5, help="rounds of a run; the first and the last do not count"
    )
    made.add_argument("--store", help="URL of the store; a folder beside the run by default")
    made.add_argument(
        "--presigned", action="store_true", help="the server signs the silos' requests (transport)"
    )
    made.add_argument("--folder", type=Path, help="where temporary files go: 27 GB for transport")
    return made.parse_args()


if __name__ == "__main__":
    main()
