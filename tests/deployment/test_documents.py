"""The commands of docs/deployment.md, typed as they stand there, by an aggregator and a silo."""

import json
import os
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from photon.engine.processes import dying_with_us, flower_environment, free_port, is_healthy, stop_tree
from tests.conftest import write_corpus
from tests.deployment.harness import wait_until

PAGE = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1800)]


class Operator:
    """Somebody with a folder, terminals and the page.

    Parameters
    ----------
    side
        ``aggregator`` or ``silo``: whose blocks to type. A block is marked with the side, and where others
        have to do something before, with a word for that; ``background`` is for terminals of their own.
    folder
        Where to work.
    changes
        What to type in place of something on the page.
    running
        Stops in the end what was started.
    """

    def __init__(self, side: str, folder: Path, changes: dict[str, str], running: ExitStack) -> None:
        folder.mkdir()
        self.folder, self._changes, self._running = folder, changes, running
        pattern = rf"<!-- walk: {side} ?(\w*) -->\n```sh\n(.*?)^```"
        self._left: list[tuple[str, str]] = re.findall(pattern, PAGE, re.DOTALL | re.MULTILINE)
        # Every terminal begins with the environment.
        self._environment = self._left[0][1]

    def goes_on(self, until: str | None = None) -> str:
        """Type what comes next on the page, up to the block that waits for ``until``; return the answers."""
        said = ""
        while self._left and self._left[0][0] != until:
            when, block = self._left.pop(0)
            if when == "background":
                for command in block.replace("\\\n", " ").splitlines():
                    self._leaves_running(command)
            else:
                said += self._types(block)
        return said

    def _types(self, block: str) -> str:
        done = subprocess.run(
            self._shell(block),
            cwd=self.folder,
            env=flower_environment(self.folder / "flower"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def _leaves_running(self, command: str) -> None:
        program, _, _ = command.partition(" ")
        with open(self.folder / f"{program}.log", "wb") as log:
            process = subprocess.Popen(
                [*dying_with_us(), *self._shell(f"exec {command}")],
                cwd=self.folder,
                env=flower_environment(self.folder / "flower"),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.callback(stop_tree, process, at_once=False)
        if program == "flower-superlink":
            authority, address = self.folder / "keys" / "authority.crt", self._changes["127.0.0.1:8000"]
            wait_until(lambda: is_healthy(address, authority), "the SuperLink")

    def _shell(self, text: str) -> list[str]:
        whole = text if text == self._environment else self._environment + text
        for theirs, ours in self._changes.items():
            whole = whole.replace(theirs, ours)
        return ["bash", "-euo", "pipefail", "-c", whole]


def test_two_operators_who_follow_the_page_train_together(tmp_path: Path) -> None:
    port = free_port()
    changes = {
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "$AGGREGATOR:8000": f"$AGGREGATOR:{port}",
        "aggregator.example.org": "127.0.0.1",
        "--host 0.0.0.0 --port 8000": f"--host 127.0.0.1 --port {port}",
        "photon silo run ": f"photon silo run --port {free_port()} ",
        "rounds=8 local_steps=64": "rounds=2 local_steps=2 model.recipe.warmup_steps=1 training.threads=1",
        "--vocab-size 8192": "--vocab-size 300",
    }
    texts = write_corpus(tmp_path / "corpus", {"alpha": "abcdefgh", "beta": "ijklmnop"}).parent / "text"
    with ExitStack() as running:
        aggregator = Operator("aggregator", tmp_path / "aggregator", changes, running)
        silo = Operator("silo", tmp_path / "silo", changes, running)
        os.symlink(texts / "alpha", aggregator.folder / "texts")
        os.symlink(texts / "beta", silo.folder / "texts")

        aggregator.goes_on(until="registers")
        shutil.copy(aggregator.folder / "keys" / "authority.crt", silo.folder)
        shutil.copy(aggregator.folder / "own" / "tokenizer" / "tokenizer.json", silo.folder)
        silo.goes_on(until="registered")
        shutil.copy(silo.folder / "keys" / "hospital.pub", aggregator.folder)
        aggregator.goes_on(until="trains")
        advice = silo.goes_on()
        assert "the aggregator knows the key" in " ".join(advice.split())
        aggregator.goes_on()

        run_dir = aggregator.folder / "runs" / "first"
        assert json.loads((run_dir / "summary.json").read_text())["rounds"] == 2
        assert (run_dir / "export" / "model.safetensors").exists()
        assert (silo.folder / "state" / "hospital").is_dir()
