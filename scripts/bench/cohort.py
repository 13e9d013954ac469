"""What a round costs with few silos and with many, beside Flower's FedAvg: processor time and wall time.

    python scripts/bench/cohort.py                                    # all cases, half an hour
    python scripts/bench/cohort.py --engine inprocess --silos 4 1000
    python scripts/bench/cohort.py --table                            # of the lines that are there

The model has some ten thousand parameters and trains one local step a round, so a round is hardly more than
what belongs to it. Four silos are in a cohort, or all. Flower's client returns its arrays unchanged, and its
evaluation is off; Photon trains, evaluates and writes checkpoints. Rounds in which all silos measure the
model, and the first ones, do not count. Each case is a line of ``--lines``.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import Report, at_least, machine, parser
from round_overhead import WARM_UP, flower_ends, flower_inprocess, prepare_data, shapes_of
from usage import sampled

LINES = Path(__file__).parents[2] / "docs" / "results" / "round-cost.jsonl"
FEW = 4


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    report = Report(arguments)
    if not arguments.table:
        with tempfile.TemporaryDirectory(prefix="photon-bench-") as name:
            for engine, silos, everybody in itertools.product(
                arguments.engine, arguments.silos, (False, True)
            ):
                if everybody and (silos == FEW or silos > arguments.most_in_a_round):
                    continue
                for who in ("photon", "flower"):
                    line = measure(
                        engine, silos, None if everybody else FEW, who, Path(name), arguments.rounds
                    )
                    with arguments.lines.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    report.table("What a round costs", *table_of(arguments.lines))
    report.close()


def measure(
    engine: str, silos: int, cohort: int | None, who: str, folder: Path, rounds: int
) -> dict[str, Any]:
    """Do a run; return what a round of it costs."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    config = config_of(engine, cohort, many_silos(folder, silos), run_dir, rounds)
    drawn = silos if cohort is None else cohort
    kilobytes = None
    if who == "flower":
        costs = flower_costs(engine, config, silos, drawn, folder, run_dir, rounds)
    else:
        costs = photon_costs(engine, config, run_dir)
        kilobytes = events_of_a_round(run_dir)
    return {
        "engine": engine,
        "silos": silos,
        "cohort": drawn,
        "who": who,
        "cpu_ms": round(1e3 * statistics.median(cpu for cpu, _ in costs), 1),
        "wall_ms": round(1e3 * statistics.median(wall for _, wall in costs), 1),
        "events_kb": kilobytes,
        "rounds": len(costs),
        "date": date.today().isoformat(),
        "machine": machine(),
        "load": round(os.getloadavg()[0], 1),
    }


def config_of(engine: str, cohort: int | None, data: Path, run_dir: Path, rounds: int) -> Any:
    from photon.config.compose import compose

    return compose(
        [
            *(f"federation={engine}", "data=prepared", f"data.path={data}", f"run_dir={run_dir}"),
            *("model.architecture.n_layer=1", "model.architecture.n_embd=16", "model.architecture.n_head=2"),
            *("model.sequence_length=16", f"rounds={rounds}", "local_steps=1", "training.batch_size=1"),
            *("training.threads=1", "schedule.warmup_steps=0", "training.precision=fp32"),
            *(f"cohort={'null' if cohort is None else cohort}", "evaluation.sequences=1"),
            *("federation.silos_in_parallel=2", "telemetry.display=none", "telemetry.report=false"),
            *("telemetry.export=false", "telemetry.sample_tokens=0"),
        ]
    )


def many_silos(folder: Path, count: int) -> Path:
    """Prepare so many silos of the same few windows."""
    from photon.data.prepared import MANIFEST_NAME, SPLITS, PreparedData, silo_file

    target = folder / f"silos-{count}"
    if target.exists():
        return target
    first = folder / "data"
    whole = PreparedData.open(first if first.exists() else prepare_data(folder))
    shutil.copytree(whole.tokenizer_path, target / "tokenizer")
    entry, silos = whole.manifest.silos["a"], {}
    windows = {split: whole.windows("a", split)[:8] for split in SPLITS}
    for split, part in windows.items():
        size = {"sequences": len(part), "tokens": len(part) * whole.manifest.sequence_length}
        entry = entry.model_copy(update={split: getattr(entry, split).model_copy(update=size)})
    for name in (f"silo-{number:04d}" for number in range(count)):
        (target / "silos" / name).mkdir(parents=True)
        np.save(silo_file(target, name, "unigram"), whole.unigram("a"))
        for split in SPLITS:
            np.save(silo_file(target, name, split), windows[split])
        silos[name] = entry
    (target / MANIFEST_NAME).write_text(whole.manifest.model_copy(update={"silos": silos}).model_dump_json())
    return target


