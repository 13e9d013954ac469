"""What a round costs beside training: wall time less the slowest silo's training, evaluation excluded.

    python scripts/bench/round_overhead.py                        # both engines, 1 MB and 50 MB
    python scripts/bench/round_overhead.py --engine inprocess

The model is real and trains one local step on one short sequence a round, so the rest is the round itself.
On the in-process grid one silo answers, and the parts of the overhead are timed where they happen. On
Flower's simulation engine two silos answer in parallel. Flower's own FedAvg, with a client that returns its
arrays unchanged, stands beside both: the same payload on the same grid or engine, its evaluation off too. It
checks no values, builds no model and keeps nothing on disk. The first rounds, which start processes and build
the model, do not count. Runs alternate: Photon, Flower, Flower, Photon.
"""

import argparse
import functools
import importlib
import itertools
import json
import logging
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import Report, Timing, at_least, parser, spread, timed

SEQUENCE_LENGTH = 16
#: Rounds at the start that do not count.
WARM_UP = 3
MODELS = {1: {"n_layer": 1, "n_embd": 128}, 50: {"n_layer": 4, "n_embd": 512}}

#: Where a round's time goes: label, then the functions by module and name. Names that are imported into a
#: module are replaced there.
WHOLE = "the whole round"
TRAINING = "training"
FILES = "for comparison: files of these sizes, written and flushed"
CLOCKS = ("cpu", "wall")
PARTS = {
    WHOLE: ["photon.federation.federation.Federation._round"],
    TRAINING: ["photon.training.loop.LocalTrainer.train"],
    "server: load and encode the model": ["photon.link.transport.ServerLink.send"],
    "server: decode the reply": ["photon.link.transport.ServerLink.receive"],
    "server: check every value": [
        "photon.federation.admission.problem_with",
        "photon.federation.admission.measure",
    ],
    "server: fold": ["photon.strategy.fold.WeightedMean.add"],
    "server: outer step": ["photon.strategy.outer.OuterOptimizer.step"],
    (CHECKPOINT := "server: checkpoint, flushed"): [
        "photon.state.checkpoint.save_groups",
        "photon.state.checkpoint.sync_files",
    ],
    "silo: read the configuration": ["photon.config.compose.parse"],
    "silo: open the data": ["photon.data.prepared.PreparedData.open"],
    "silo: last state from disk": ["photon.state.silo.SiloStore.load", "photon.state.silo.SiloStore.reply"],
    "silo: parameters into the model": ["photon.silo.fit.write_params"],
    "silo: state of the local optimizer into it": ["photon.silo.fit.write_optimizer"],
    "silo: norm of the update": ["photon.silo.train.distance"],
    (STATE := "silo: state and reply to disk"): ["photon.state.silo.SiloStore.save"],
    "silo: encode the reply": ["photon.link.transport.SiloLink.send"],
}

ON_DISK = (CHECKPOINT, STATE)


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    report = Report(arguments)
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as name:
        folder = Path(name)
        data = prepare_data(folder)
        for size in arguments.size_mb:
            if "inprocess" in arguments.engine:
                compare_inprocess(report, size, data, folder, arguments)
            if "simulation" in arguments.engine:
                compare_simulation(report, size, data, folder, arguments)
    report.close()


# --- set-up -----------------------------------------------------------------------------------------


def prepare_data(folder: Path) -> Path:
    """Prepare two tiny silos of random words."""
    from photon.data.prepare import prepare

    sources: dict[str, list[Path]] = {}
    for silo in ("a", "b"):
        generator = random.Random(silo)
        source = folder / "text" / silo
        source.mkdir(parents=True)
        for document in range(20):
            words = ("".join(generator.choices("abcdefghij", k=5)) for _ in range(100))
            (source / f"{document}.txt").write_text(" ".join(words))
        sources[silo] = [source]
    prepare(
        sources,
        folder / "data",
        vocab_size=300,
        sequence_length=SEQUENCE_LENGTH,
        validation_fraction=0.2,
        seed=0,
        progress=False,
    )
    return folder / "data"


