"""A trained model that iterates: at several iterations, exported with its code, without Photon."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from photon.commands import evaluation as cli
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.export import export_run
from photon.evaluation.generate import generate_text
from photon.evaluation.iterations import angle_between, evaluate_iterations
from photon.evaluation.load import open_trained
from photon.evaluation.perplexity import evaluate_data
from photon.models.abbie import body_of

ABBIE = ["model.architecture.n_layer=4", "model.abbie={head_blocks: 1, body_blocks: 2, tail_blocks: 1}"]
SETTINGS: dict[str, Any] = {"batch_size": 4, "device": "cpu", "precision": "fp32"}

#: What somebody does who has the export, torch and transformers.
WITHOUT_PHOTON = """
import json, sys
sys.modules["photon"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(12)[None]
told = {"module": type(model).__module__, "logits": {}, "texts": {}}
for iterations in (1, 2, 4, 8):
    model.config.iterations = iterations
    with torch.no_grad():
        told["logits"][iterations] = model(ids).logits[0, -1].tolist()
    told["texts"][iterations] = [
        model.generate(ids[:, :4], max_new_tokens=8, do_sample=False, use_cache=cached).tolist()
        for cached in (True, False)
    ]
deep = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, iterations=8).eval()
with torch.no_grad():
    told["chosen at once"] = deep(ids).logits[0, -1].tolist()
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
with torch.no_grad():
    told["saved again"] = again(ids).logits[0, -1].tolist()
