"""The tutorial is copied from top to bottom: what a command reads, one above it has made, and it runs."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial-chat.md").read_text()
#: What a command writes, by what stands before it.
WRITES = re.compile(
    r"(?:--output |--dest |run_dir=|chats\.py |zipfile -e \S+ |import gguf:\S+ )(runs(?:/[\w.-]+)*)"
)
READS = re.compile(r"runs/[\w./-]+")


def blocks(page: str) -> list[str]:
    """Return the commands, a block each."""
    return re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def chats() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chats", ROOT / "scripts" / "studies" / "chats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_command_reads_has_been_made_above_it() -> None:
    made = {"runs/quickstart"}
    commands = [line for block in blocks(PAGE) for line in block.splitlines()]
    assert len(commands) > 12
    for line in commands:
        new = {found.group(1) for found in WRITES.finditer(line)}
        for path in READS.findall(line):
            parents = {path, *map(str, Path(path).parents)}
            assert parents & (made | new), f"{path} is nowhere made before: {line}"
        # Nothing is written where something is.
        assert not new & made - {"runs"}, line
        made |= new


def test_what_the_quickstart_does_not_install_is_installed_first() -> None:
    """The environment of the tests has every extra; that of the quickstart has none."""
    needs = {"--tasks": "eval", "import gguf:": "gguf", "photon serve": "serve", "adapter=": "tune"}
    extras = {extra for command, extra in needs.items() for block in blocks(PAGE) if command in block}
    (installed,) = re.findall(r"^pip install .*\[(.*)\]", blocks(PAGE)[0], re.MULTILINE)
    assert set(installed.split(",")) == extras


def test_silos_and_tasks_are_the_kinds_that_the_script_makes(chats: ModuleType) -> None:
    assert set(re.findall(r"--silo (\w+)=", PAGE)) == set(chats.KINDS)
    for kind, file in re.findall(r"--silo (\w+)=runs/chats/chats/(\w+)\.jsonl", PAGE):
        assert kind == file
    for tasks in re.findall(r"--tasks ([\w,]+)", PAGE):
        assert set(tasks.split(",")) <= set(chats.KINDS)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_runs_as_it_says(tmp_path: Path) -> None:
    """All but the first section and the last, with a base model that has learnt nothing."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PHOTON_HOME": str(tmp_path / "home"),
    }

    def run(text: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-c", text],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(f"photon data prepare --output base --silo docs={ROOT / 'docs'} --vocab-size 512")
    small = "rounds=1 local_steps=1 cohort=1 schedule.warmup_steps=0"
    run(f"photon train data=prepared data.path=base federation=inprocess {small} run_dir=runs/quickstart")
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    told = {}
    for section in sections[2:-1]:
        name = section.splitlines()[0]
        for block in blocks(section):
            told[name] = told.get(name, "") + run(block.replace("8000", str(free_port())))
    results = json.loads((tmp_path / "runs" / "answers" / "export" / "tasks.json").read_text())
    assert {task: entry["questions"] for task, entry in results["tasks"].items()} == {
        "order": 100,
        "last": 100,
    }
    # It has learnt the form: the answer to which number is larger is a number.
    assert re.search(r"\d", told["Chat"])
    answer = json.loads(told["Serve"][told["Serve"].index('{"') :])
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] > 0
    assert (tmp_path / "runs" / "answers" / "export" / "chat_template.jinja").is_file()
