"""The page is copied from top to bottom, and runs against a served model and against what was recorded."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.evaluation.export import export_model
from photon.models.build import build_model
from photon.orchestration.method import Method, known_keys
from photon.orchestration.who import NAMES
from photon.training.groups import read_params
from tests.serving.conftest import TEMPLATE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "orchestration.md").read_text()


def test_the_page_names_every_key_and_every_policy() -> None:
    table = PAGE.split("`--method` is a YAML file")[1].split("## The method")[0]
    told = set(re.findall(r"`([a-z_.]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE))))
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    assert told == set(known_keys()) - sections
    assert set(re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)) >= set(NAMES)
    # And the defaults that it tells are those of the settings.
    method = Method()
    assert "| `policy.logit_bias` | −5 |" in PAGE
    assert method.policy.logit_bias == -5
    assert (method.training.lr, method.training.updates, method.training.batch) == (0.001, 400, 32)
    assert (method.policy.dropout, method.policy.feedforward, method.encoder.size) == (0.3, 2, 384)
    assert (method.training.lambda_sp, method.selforg.threshold, method.selforg.rounds) == (0.1, 0.5, 2)


@pytest.fixture
def served(corpus: Path, small_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """A model that has learnt nothing, with room for conversations, where the page has its own."""
    section = small_config("model.sequence_length=4096").model
    data = PreparedData.open(corpus)
    params = read_params(build_model(section, data.manifest.vocab_size, seed=0))
    folder = tmp_path / "runs" / "smollm2" / "model"
    export_model(params, section, data.manifest.vocab_size, data.tokenizer_path, folder, {})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_runs_as_it_says(served: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PHOTON_HOME": str(served / "home"),
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    # The last one is of files that the reader has.
    assert "…" in blocks.pop()
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block.replace("8000", str(port))],
            cwd=served,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    together = served / "runs" / "together"
    for folder in ("parallel", "rule", "nexa", "replayed"):
        assert len((together / folder / "answers.jsonl").read_text().splitlines()) == 4
        figures = json.loads((together / folder / "summary.json").read_text())
        assert figures["prompt_tokens"] > 0
        assert figures["answers_without_token_counts"] == 0
    rule, replayed = (
        json.loads((together / one / "summary.json").read_text()) for one in ("rule", "replayed")
    )
    assert {**rule, "last_start": 0} == {**replayed, "last_start": 0}
    assert replayed["last_start"]["requests"] == 0
    assert json.loads((together / "parallel" / "summary.json").read_text())["calls"] == 4
    assert (together / "policy.safetensors").is_file()