print(json.dumps(told))
"""


def app() -> typer.Typer:
    commands = typer.Typer()
    commands.command()(cli.evaluate)
    commands.command()(cli.generate)
    return commands


@pytest.fixture
def run_dir(run_small: Callable[..., Any], small_config: Callable[..., RunConfig]) -> Path:
    run_small(*ABBIE, "rounds=1")
    return Path(str(small_config(*ABBIE).run_dir))


@pytest.fixture
def export(run_dir: Path, tmp_path: Path) -> Path:
    export_run(run_dir, tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.slow
def test_an_export_is_used_without_photon(run_dir: Path, export: Path, tmp_path: Path) -> None:
    assert json.loads((export / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "abbie.AbbieGPT2Config",
        "AutoModelForCausalLM": "abbie.AbbieGPT2LMHeadModel",
    }
    card = (export / "README.md").read_text()
    assert "| 2 layers after 1 of the head, 2 times in training (AbbIE-D, inter) |" in card
    assert "trust_remote_code=True, iterations=4" in card
    elsewhere = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PHOTON, str(export), str(tmp_path / "again")],
        env=os.environ | elsewhere,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["module"].startswith("transformers_modules.")
    model = open_trained(run_dir).model.eval()
    for iterations in (1, 2, 4, 8):
        model.config.iterations = iterations
        with torch.no_grad():
            wanted = model(torch.arange(12)[None]).logits[0, -1]
        assert torch.equal(torch.tensor(told["logits"][str(iterations)]), wanted)
        cached, full = told["texts"][str(iterations)]
        assert cached == full
        assert len(cached[0]) == 12
    assert told["chosen at once"] == told["saved again"] == told["logits"]["8"]


def test_photon_reads_its_own_code_and_not_the_exports(export: Path, corpus: Path) -> None:
    (export / "abbie.py").write_text("raise SystemExit('run')")
    trained = open_trained(export)
    assert type(trained.model).__module__ == "photon.models.abbie"
    assert len(body_of(trained.model)) == 2
    assert generate_text(export, "a", max_new_tokens=3, iterations=4)


def test_an_export_with_code_is_replaced(run_dir: Path, export: Path) -> None:
    before = (export / "model.safetensors").read_bytes()
    export_run(run_dir, export)
    assert (export / "model.safetensors").read_bytes() == before
    (export / "mine.py").write_text("")
    with pytest.raises(PhotonError, match=r"other files than an export \(mine.py\)"):
        export_run(run_dir, export)


def test_perplexity_and_angle_at_each_number_of_iterations(run_dir: Path, corpus: Path) -> None:
    model, data = open_trained(run_dir).model, PreparedData.open(corpus)
    found = evaluate_iterations(model, data, [1, 2, 8], **SETTINGS)
    assert model.config.iterations is None
    assert found[2].scores == evaluate_data(model, data, **SETTINGS)
    assert found[1].scores != found[2].scores != found[8].scores
    # By hand, from every state of the body.
    states: list[torch.Tensor] = []
    blocks: Any = model.base_model
    hook = blocks.carry.register_forward_hook(lambda _, given, after: states.extend((given[1], after)))
    model.config.iterations = 8
    angles: dict[int, list[torch.Tensor]] = {1: [], 2: [], 8: []}
    for silo in data.silo_names:
        windows = torch.from_numpy(data.windows(silo, "validation").astype("int64"))
        states.clear()
        with torch.no_grad():
            model.eval()(windows[:, :-1])
        for number, kept in angles.items():
            before, after = (state.double() for state in states[2 * number - 2 : 2 * number])
            cosine = nn_cosine(before, after)
            kept.append(cosine.clamp(-1, 1).acos().flatten())
    hook.remove()
    for number, kept in angles.items():
        assert found[number].angle == pytest.approx(float(torch.cat(kept).mean()), rel=1e-3)
    assert found[8].angle < found[1].angle


def nn_cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)


def test_small_angles_keep_their_digits() -> None:
    for angle in (1e-6, 1e-3, 0.5, math.pi / 2, 3.0):
        one = torch.tensor([1.0, 0.0]) * 7
        other = torch.tensor([math.cos(angle), math.sin(angle)]) * 1e4
        assert float(angle_between(one, other)) == pytest.approx(angle, rel=1e-5)


def test_the_command_prints_a_column_for_each(run_dir: Path, corpus: Path) -> None:
    words = ["evaluate", str(run_dir), "--data", str(corpus), "--precision", "fp32", "--device", "cpu"]
    done = CliRunner().invoke(app(), [*words, "--iterations", "2,1"], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    heading = next(line for line in lines if "silo" in line)
    assert heading.split() == ["silo", "r", "=", "1", "r", "=", "2"]
    found = evaluate_iterations(open_trained(run_dir).model, PreparedData.open(corpus), [1, 2], **SETTINGS)
    for silo in ("alpha", "beta", "gamma"):
        line = next(line for line in lines if silo in line)
        assert line.split()[1:] == [f"{found[r].scores[silo].perplexity:,.2f}" for r in (1, 2)]
    assert next(line for line in lines if "angle (rad)" in line).split()[2:] == [
        f"{found[r].angle:.4f}" for r in (1, 2)
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("numbers", ["0", "1,65", "two", "", "1;2"])
def test_iterations_that_cannot_be_are_refused(numbers: str, run_dir: Path, corpus: Path) -> None:
    words = ["evaluate", str(run_dir), "--data", str(corpus), "--iterations", numbers]
    done = CliRunner().invoke(app(), words, env={"COLUMNS": "200"})
    assert isinstance(done.exception, PhotonError)
    assert "iterations=" in str(done.exception)


def test_tasks_are_asked_at_one_number_of_iterations(run_dir: Path) -> None:
    words = ["evaluate", str(run_dir), "--tasks", "arc_easy", "--iterations", "1,2"]
    done = CliRunner().invoke(app(), words)
    assert isinstance(done.exception, PhotonError)
    assert "tasks are asked at one number" in str(done.exception)


def test_a_plain_model_has_nothing_to_iterate(
    run_small: Callable[..., Any], small_config: Callable[..., RunConfig], corpus: Path
) -> None:
    run_small("rounds=1")
    model = open_trained(Path(str(small_config().run_dir))).model
    with pytest.raises(PhotonError, match="a gpt2 applies each block once; leave the option out"):
        evaluate_iterations(model, PreparedData.open(corpus), [1], **SETTINGS)
