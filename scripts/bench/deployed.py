"""What a round of a deployment costs beside training: two silos on loopback, TLS and node keys.

    python scripts/bench/deployed.py                                # 10 MB: messages, store, standing request
    python scripts/bench/deployed.py --size-mb 500 --case standing

The programs are those that ``scripts/federation.sh up`` starts: a SuperLink with a database, a SuperExec, and
``photon silo run`` for each silo. Real models train for one local step a round, plain SGD. The overhead of a
round is its wall time less the slowest silo's training; with ``--evaluate`` the evaluation after each round
is shown apart. The first rounds, in which workers start and files come from disk for the first time, and the
last one, after which all silos evaluate, do not count.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from common import Report, at_least, parser, spread
from round_overhead import prepare_data
from store import MODELS, config_of, overheads
from usage import Usage, sampled

#: What a run is given beside `config_of`, by how its rounds travel.
CASES = {
    "inline": [],
    "store": [],
    "standing": ["federation.lease=30"],
}
#: Rounds at the start and at the end that do not count.
FIRST, LAST = 2, 1


@dataclass
class Rounds:
    """Seconds of overhead and of evaluation by round; mean CPU seconds of all processes."""

    overhead: list[float]
    evaluation: list[float]
    cpu: float


def main() -> None:
    arguments = parse_arguments()
    report = Report(arguments)
    rows, raw = [], []
    for size in arguments.size_mb:
        for case in arguments.case:
            with tempfile.TemporaryDirectory(prefix="photon-bench-", dir=arguments.folder) as folder:
                load = os.getloadavg()[0]
                measured = run_case(case, size, Path(folder), arguments)
            rows.append(
                [
                    f"{size} MB, {case}",
                    *(spread(values, 2) for values in (measured.overhead, measured.evaluation)),
                    f"{measured.cpu:.2f}",
                ]
            )
            report.say(" · ".join(rows[-1]))
            raw.append({"size_mb": size, "case": case, "load": load, **vars(measured)})
    report.table(
        "Deployment, two silos, TLS: seconds a round, and mean CPU seconds of all processes",
        ["model", "overhead", "evaluation", "CPU"],
        rows,
        raw=raw,
    )
    report.close()


def run_case(case: str, size: int, folder: Path, arguments: argparse.Namespace) -> Rounds:
    store = str(folder / "store")
    run_dir = folder / "run"
    every = 1 if arguments.evaluate else 1000000
    overrides = [*CASES[case], f"evaluation.every={every}"]
    carrier = "inline" if case == "inline" else "store"
    config = config_of(size, carrier, run_dir, store, arguments.rounds, *overrides)
    usage = Usage()
    with federation(folder, store) as (connection, family), sampled(lambda: usage.sample(family()), 0.5):
        run_id = connection.submit(config, resume=False, settings=folder / "submitted.toml")
        wait_for(run_dir / "summary.json", connection, run_id, folder / "federation" / "logs")
    return figures(run_dir, usage)


def figures(run_dir: Path, usage: Usage) -> Rounds:
    from photon.telemetry.events import Evaluated, RoundFinished
    from photon.telemetry.log import read_events

    events = read_events(run_dir / "events.jsonl")
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    moments, overhead = overheads(run_dir)
    counted = slice(FIRST, -LAST)
    evaluated = any(isinstance(event, Evaluated) and event.round == 1 for event in events)
    return Rounds(
        overhead[counted],
        [one.seconds["evaluate"] if evaluated else 0.0 for one in rounds][counted],
        statistics.mean(usage.between(moments)[counted]),
    )


@contextmanager
def federation(folder: Path, store: str) -> Iterator[tuple[Any, Any]]:
    """Start a federation of two silos; yield its connection, and who has come of it."""
    from photon.data.prepared import PreparedData
    from photon.data.separate import separate_silo
    from photon.deployment.local import LocalFederation
    from photon.engine.processes import stop_tree

    source = PreparedData.open(prepare_data(folder))
    place = folder / "federation"
    made = LocalFederation.create(place, source.silo_names, secure=True, node_config=f'store-url="{store}"')
    for silo in made.silos:
        separate_silo(source, silo, made.silo_folder(silo) / "data")
    processes: list[subprocess.Popen[bytes]] = []

    def family() -> list[psutil.Process]:
        mine = str(folder)
        return [
            process
            for process in psutil.process_iter(["cmdline", "ppid"])
            if any(mine in word for word in process.info["cmdline"] or ())
            or any(process.info["ppid"] == one.pid for one in processes)
        ]

    try:
        programs = list(made.programs())
        processes.append(programs[0].start(supervised=False))
        made.wait_until_up(processes[0])
        processes.append(programs[1].start(supervised=False))
        for silo, program in zip(made.silos, programs[2:], strict=True):
            made.register(silo)
            processes.append(program.start(supervised=False))
        while made.nodes_online() < len(made.silos):
            time.sleep(0.5)
        yield made.connection, family
    finally:
        for process in reversed(processes):
            stop_tree(process, at_once=False)


def wait_for(result: Path, connection: Any, run_id: str, logs: Path) -> None:
    """Wait until a run has written its result. Flower is asked seldom: each question starts a process."""
    for second in itertools.count():
        if result.exists():
            return
        time.sleep(1.0)
        if second % 60 == 59 and connection.status(run_id).startswith("finished") and not result.exists():
            tails = "\n".join(file.read_text()[-1500:] for file in sorted(logs.glob("*.log")))
            raise SystemExit(f"{connection.log(run_id)[-3000:]}\n{tails}")


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--size-mb", type=int, nargs="+", choices=sorted(MODELS), default=[10])
    made.add_argument(
        "--rounds",
        type=at_least(FIRST + LAST + 1),
        default=8,
        help="rounds of a run; the first two and the last do not count",
    )
    made.add_argument("--evaluate", action="store_true", help="let the silos evaluate after each round")
    made.add_argument("--folder", type=Path, help="where temporary files go")
    return made.parse_args()


if __name__ == "__main__":
    main()
