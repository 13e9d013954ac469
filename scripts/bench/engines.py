"""One run of four silos on every engine: seconds and bytes of a round, memory of processes, equal weights.

    python scripts/bench/engines.py                          # all four engines
    python scripts/bench/engines.py --only deployment tls

The silos hold the embedded corpus. A deployment is what ``scripts/federation.sh up`` starts: a SuperLink with
a database, a SuperExec and a supervised SuperNode for each silo. On one machine all silos share its cores, so
"training" is the sum of their training where they take turns, and the slowest one's where they do not; what a
round takes besides is overhead. The first round starts workers and is shown apart. All engines must end with
the very same weights, or the script fails.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import psutil
from common import Report, at_least, parser
from usage import KINDS, Peak, Usage, sampled

ENGINES = ("inprocess", "simulation", "deployment", "tls")
SILOS = 4


def main() -> None:
    """Measure the engines one after the other."""
    arguments = read_arguments()
    report = Report(arguments)
    rows, memory, weights = [], [], {}
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as folder:
        for engine in arguments.only:
            usage = Usage()
            run_dir = Path(folder) / engine
            with reached(engine, Path(folder)) as (overrides, environment):
                train(run_dir, [*overrides, *settings(arguments)], environment, usage, Path(folder))
            summary = json.loads((run_dir / "summary.json").read_text())
            weights[engine] = summary["weights_sha256"]
            rows.append([engine, *figures(run_dir), f"{summary['perplexity']['final']:.2f}"])
            memory.append([engine, *(str(usage.peaks.get(kind, Peak())) for kind in KINDS.values())])
            report.say(" · ".join(rows[-1]))
    columns = ["first round", "later rounds", "training", "overhead", "evaluation", "MB up", "MB down"]
    report.table(
        f"Four silos, {arguments.local_steps} local steps: median seconds and bytes a round",
        ["engine", *columns, "perplexity"],
        rows,
        raw=[{"weights_sha256": weights}],
    )
    report.table(
        "Most MiB resident (anonymous) in one process; 0: there is no such process",
        ["engine", *KINDS.values()],
        memory,
    )
    report.close()
    if len(set(weights.values())) > 1:
        raise SystemExit(f"the engines differ in their weights: {weights}")
    report.say("all engines end with the same weights")


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES), help="engines to run")
    options.add_argument("--rounds", type=at_least(2), default=5, help="rounds of a run")
    options.add_argument("--local-steps", type=int, default=16, help="local steps of a round")
    return options.parse_args()


def settings(arguments: argparse.Namespace) -> list[str]:
    """Return the run: the quickstart's model, every silo in every round."""
    return [
        *(f"rounds={arguments.rounds}", f"local_steps={arguments.local_steps}", "cohort=null"),
        *(
            "schedule.warmup_steps=0",
            "training.threads=1",
            "training.precision=fp32",
            "evaluation.sequences=16",
        ),
        *("telemetry.display=none", "telemetry.report=false", "telemetry.export=false"),
        "telemetry.sample_tokens=0",
    ]


@contextmanager
def reached(engine: str, folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield overrides and environment by which ``photon train`` reaches an engine; start it where needed."""
    if engine in ("inprocess", "simulation"):
        yield [f"federation={engine}"], dict(os.environ)
        return
    from photon.deployment.federation import down, up
    from photon.deployment.local import LocalFederation

    place = folder / f"federation-{engine}"
    with open(folder / "up.log", "a") as log, redirect_stdout(log):
        up(place, silos=str(SILOS), data=None, secure=engine == "tls")
    try:
        federation = LocalFederation.open(place)
        yield (
            [
                *("federation=deployment", f"federation.silos={SILOS}", "data=prepared"),
                f"data.path={place / 'aggregator'}",
            ],
            {**os.environ, "FLWR_HOME": str(federation.home)},
        )
    finally:
        with open(folder / "up.log", "a") as log, redirect_stdout(log):
            down(place)
        shutil.rmtree(place)


def train(
    run_dir: Path, overrides: list[str], environment: dict[str, str], usage: Usage, folder: Path
) -> None:
    """Run ``photon train`` to its end, watching every process that belongs to it."""
    command = [sys.executable, "-m", "photon.cli", "train", f"run_dir={run_dir}", *overrides]
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def sample() -> None:
        of_the_deployment = [
            one
            for one in psutil.process_iter(["cmdline"])
            if any(str(folder) in word for word in one.info["cmdline"] or ())
        ]
        usage.sample(
            [process, *process.children(recursive=True)]
            + [one for one in of_the_deployment if one != process]
        )

    with sampled(sample, 0.5):
        _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{said.decode()[-3000:]}")


def figures(run_dir: Path) -> list[str]:
    """Return the figures of a run's rounds, as the table shows them."""
    from photon.telemetry.events import RoundFinished
    from photon.telemetry.log import read_events

    rounds = [e for e in read_events(run_dir / "events.jsonl") if isinstance(e, RoundFinished)]
    seconds = [e.seconds for e in rounds]
    work = [s["round"] - s["evaluate"] for s in seconds]
    later = [
        f"{statistics.median(times):.2f}"
        for times in (
            work[1:],
            [s["training"] for s in seconds[1:]],
            [s["overhead"] - s["evaluate"] for s in seconds[1:]],
            [s["evaluate"] for s in seconds[1:]],
        )
    ]
    sent = [
        f"{statistics.median(sizes) / 1e6:.2f}"
        for sizes in ([e.bytes_up for e in rounds], [e.bytes_down for e in rounds])
    ]
    return [f"{work[0]:.2f}", *later, *sent]


if __name__ == "__main__":
    main()
