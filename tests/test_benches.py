"""The benches run: their commands are read, small measurements give figures, and the page has the newest."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"
#: What the scripts share.
SHARED = {"common.py", "fold_memory.py", "usage.py"}
#: Keep lines instead.
WITHOUT_JSON = ("gpu.py", "performance.py")
SCRIPTS = sorted(file.name for file in BENCH.glob("*.py") if file.name not in SHARED)

LOOP = "--width 32 --layers 1 --vocabulary 256 --sequence-length 32 --batch-size 2 --steps 1 --pairs 1"
#: Small measurements of what needs no other programs of Flower's.
SMALL = [
    "cohort.py --engine inprocess --silos 4 --rounds 5 --lines {folder}/lines",
    "engines.py --only inprocess --rounds 2 --local-steps 1",
    "fold.py --only memory --size-mb 2 --silos 2 --outer fedavg",
    "fold.py --only speed --fold-mb 1 --replies 2 --repeats 1",
    "link.py --size-mb 1 --turns 1",
    "loader.py --sequence-length 128 --batch-size 8 --tokens 200000 --work 50000 --repeats 1",
    f"local_loop.py {LOOP}",
    f"local_loop.py --compare overhead {LOOP}",
    f"local_loop.py --compare fused {LOOP}",
    "optim.py --width 32 --layers 1 --vocabulary 256 --rank 8 --steps 2 --turns 1 --threads 1",
    "prepare.py --mb 1 --repeats 1",
    "prepare.py --mb 1 --only memory",
    "round_overhead.py --engine inprocess --size-mb 1 --rounds 5",
    "secure_sum.py --parameters 1000 --silos 4 --dropped 1",
    "sparse.py --layers 1 --width 32 --batch-size 2 --sequence-length 16 --pairs 1",
    f"tuning_loop.py --conversation 16 {LOOP}",
    "ui.py --silos 10 --rounds 5",
    "worker.py --messages 2 --steps 1",
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the benches by its name; none of them stays."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {file.stem for file in BENCH.glob("*.py")} - before:
        sys.modules.pop(name, None)


class Read(Exception):
    """The command line has been read."""


def read(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Let a script read its command line, and do no more."""
    script, *words = shlex.split(command)
    original = argparse.ArgumentParser.parse_args
    found: list[argparse.Namespace] = []

    def parse(self: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
        found.append(original(self, *given))
        raise Read

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        patched.setattr(sys, "argv", [str(BENCH / script), *words])
        with pytest.raises(Read):
            runpy.run_path(str(BENCH / script), run_name="__main__")
    return found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bench_says_what_it_does(
    script: str,
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / script), run_name="__main__")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: ")
    assert f"scripts/bench/{script}" in told, "the help has no command"