def photon_costs(engine: str, config: Any, run_dir: Path) -> list[tuple[float, float]]:
    from photon.engine.inprocess import run_inprocess
    from photon.engine.simulation import Simulation
    from photon.federation.run import prepare_run
    from photon.node import answer
    from photon.telemetry.events import Checkpointed
    from photon.telemetry.log import read_events

    with processor_time(own=engine == "inprocess") as used:
        if engine == "inprocess":
            run_inprocess(prepare_run(config), answer, resume=False, live=False)
        else:
            Simulation(prepare_run(config), resume=False).run()
    ends = [event.clock for event in read_events(run_dir / "events.jsonl") if isinstance(event, Checkpointed)]
    # The last one is measured by all.
    return between(ends[:-1], used)


def flower_costs(
    engine: str, config: Any, silos: int, drawn: int, folder: Path, run_dir: Path, rounds: int
) -> list[tuple[float, float]]:
    from photon.federation.run import prepare_run

    if engine == "inprocess":
        # Its grid answers in this process; each node is a client.
        return [(t.cpu, t.wall) for t in flower_inprocess(shapes_of(config), rounds, drawn)]
    run_dir.mkdir()
    with processor_time(own=False) as used:
        ends = flower_ends(prepare_run(config), folder / "app", run_dir, rounds, silos, drawn / silos)
    return between(ends, used)


@contextmanager
def processor_time(*, own: bool) -> Iterator[list[tuple[float, float]]]:
    """Yield moments of the monotonic clock, each with the processor time that was used until then.

    Parameters
    ----------
    own
        Whether it is that of this process, or that of its descendants.
    """
    found: list[tuple[float, float]] = []
    children: dict[int, float] = {}

    def sample() -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = process.cpu_times()
                children[process.pid] = times.user + times.system
        found.append((time.monotonic(), sum(children.values())))

    def sample_own() -> None:
        found.append((time.monotonic(), time.process_time()))

    with sampled(sample_own, 0.005) if own else sampled(sample, 0.05):
        yield found


def between(ends: list[Any], used: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return processor and wall time of the rounds that count, by when each ended."""
    clock, total = zip(*used, strict=True)
    spent = [float(np.interp(end, clock, total)) for end in ends]
    counted = list(zip(ends, spent, strict=True))[WARM_UP:]
    return [(b[1] - a[1], b[0] - a[0]) for a, b in itertools.pairwise(counted)]


def events_of_a_round(run_dir: Path) -> float:
    """Return the kilobytes of events of a round in which not all silos measure the model, the median."""
    sizes: dict[int, int] = {}
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        if (number := json.loads(line).get("round")) is not None:
            sizes[number] = sizes.get(number, 0) + len(line) + 1
    return round(statistics.median(sizes[number] for number in sorted(sizes)[1:-1]) / 1000, 1)


def table_of(lines: Path) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the newest line of each case."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in lines.read_text().splitlines():
        line = json.loads(text)
        newest[line["engine"], line["silos"], line["cohort"], line["who"]] = line
    heads = ["engine", "silos", "cohort", "CPU ms", "wall ms", "events kB"]
    heads += ["Flower's CPU ms", "Flower's wall ms", "load", "date"]
    rows = []
    for (engine, silos, cohort, who), line in sorted(newest.items(), key=lambda item: item[0]):
        if who != "photon":
            continue
        other = newest.get((engine, silos, cohort, "flower"), {})
        figures = [line["cpu_ms"], line["wall_ms"], line["events_kb"]]
        figures += [*map(other.get, ("cpu_ms", "wall_ms")), line["load"]]
        cells = ["–" if figure is None else f"{figure:,}" for figure in figures]
        rows.append([engine, f"{silos:,}", f"{cohort:,}", *cells, line["date"]])
    return heads, rows


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    engines = ["inprocess", "simulation"]
    made.add_argument("--engine", nargs="+", choices=engines, default=engines)
    made.add_argument("--silos", type=int, nargs="+", default=[4, 32, 100, 1000])
    made.add_argument(
        "--rounds",
        type=at_least(WARM_UP + 2),
        default=10,
        help="rounds of a run; the first three do not count",
    )
    made.add_argument("--most-in-a-round", type=int, default=100, help="silos up to which all train, too")
    made.add_argument("--lines", type=Path, default=LINES, help="file that the lines are appended to")
    made.add_argument("--table", action="store_true", help="measure nothing, show the lines that are there")
    return made.parse_args()


if __name__ == "__main__":
    main()