def config_of(size: int, engine: str, cohort: int, data: Path, run_dir: Path, rounds: int) -> Any:
    from photon.config.compose import compose

    return compose(
        [
            *(f"federation={engine}", "data=prepared", f"data.path={data}", f"run_dir={run_dir}"),
            *(f"model.architecture.{key}={value}" for key, value in MODELS[size].items()),
            *("model.architecture.n_head=2", f"model.sequence_length={SEQUENCE_LENGTH}"),
            *(f"rounds={rounds}", "local_steps=1", "training.batch_size=1", "training.threads=1"),
            "federation.silos_in_parallel=2",
            *(f"cohort={cohort}", "schedule.warmup_steps=0", "training.precision=fp32"),
            *("evaluation.every=1000000", "evaluation.sequences=1", "telemetry.display=none"),
            *("telemetry.report=false", "telemetry.export=false"),
        ]
    )


def shapes_of(config: Any) -> dict[str, list[int]]:
    from photon.models.build import build_model

    model = build_model(config.model, 300, seed=0, device="meta")
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def overheads(run_dir: Path) -> list[float]:
    """Return milliseconds of overhead of the rounds that count."""
    from photon.telemetry.events import RoundFinished
    from photon.telemetry.log import read_events

    rounds = [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, RoundFinished)]
    # The last round is the one that is evaluated; its evaluation is taken off, as is any other.
    return [1e3 * (r.seconds["overhead"] - r.seconds["evaluate"]) for r in rounds[WARM_UP:]]


# --- in-process grid --------------------------------------------------------------------------------


def compare_inprocess(
    report: Report, size: int, data: Path, folder: Path, arguments: argparse.Namespace
) -> None:
    from photon.engine.inprocess import run_inprocess
    from photon.federation.run import prepare_run
    from photon.node import answer

    photon: list[Timing] = []
    flower: list[Timing] = []
    parts: dict[str, list[Timing]] = defaultdict(list)
    payload = 0

    def run_photon() -> None:
        nonlocal payload
        run_dir = folder / "run"
        config = prepare_run(config_of(size, "inprocess", 1, data, run_dir, arguments.rounds))
        with timed_parts() as rounds:
            run_inprocess(config, answer, resume=False, live=False)
        # The last round is the one that is evaluated.
        for timings in rounds[WARM_UP:-1]:
            whole, training = timings.pop(WHOLE), timings.pop(TRAINING)
            photon.append(Timing(whole.cpu - training.cpu, whole.wall - training.wall))
            for label, timing in timings.items():
                parts[label].append(timing)
        payload = next((run_dir / "checkpoints").glob("round-*/params.safetensors")).stat().st_size
        parts[FILES].extend(flush_files(folder, payload))
        shutil.rmtree(run_dir)

    def run_flower() -> None:
        config = config_of(size, "inprocess", 1, data, folder / "run", arguments.rounds)
        flower.extend(flower_inprocess(shapes_of(config), arguments.rounds))

    for turn in (run_photon, run_flower, run_flower, run_photon):
        turn()
    in_memory = [
        Timing(
            *(getattr(whole, clock) - sum(getattr(parts[p][i], clock) for p in ON_DISK) for clock in CLOCKS)
        )
        for i, whole in enumerate(photon)
    ]
    rows = {"Photon": photon, "Photon, all but writing to disk": in_memory, "Flower's FedAvg": flower}
    report.table(
        f"In-process grid, {payload / 1e6:.1f} MB, one silo: milliseconds a round beside training",
        ["", "CPU", "wall"],
        [[name, *(milliseconds(timings, clock) for clock in CLOCKS)] for name, timings in rows.items()],
        raw={name: [asdict(timing) for timing in timings] for name, timings in rows.items()},
    )
    report.table(
        "Parts of Photon's: milliseconds a round",
        ["part", "CPU", "wall"],
        [[label, *(milliseconds(timings, clock) for clock in CLOCKS)] for label, timings in parts.items()],
        raw={label: [asdict(timing) for timing in timings] for label, timings in parts.items()},
    )


def milliseconds(timings: list[Timing], clock: str) -> str:
    return spread([1e3 * getattr(timing, clock) for timing in timings], 1)