def test_the_commands_that_are_written_down_are_read(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = bench("performance").PLAN
    page = (ROOT / "docs" / "performance.md").read_text()
    documented = re.findall(r"`(?:\w+=\w+ )?python scripts/bench/(\w+\.py[^`]*)`", page)
    assert len(documented) > 10
    commands = [*plan.values(), *documented, *(one.format(folder=tmp_path) for one in SMALL)]
    for command in dict.fromkeys(" ".join(one.split()) for one in commands):
        if command.startswith(WITHOUT_JSON):
            read(command, monkeypatch)
        else:
            assert read(f"{command} --json {tmp_path / 'found'}", monkeypatch).json == tmp_path / "found"


@pytest.mark.parametrize(
    ("script", "option", "least"),
    [
        ("cohort.py", "--rounds", 5),
        ("deployed.py", "--rounds", 4),
        ("engines.py", "--rounds", 2),
        ("fold.py", "--replies", 1),
        ("fold.py", "--repeats", 1),
        ("gate.py", "--rounds", 4),
        ("gate.py", "--replies", 1),
        ("link.py", "--turns", 1),
        ("loader.py", "--repeats", 1),
        ("local_loop.py", "--pairs", 1),
        ("optim.py", "--turns", 1),
        ("prepare.py", "--repeats", 1),
        ("round_overhead.py", "--rounds", 5),
        ("sparse.py", "--pairs", 1),
        ("store.py", "--rounds", 3),
        ("tuning_loop.py", "--pairs", 1),
        ("ui.py", "--rounds", 1),
        ("worker.py", "--messages", 2),
    ],
)
def test_a_count_that_would_leave_no_figure_is_refused_before_anything_is_measured(
    script: str,
    option: str,
    least: int,
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read(f"{script} {option} {least}", monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(BENCH / script), option, str(least - 1)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / script), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"argument {option}: {least - 1} is too few, it takes {least} at least")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", SMALL)
def test_a_small_measurement_gives_figures(command: str, tmp_path: Path) -> None:
    script, *words = shlex.split(command.format(folder=tmp_path))
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(BENCH / script), *words, "--json", str(result)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["tables"]
    for table in found["tables"]:
        assert table["rows"], table["title"]
        for row in table["rows"]:
            assert len(row) == len(table["columns"]), row
            assert any(re.search(r"\d", cell) for cell in row[1:]), row
            assert "nan" not in " ".join(row), row


# --- the page ------------------------------------------------------------------------------------------

HEADS = ["case", "GB / CPU second", "GB / second"]


def line_of(name: str, figure: str, title: str = "A table") -> dict[str, Any]:
    rows = [["numpy", "1.00 (0.90 – 1.10)", "1.00"], ["Photon: add", figure, "2 | 3"]]
    return {
        "name": name,
        "command": "python scripts/bench/fold.py",
        "date": "2026-01-02",
        "machine": "2 cores",
        "load": [0.1, 0.2],
        "tables": [{"title": title, "columns": HEADS, "rows": rows}],
    }


@pytest.fixture
def performance(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ModuleType:
    """Return the module, with lines and a page of this test's own."""
    module = bench("performance")
    monkeypatch.setattr(module, "LINES", tmp_path / "performance.jsonl")
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    return module


def write(performance: ModuleType, *lines: dict[str, Any]) -> None:
    performance.LINES.write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_goals_and_marks_of_the_page_name_measurements(performance: ModuleType) -> None:
    assert {goal.bench for goal in performance.GOALS} <= set(performance.PLAN)
    assert {command.split()[0] for command in performance.PLAN.values()} <= set(SCRIPTS)
    text = (ROOT / "docs" / "performance.md").read_text()
    marks = [found["name"] for found in performance.MARK.finditer(text)]
    assert len(marks) == text.count("<!-- bench: ") - text.count("<!-- bench: end -->")
    assert set(marks) <= {*performance.PLAN, "goals", "round cost"}
    # All names are ones that a mark can have.
    for name in performance.PLAN:
        assert performance.MARK.fullmatch(f"<!-- bench: {name} -->\nold\n<!-- bench: end -->")
    with pytest.raises(SystemExit, match="no measurement 'fould'"):
        performance.page("<!-- bench: fould -->\n<!-- bench: end -->")


def test_the_page_has_the_newest_lines_and_stays_as_it_is_when_made_again(performance: ModuleType) -> None:
    write(
        performance, line_of("fold", "4.00"), line_of("sparse", "7.00"), line_of("fold", "6.00 (5.00 – 7.00)")
    )
    marks = "".join(
        f"## {name}\n<!-- bench: {name} -->\nold\n<!-- bench: end -->\nbetween\n"
        for name in ("goals", "fold", "link", "round cost")
    )
    made = performance.page(marks)
    assert performance.page(made) == made
    assert "old" not in made.split()
    assert made.count("\nbetween\n") == 4
    assert "4.00" not in made
    assert "7.00 " not in made.replace("7.00)", ""), "the mark of another measurement"
    assert "| Photon: add | 6.00 (5.00 – 7.00) | 2 / 3 |" in made
    assert "*`python scripts/bench/fold.py`, 2026-01-02, 2 cores; load 0.1 before, 0.2 after.*" in made
    assert "*Not measured yet: `python scripts/bench/link.py`.*" in made
    assert "| engine | silos | cohort |" in made


def test_the_page_is_made_of_the_lines_that_are_kept(bench: Callable[[str], ModuleType]) -> None:
    module = bench("performance")
    text = (ROOT / "docs" / "performance.md").read_text()
    assert module.page(text) == text, "run `python scripts/bench/performance.py page`"


@pytest.mark.parametrize(
    ("bound", "cell", "met"),
    [
        ("≥ 5", "5.00 (4.00 – 6.00)", True),
        ("≥ 5", "4.99 (4.00 – 6.00)", False),
        ("≥ 1000", "1,234 (900 – 2,000)", True),
        ("≤ 2.5", "2.50", True),
        ("≤ 2.5", "2.51", False),
    ],
)
def test_a_goal_that_is_missed_says_so(performance: ModuleType, bound: str, cell: str, met: bool) -> None:
    goal = performance.Goal("What", bound, "fold", "Photon", "GB / CPU")
    said = goal.cells(line_of("fold", cell))
    assert said == f"| What | {bound} | {cell} | {'met' if met else '**missed**'} |"


def test_goals_without_a_line_are_open(performance: ModuleType) -> None:
    write(performance, line_of("fold", "4.00"))
    rows = list(performance.goals(performance.newest()))
    assert len(rows) == 2 + len(performance.GOALS)
    assert sum("**missed**" in row for row in rows) == 1
    assert sum(row.endswith("| no line | open |") for row in rows) == len(performance.GOALS) - 1


def test_a_measurement_that_fails_leaves_no_line(
    performance: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "found.py").write_text(
        "import json, sys\n"
        "table = {'title': 'T', 'columns': ['a', 'b'], 'rows': [['x', '1']], 'raw': [1]}\n"
        "found = {'date': 'D', 'machine': 'M', 'load_before': [0.12, 0], 'load_after': [3.4, 0],\n"
        "         'arguments': {}, 'tables': [table]}\n"
        "if '--silent' in sys.argv:\n"
        "    sys.exit(0)\n"
        "open(sys.argv[sys.argv.index('--json') + 1], 'w').write(json.dumps(found))\n"
        "sys.exit(3 * ('--fail' in sys.argv))\n"
    )
    plan = {"bad": "found.py --fail", "silent": "found.py --silent", "good": "found.py"}
    monkeypatch.setattr(performance, "PLAN", plan)
    monkeypatch.setattr(performance, "__file__", str(tmp_path / "performance.py"))
    performance.measure(["bad", "silent", "good", "bad"])
    said = capsys.readouterr().out
    assert said.count("bad: failed with exit code 3; it has no new line") == 2
    assert said.count("silent: wrote no tables; it has no new line") == 1
    (line,) = [json.loads(text) for text in performance.LINES.read_text().splitlines()]
    assert line["name"] == "good"
    assert (line["load"], line["date"], line["machine"]) == ([0.1, 3.4], "D", "M")
    assert line["tables"] == [{"title": "T", "columns": ["a", "b"], "rows": [["x", "1"]]}]
