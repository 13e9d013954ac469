"""Measure what the page on performance shows, and write its tables from the lines that are kept.

    python scripts/bench/performance.py measure                 # all of it, about an hour on two quiet cores
    python scripts/bench/performance.py measure --only fold link
    python scripts/bench/performance.py page                    # docs/performance.md

Each measurement is one script of this folder in a process of its own. What it printed is kept as a line of
`docs/results/performance.jsonl`, with command, machine, load and date; the page has the newest line of each
name. `cohort.py` and `gpu.py` keep lines of their own, and this page has their tables, too.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohort import LINES as ROUND_COST
from cohort import table_of as round_cost

ROOT = Path(__file__).resolve().parents[2]
LINES = ROOT / "docs" / "results" / "performance.jsonl"
PAGE = ROOT / "docs" / "performance.md"
MARK = re.compile(r"(<!-- bench: (?P<name>[\w ,-]+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)

#: What is measured: name → script and arguments, shortest first.
PLAN = {
    "loader": "loader.py",
    "link": "link.py",
    "link, 64 MiB": "link.py --size-mb 64 --turns 3",
    "fold": "fold.py --only speed",
    "ui": "ui.py",
    "secure sum": "secure_sum.py",
    "sparse": "sparse.py",
    "tuning loop": "tuning_loop.py",
    "local loop": "local_loop.py",
    "local loop, the same loss": "local_loop.py --compare overhead",
    "optimizers": "optim.py --layers 1 --vocabulary 4096 --steps 8 --turns 5 --matmul-precision medium",
    "LoRDO, float32": "optim.py --layers 1 --vocabulary 4096 --steps 8 --turns 5 --only LoRDO",
    "Muon, width 64": "optim.py --only Muon --layers 12 --width 64 --vocabulary 512 --steps 2 --threads 1",
    "Muon, width 160": "optim.py --only Muon --layers 12 --width 160 --vocabulary 2048 --steps 2 --threads 1",
    "Muon, width 768": "optim.py --only Muon --layers 1 --vocabulary 4096 --steps 2 --threads 1",
    "prepare, 20 MB": "prepare.py --mb 20 --repeats 3",
    "prepare, 100 MB": "prepare.py --mb 100 --repeats 1",
    "memory of preparing": "prepare.py --mb 1000 --only memory",
    "memory of the server": "fold.py --only memory",
    "engines": "engines.py --rounds 3",
    "overhead, in process": "round_overhead.py --engine inprocess",
    "overhead, simulation": "round_overhead.py --engine simulation",
    "worker": "worker.py",
    "worker, two processes": "worker.py --processes 2",
    "deployed": "deployed.py --evaluate --case inline store --rounds 8",
    "deployed, standing": "deployed.py --evaluate --case standing --rounds 12",
    "deployed, 500 MB": "deployed.py --size-mb 500 --case standing --rounds 5",
    "gate": "gate.py --size-mb 50",
    "store": "store.py --only rounds --size-mb 1 50 --case inline store fedavg --rounds 6",
}


@dataclass(frozen=True)
class Goal:
    """A goal, and the cells of a table that it is of.

    Attributes
    ----------
    what
        What is to be so, in words.
    bound
        Such as "≥ 0.97": how each cell's first number is to lie.
    bench
        Name of the measurement.
    row, column
        Beginning of the row's cells, with " | " between them, and beginning of the column's head.
    table
        Which of the tables of the measurement.
    """

    what: str
    bound: str
    bench: str
    row: str
    column: str
    table: int = 0

    def cells(self, line: dict[str, Any]) -> str:
        """Return row of the page's first table."""
        columns, rows = (line["tables"][self.table][key] for key in ("columns", "rows"))
        column = next(index for index, head in enumerate(columns) if head.startswith(self.column))
        cell = next(row[column] for row in rows if " | ".join(row).startswith(self.row))
        sign, limit = self.bound.split()
        found = number_in(cell)
        met = found >= number_in(limit) if sign == "≥" else found <= number_in(limit)
        return f"| {self.what} | {self.bound} | {cell} | {'met' if met else '**missed**'} |"