@contextmanager
def timed_parts() -> Iterator[list[dict[str, Timing]]]:
    """Time the functions in ``PARTS``; yields the list of what they took in each round.

    Calls inside one another count once, for the outer one.
    """
    rounds: list[dict[str, Timing]] = []
    inside: list[str] = []

    def wrap(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if label == WHOLE:
                rounds.append(dict.fromkeys(PARTS, Timing(0.0, 0.0)))
            elif not rounds or inside:
                return function(*args, **kwargs)
            else:
                inside.append(label)
            result: list[Any] = []
            try:
                spent = timed(lambda: result.append(function(*args, **kwargs)))
            finally:
                inside.clear()
            before = rounds[-1][label]
            rounds[-1][label] = Timing(before.cpu + spent.cpu, before.wall + spent.wall)
            return result[0]

        return measured

    with ExitStack() as stack:
        for label, names in PARTS.items():
            for name in names:
                target, attribute = name.rsplit(".", 1)
                owner = find(target)
                original = owner.__dict__[attribute]
                if isinstance(original, classmethod):
                    replaced: Any = classmethod(wrap(label, original.__func__))
                else:
                    replaced = wrap(label, original)
                stack.enter_context(patch.object(owner, attribute, replaced))
        yield rounds


def find(dotted: str) -> Any:
    """Import a module or a class in one."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


def flush_files(folder: Path, payload: int) -> list[Timing]:
    """Time writing what a round writes: moments, reply, checkpoint, and their small files."""

    def write() -> None:
        for number, size in enumerate((2 * payload, payload, payload, 1000, 1000)):
            with open(folder / f"plain-{number}", "wb") as file:
                file.write(b"x" * size)
                file.flush()
                os.fsync(file.fileno())

    return [timed(write) for _ in range(3)]


def flower_inprocess(shapes: dict[str, list[int]], rounds: int, nodes: int = 1) -> list[Timing]:
    import numpy as np
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from photon.engine.inprocess import InProcessGrid

    def answer(_type: object, content: RecordDict, _node_config: object) -> RecordDict:
        return RecordDict({"arrays": content["arrays"], "metrics": MetricRecord({"num-examples": 1.0})})

    ends: list[Timing] = []
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    arrays = {name: Array(np.full(shape, 0.5, np.float32)) for name, shape in shapes.items()}
    strategy.start(
        InProcessGrid(answer, {node: {} for node in range(1, nodes + 1)}),
        ArrayRecord(arrays),
        num_rounds=rounds,
        evaluate_fn=lambda _round, _arrays: ends.append(Timing(time.process_time(), time.perf_counter())),
    )
    return [Timing(b.cpu - a.cpu, b.wall - a.wall) for a, b in itertools.pairwise(ends[WARM_UP:])]


# --- simulation engine ------------------------------------------------------------------------------


def compare_simulation(
    report: Report, size: int, data: Path, folder: Path, arguments: argparse.Namespace
) -> None:
    from photon.engine.simulation import Simulation
    from photon.errors import RunError
    from photon.federation.run import prepare_run

    photon: list[float] = []
    flower: list[float] = []
    checkpoint: list[float] = []
    run_dir = folder / "run"

    def config() -> Any:
        return prepare_run(config_of(size, "simulation", 2, data, run_dir, arguments.rounds))

    def run_photon() -> None:
        from photon.telemetry.events import RoundFinished, SiloFinished
        from photon.telemetry.log import read_events

        try:
            Simulation(config(), resume=False).run()
        except RunError as error:
            log = run_dir / "flower" / "app.log"
            raise SystemExit(f"{error}\n{log.read_text()[-3000:] if log.exists() else ''}") from error
        photon.extend(overheads(run_dir))
        events = list(read_events(run_dir / "events.jsonl"))
        saves: dict[int, float] = defaultdict(float)
        for event in events:
            if isinstance(event, SiloFinished):
                saves[event.round] = max(saves[event.round], event.seconds["save"])
        for event in events:
            if isinstance(event, RoundFinished) and event.round > WARM_UP:
                checkpoint.append(1e3 * (event.seconds["checkpoint"] + saves[event.round]))
        shutil.rmtree(run_dir)

    def run_flower() -> None:
        run_dir.mkdir()
        flower.extend(flower_simulation(config(), folder / "app", run_dir, arguments.rounds))
        shutil.rmtree(run_dir)

    for turn in (run_photon, run_flower, run_flower, run_photon):
        turn()
    without_disk = [total - disk for total, disk in zip(photon, checkpoint, strict=True)]
    report.table(
        f"Simulation engine, model of {size} MB, two silos: milliseconds a round",
        ["overhead of a round", "median (min – max)", "ratio to Flower"],
        [
            [name, spread(values, 0), f"{statistics.median(values) / statistics.median(flower):.2f}"]
            for name, values in (
                ("Flower's FedAvg", flower),
                ("Photon", photon),
                ("Photon without checkpoint and silo state on disk", without_disk),
            )
        ],
        raw={"photon": photon, "flower": flower, "disk": checkpoint},
    )


FLOWER_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fedavg-bench"
version = "0.1.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]
[tool.flwr.app]
publisher = "photon"
[tool.flwr.app.components]
serverapp = "fedavg_bench:server"
clientapp = "fedavg_bench:client"
[tool.flwr.app.config]
settings = ""
"""

FLOWER_APP = """\
import json, time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

# Flower looks for these names in the text; each needs a line of its own.
client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1.0})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


@server.main()
def main(grid, context):
    settings = json.loads(Path(context.run_config["settings"]).read_text())
    arrays = {name: Array(np.full(s, 0.5, np.float32)) for name, s in settings["shapes"].items()}
    ends = []
    FedAvg(fraction_train=settings["fraction"], fraction_evaluate=0.0).start(
        grid,
        ArrayRecord(arrays),
        num_rounds=settings["rounds"],
        evaluate_fn=lambda _round, _arrays: ends.append(time.perf_counter()),
    )
    Path(settings["output"]).write_text(json.dumps(ends))
"""


def flower_simulation(config: Any, app: Path, run_dir: Path, rounds: int) -> list[float]:
    """Run Flower's FedAvg under a SuperLink of its own; return milliseconds of the rounds that count."""
    ends = flower_ends(config, app, run_dir, rounds, config.federation.silos_in_parallel, 1.0)
    return [1e3 * (b - a) for a, b in itertools.pairwise(ends[WARM_UP:])]


def flower_ends(
    config: Any, app: Path, run_dir: Path, rounds: int, nodes: int, fraction: float
) -> list[float]:
    """Run Flower's FedAvg on so many nodes, a fraction of them a round; return when each round ended."""
    from photon.engine.signals import interruptible
    from photon.engine.simulation import CONNECTION, Simulation

    (app / "fedavg_bench").mkdir(parents=True, exist_ok=True)
    (app / "pyproject.toml").write_text(FLOWER_PYPROJECT)
    (app / "fedavg_bench" / "__init__.py").write_text(FLOWER_APP)
    output = run_dir / "ends.json"
    settings = {"shapes": shapes_of(config), "rounds": rounds, "output": str(output), "fraction": fraction}
    (run_dir / "settings.json").write_text(json.dumps(settings))
    cores = os.cpu_count() or 1
    parallel = config.federation.silos_in_parallel
    # The same resources as photon.engine.simulation asks for.
    resources = (
        f"num-supernodes={nodes} client-resources-num-cpus={max(1, cores // parallel)} "
        f"client-resources-num-gpus=0 init-args-num-cpus={cores}"
    )

    class Baseline(Simulation):
        def run(self) -> None:
            with interruptible(), self.superlink():
                answer = self.connection.flwr(
                    *("run", str(app), CONNECTION, "--federation-config", resources, "--format", "json"),
                    *("--run-config", f"settings='{run_dir / 'settings.json'}'"),
                )
                run_id = str(json.loads(answer)["run-id"])
                while not self.connection.status(run_id).startswith("finished"):
                    time.sleep(1)
                if not output.exists():
                    raise SystemExit(self.connection.log(run_id)[-3000:])

    Baseline(config, resume=False).run()
    ends: list[float] = json.loads(output.read_text())
    return ends


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    engines = ["inprocess", "simulation"]
    made.add_argument("--engine", nargs="+", choices=engines, default=engines)
    made.add_argument("--size-mb", type=int, nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    made.add_argument(
        "--rounds",
        type=at_least(WARM_UP + 2),
        default=13,
        help="rounds of a run; the first three do not count",
    )
    return made.parse_args()


if __name__ == "__main__":
    main()
