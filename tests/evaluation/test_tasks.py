"""Tasks: the figures are lm-eval's own, and what is wrong with a task file is one line."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from photon.commands.app import app
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.export import export_model
from photon.evaluation.suites import SUITES, asked_tasks
from photon.evaluation.task_files import read_task
from photon.evaluation.tasks import evaluate_tasks
from photon.models.build import build_model
from photon.training.groups import read_params

pytest.importorskip("lm_eval")


@pytest.fixture
def export(corpus: Path, small_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """An exported model that has learned nothing, and prefers one continuation to another for all that."""
    section, data = small_config().model, PreparedData.open(corpus)
    params = read_params(build_model(section, data.manifest.vocab_size, seed=0))
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in params.items()}
    params = {name: value + 0.1 * noise[name] for name, value in params.items()}
    export_model(params, section, data.manifest.vocab_size, data.tokenizer_path, tmp_path / "export", {})
    return tmp_path / "export"


def words(generator: random.Random, count: int) -> str:
    return " ".join("".join(generator.choices("abcdefgh", k=3)) for _ in range(count))


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    """A folder of task files, one of each form."""
    folder = tmp_path / "task-data"
    draw = random.Random(0)
    forms: dict[str, Callable[[], dict[str, Any]]] = {
        "world/quiz": lambda: {
            "query": f"Question: {words(draw, 4)}?",
            "choices": [words(draw, draw.randint(1, 3)) for _ in range(draw.choice([2, 4]))],
            "gold": draw.randrange(2),
        },
        "winograd_wsc": lambda: {
            "context_options": [words(draw, 4), words(draw, 5)],
            "continuation": words(draw, 2),
            "gold": draw.randrange(2),
        },
        "lambada_openai": lambda: {"context": words(draw, 6), "continuation": words(draw, 1)},
        "trivia": lambda: {"context": words(draw, 3), "answer": words(draw, 1), "aliases": [words(draw, 1)]},
        "sums": lambda: {"context": words(draw, 3), "chain_of_thought": words(draw, 3), "answer": "12"},
        "pages": lambda: {"text": words(draw, 90)},
    }
    for name, row in forms.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row()) + "\n" for _ in range(24)))
    (folder / "letter.txt").write_text(words(draw, 120))
    return folder


def evaluated(export: Path, names: str, task_data: Path | None, **options: Any) -> dict[str, Any]:
    settings = {"shots": None, "limit": None, "batch_size": 1, **options}
    shots = settings.pop("shots")
    return evaluate_tasks(
        export, asked_tasks(names, shots), task_data=task_data, device=torch.device("cpu"), **settings
    )


#: The same tasks as somebody writes them for lm-eval, of the same files.
BY_HAND: dict[str, dict[str, Any]] = {
    "quiz": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}
FILES = {"quiz": "world/quiz", "lambada": "lambada_openai", "pages": "pages"}


def asked_by_hand(export: Path, task_data: Path, folder: Path, shots: int, batch_size: int) -> dict[str, Any]:
    """Return what the ``lm_eval`` command finds."""
    folder.mkdir()
    for name, config in BY_HAND.items():
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(task_data / f"{FILES[name]}.jsonl")}},
        }
        examples = 0 if name == "pages" else shots
        whole = {"task": f"by_hand_{name}", **source, "test_split": "test", "num_fewshot": examples, **config}
        whole |= {"fewshot_split": "test"} if examples else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={export}"),
            *("--tasks", ",".join(f"by_hand_{name}" for name in BY_HAND), "--include_path", str(folder)),
            *("--device", "cpu", "--batch_size", str(batch_size), "--output_path", str(folder / "out")),
        ],
        check=True,
        capture_output=True,
        timeout=200,
        env={
            **os.environ,
            **{"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
            # As many resamplings as by default take longer than all else.
            "DISABLE_MULTIPROC": "1",
        },
    )
    (file,) = (folder / "out").rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return {name: results[f"by_hand_{name}"] for name in BY_HAND}


@pytest.mark.slow
@pytest.mark.parametrize(("shots", "batch_size"), [pytest.param(2, 1, marks=pytest.mark.slow), (0, 5)])
def test_figures_are_those_of_lm_eval_to_the_last_digit(
    export: Path, task_data: Path, tmp_path: Path, shots: int, batch_size: int
) -> None:
    found = evaluated(export, "quiz,lambada", task_data, shots=shots, batch_size=batch_size)["tasks"]
    found |= evaluated(export, "pages", task_data, batch_size=batch_size)["tasks"]
    wanted = asked_by_hand(export, task_data, tmp_path / "by-hand", shots, batch_size)
    compared = 0
    for name, results in wanted.items():
        for metric, value in found[name]["metrics"].items():
            assert value == results[f"{metric},none"], (name, metric)
            compared += 1
    assert compared == 4 + 3 + 2
    assert 0.2 < found["quiz"]["metrics"]["acc"] < 0.8


def test_every_form_of_file_is_asked(export: Path, task_data: Path) -> None:
    results = evaluated(export, "quiz,winograd,trivia,sums,letter", task_data, limit=10)
    figures = {name: set(entry["metrics"]) for name, entry in results["tasks"].items()}
    assert figures == {
        "quiz": {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"},
        "winograd": {"acc", "acc_stderr"},
        "trivia": {"exact_match", "exact_match_stderr"},
        "sums": {"exact_match", "exact_match_stderr"},
        "letter": {"bits_per_byte", "byte_perplexity"},
    }
    assert [entry["questions"] for entry in results["tasks"].values()] == [10, 10, 10, 10, 1]
    chances = {name: entry["chance"] for name, entry in results["tasks"].items()}
    assert 0.25 < chances.pop("quiz") < 0.5
    assert chances == {"winograd": 0.5, "trivia": 0.0, "sums": 0.0, "letter": None}
    json.dumps(results)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a?", "label": 1}, "needs columns"),
        ({"query": "a?", "choices": ["b", "c"], "gold": 2}, "row 2: column 'gold'"),
        ({"query": "a?", "choices": ["b", "c"], "gold": True}, "row 2: column 'gold'"),
        ({"query": "a?", "choices": ["b", "c"]}, "row 2: column 'gold' is missing"),
        ({"query": "a?", "choices": ["b"], "gold": 0}, "row 2: column 'choices'"),
        ({"query": "a?", "choices": ["b", 1], "gold": 0}, "row 2: column 'choices'"),
        ({"query": " ", "choices": ["b", "c"], "gold": 0}, "row 2: column 'query': empty text"),
        ([1], "row 2: not an object"),
        (None, "row 2: not an object"),
    ],
)
def test_a_bad_row_is_one_line_and_no_row_is_left_out(tmp_path: Path, row: Any, said: str) -> None:
    file = tmp_path / "quiz.jsonl"
    good = {"query": "a?", "choices": ["b", "c"], "gold": 0}
    rows = [row] if said == "needs columns" else [good, row]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(PhotonError, match=said) as refused:
        read_task(file, 0)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        ("quizz", {}, "quizz: no such task in --task-data .*; there are quiz"),
        (" , ", {}, "--tasks names no task"),
        ("quiz", {"shots": 24}, "24 examples before each question: it has 24 rows"),
        ("letter", {"shots": 1}, "a text takes no examples"),
        ("quiz", {"precision": "fp8"}, "--precision fp8"),
        ("quiz", {"chat": True}, "no chat template"),
        ("broken", {}, "broken.jsonl: row 1: not JSON"),
        ("twice", {}, "2 files have this name"),
        ("desloc,abbie", {}, "has none of the tasks"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    export: Path, task_data: Path, names: str, options: dict[str, Any], said: str
) -> None:
    (task_data / "broken.jsonl").write_text("{\n")
    for folder in ("one", "two"):
        (task_data / folder).mkdir()
        (task_data / folder / "twice.jsonl").write_text('{"text": "a"}\n')
    if said.endswith("none of the tasks"):
        (task_data / "lambada_openai.jsonl").unlink()
    with pytest.raises(PhotonError, match=said) as refused:
        evaluated(export, names, task_data, **options)
    assert "\n" not in str(refused.value)
    # Both may be asked by their folders.
    assert set(evaluated(export, "one/twice,two/twice", task_data)["tasks"]) == {"one/twice", "two/twice"}


def test_a_folder_without_tokenizer_or_model_is_one_line(
    export: Path, task_data: Path, tmp_path: Path
) -> None:
    (export / "tokenizer.json").unlink()
    with pytest.raises(PhotonError, match=r"no tokenizer\.json"):
        evaluated(export, "quiz", task_data)
    with pytest.raises(PhotonError, match="not an exported model"):
        evaluated(tmp_path / "nowhere", "quiz", task_data)
    with pytest.raises(PhotonError, match="no such folder; give one with task files"):
        evaluated(export, "quiz", tmp_path / "nowhere")


@pytest.mark.slow
def test_a_sparse_export_has_the_same_figures(
    export: Path, corpus: Path, small_config: Callable[..., RunConfig], task_data: Path, tmp_path: Path
) -> None:
    from photon.models.pretrained import load_pretrained

    params, data = read_params(load_pretrained(export)), PreparedData.open(corpus)
    arguments = (small_config().model, data.manifest.vocab_size, data.tokenizer_path)
    export_model(params, *arguments, tmp_path / "sparse", {}, sparse=True)
    whole, sparse = (
        evaluated(folder, "quiz", task_data)["tasks"] for folder in (export, tmp_path / "sparse")
    )
    assert whole == sparse


def test_a_model_that_iterates_is_asked_at_the_number_that_is_named(
    corpus: Path, small_config: Callable[..., RunConfig], task_data: Path, tmp_path: Path
) -> None:
    parts = "{head_blocks: 1, body_blocks: 1, tail_blocks: 1}"
    section = small_config("model.architecture.n_layer=3", f"model.abbie={parts}").model
    data = PreparedData.open(corpus)
    params = read_params(build_model(section, data.manifest.vocab_size, seed=0))
    params = {name: 3 * value for name, value in params.items()}
    export_model(params, section, data.manifest.vocab_size, data.tokenizer_path, tmp_path / "export", {})
    found = [
        evaluated(tmp_path / "export", "letter", task_data, iterations=number) for number in (None, 1, 2, 8)
    ]
    bits = [results["tasks"]["letter"]["metrics"]["bits_per_byte"] for results in found]
    assert bits[0] == bits[2], "as in training"
    assert len(set(bits)) == 3
    assert found[3]["settings"]["iterations"] == 8


def test_a_suite_has_its_examples_and_says_what_is_missing(export: Path, task_data: Path) -> None:
    (task_data / "arc_easy.jsonl").write_text((task_data / "world" / "quiz.jsonl").read_text())
    results = evaluated(export, "abbie", task_data)
    assert results["missing"] == ["hellaswag", "commonsense_qa"]
    assert set(results["tasks"]) == {"lambada", "arc_easy"}
    tasks, average = results["tasks"], results["suites"]["abbie"]
    lambada, arc, chance = (
        tasks["lambada"]["metrics"]["acc"],
        tasks["arc_easy"]["metrics"]["acc"],
        tasks["arc_easy"]["chance"],
    )
    assert average["tasks"] == 2
    assert average["accuracy"] == pytest.approx((lambada + arc) / 2)
    assert average["above_chance"] == pytest.approx((lambada + (arc - chance) / (1 - chance)) / 2)
    photon = {task.name: task.shots for task in asked_tasks("photon")}
    assert (photon["arc_easy"], photon["openbook_qa"], photon["lambada"], len(photon)) == (3, 10, 0, 31)
    assert {task.shots for task in asked_tasks("photon,lambada", 2)} == {2}
    with pytest.raises(PhotonError, match="arc_challenge is asked for with 3 and with 0"):
        asked_tasks("photon,desloc")
    assert asked_tasks("desloc,abbie")[1].suites == ("desloc", "abbie")


@pytest.mark.slow
def test_lm_eval_has_the_tasks_of_the_suites() -> None:
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().task_index)
    for suite in SUITES:
        assert {task.registered for task in asked_tasks(suite)} - {None} <= known


def test_the_command_writes_results_and_refuses_what_makes_no_sense(
    export: Path, task_data: Path, tmp_path: Path
) -> None:
    def photon(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["evaluate", str(export), *arguments], catch_exceptions=True)

    asked = ("--tasks", "quiz,letter", "--task-data", str(task_data), "--device", "cpu")
    result = photon(*asked)
    assert result.exception is None
    assert "bits per byte" in result.output
    written = json.loads((export / "tasks.json").read_text())
    assert set(written["tasks"]) == {"quiz", "letter"}
    assert photon(*asked, "--output", str(tmp_path / "mine.json"), "--limit", "3").exception is None
    assert json.loads((tmp_path / "mine.json").read_text())["tasks"]["quiz"]["questions"] == 3
    assert json.loads((export / "tasks.json").read_text()) == written
    assert "cannot write" in str(photon(*asked, "--output", str(tmp_path)).exception)
    assert "nothing to evaluate on" in str(photon().exception)
    assert "at one number" in str(photon(*asked, "--iterations", "1,2").exception)
    assert "applies each block once" in str(photon(*asked, "--iterations", "2").exception)
    for option in (["--shots", "1"], ["--limit", "1"], ["--chat"], ["--output", "a"], ["--task-data", "a"]):
        assert f"{option[0]} is of tasks" in str(photon(*option).exception)