GOALS = [
    Goal("Local loop, CPU time, of a bare PyTorch loop", "≥ 0.97", "local loop", "Photon", "CPU ratio"),
    Goal(
        "The same, of a bare loop with Photon's loss", "≥ 0.97", "local loop, the same loss", "Photon", "CPU"
    ),
    Goal("Folding replies into a mean that is there, GB / CPU s", "≥ 5", "fold", "Photon", "GB / CPU"),
    Goal("Link, bf16 cast, encoding, GB / CPU s", "≥ 2", "link", "cast bf16", "GB / CPU"),
    Goal("The same, decoding 64 MiB at once", "≥ 2", "link, 64 MiB", "cast bf16", "GB / CPU", 1),
    Goal("Link, int8, encoding, GB / CPU s", "≥ 1", "link", "int8", "GB / CPU"),
    Goal("Link, SparseLoCo's Top-K, encoding, GB / CPU s", "≥ 0.5", "link", "top64of4096", "GB / CPU"),
    *(
        Goal(f"{name}, rate of a step, of AdamW's", "≥ 0.87", "optimizers", name, "CPU ratio")
        for name in ("ADOPT", "QHAdamW", "QHADOPT", "RefreshedAdamW", "LoRDO")
    ),
    Goal("LoRDO, the same with products in float32", "≥ 0.87", "LoRDO, float32", "LoRDO", "CPU ratio"),
    *(
        Goal(f"Muon at width {width}, the same", "≥ 0.4", f"Muon, width {width}", "MuonAdamW", "CPU ratio")
        for width in (64, 160, 768)
    ),
    Goal("Preparing 100 MB of text, of `tokenizers`' rate", "≥ 1", "prepare, 100 MB", "Photon, all", "CPU"),
    Goal("Memory of preparing 1 GB of text, MB", "≤ 1000", "memory of preparing", "Photon, all", "MB"),
    Goal(
        "Memory of the server, 32 silos, models", "≤ 2.5", "memory of the server", "Photon | diloco | 32", "t"
    ),
    Goal("Deployed round of 10 MB, plain messages, s", "≤ 3", "deployed", "10 MB, inline", "overhead"),
    Goal("The same, standing request, s", "≤ 0.2", "deployed, standing", "10 MB, standing", "overhead"),
    Goal("The same of 500 MB, s", "≤ 12", "deployed, 500 MB", "500 MB, standing", "overhead"),
    Goal("The gate, of the server's CPU time, %", "≤ 2", "gate", "50 MB, inline", "gate adds"),
    Goal("A page on 1,000 silos and 300 rounds, s", "≤ 1", "ui", "first page", "s"),
    Goal("Loader, windows of 128, million tokens / CPU s", "≥ 50", "loader", "Photon, one", "million"),
]


def number_in(cell: str) -> float:
    """Return the first number of a cell."""
    found = re.search(r"-?[\d,]*\.?\d+", cell)
    if found is None:
        raise SystemExit(f"{cell!r} has no number")
    return float(found[0].replace(",", ""))


# --- measuring -------------------------------------------------------------------------------------


def measure(names: Sequence[str]) -> None:
    """Do measurements one after the other, and keep a line of each."""
    for name in names:
        script, *given = shlex.split(PLAN[name])
        print(f"== {name}: python scripts/bench/{PLAN[name]}", flush=True)
        with tempfile.TemporaryDirectory(prefix="photon-bench-") as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, str(Path(__file__).with_name(script)), *given, "--json", str(result)]
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            if code != 0:
                print(f"{name}: failed with exit code {code}; it has no new line", flush=True)
                continue
            if not result.exists():
                print(f"{name}: wrote no tables; it has no new line", flush=True)
                continue
            found = json.loads(result.read_text())
        line = {
            "name": name,
            "command": f"python scripts/bench/{PLAN[name]}",
            **{key: found[key] for key in ("date", "machine")},
            "load": [round(found[key][0], 1) for key in ("load_before", "load_after")],
            "tables": [{key: one[key] for key in ("title", "columns", "rows")} for one in found["tables"]],
        }
        with LINES.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- the page --------------------------------------------------------------------------------------


def newest() -> dict[str, dict[str, Any]]:
    """Return the newest line of each name."""
    lines = LINES.read_text().splitlines() if LINES.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def page(text: str) -> str:
    """Return the page with its tables as the lines have them."""
    lines = newest()
    made: dict[str, Callable[[], Iterator[str]]] = {
        "goals": lambda: goals(lines),
        "round cost": lambda: markdown(*round_cost(ROUND_COST)),
    }

    def filled(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in made and name not in PLAN:
            raise SystemExit(f"{PAGE.name}: there is no measurement {name!r}")
        content = made[name]() if name in made else shown(name, lines)
        return "".join([found[1], *(f"{row}\n" for row in content), found[3]])

    return MARK.sub(filled, text)


def goals(lines: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield from ("| What | Goal | Measured | |", "|---|---|---|---|")
    for goal in GOALS:
        if goal.bench in lines:
            yield goal.cells(lines[goal.bench])
        else:
            yield f"| {goal.what} | {goal.bound} | no line | open |"


def shown(name: str, lines: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the tables of a measurement, and how they came about."""
    if name not in lines:
        yield f"*Not measured yet: `python scripts/bench/{PLAN[name]}`.*"
        return
    line = lines[name]
    for table in line["tables"]:
        yield from (f"**{table['title'].strip()}**", "")
        yield from markdown(table["columns"], table["rows"])
        yield ""
    before, after = line["load"]
    yield f"*`{line['command']}`, {line['date']}, {line['machine']}; load {before} before, {after} after.*"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|---:" * (len(columns) - 1) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def main() -> None:
    """Do what the command line says."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = made.add_subparsers(dest="what", required=True)
    add = what.add_parser("measure", help="add lines")
    add.add_argument(
        "--only", nargs="+", choices=PLAN, default=list(PLAN), metavar="NAME", help=", ".join(PLAN)
    )
    what.add_parser("page", help="write the page's tables")
    arguments = made.parse_args()
    if arguments.what == "measure":
        measure(arguments.only)
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
