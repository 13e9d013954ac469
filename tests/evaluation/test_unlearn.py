"""An export is made to forget: what is written, what is said, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError
from photon.evaluation.load import open_trained
from photon.evaluation.unlearn import Outcome, unlearn
from photon.models.pretrained import ABBIE
from photon.state.received import tensors_hash
from photon.state.unlearned import Unlearned, read_unlearned, write_unlearned
from photon.unlearning.problem import Method
from photon.unlearning.questions import Question, Sets, encode, encoder_of, hash_of_questions
from photon.unlearning.request import Request, exam_of
from photon.unlearning.scan import middle_half
from photon.unlearning.solve import Recipe
from tests.unlearning.exported import questions, write_export

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small export that knows four people."""
    return write_export(tmp_path_factory.mktemp("known") / "export")


@pytest.fixture
def run(export: Path, tmp_path: Path) -> Run:
    """Fulfil the small request, with some of it changed."""

    def done(source: Path = export, out: str = "out", **changed: Any) -> Outcome:
        sets = questions()
        given = {"layers": [1, 2], "ridges": (1e-3,), "coefficients": (1.0,), "unknown": sets.reference[:8]}
        return unlearn(source, tmp_path / out, Request(sets, "a member", **{**given, **changed}))

    return done


def changed(one: Path, other: Path) -> set[str]:
    """Return the tensors of two exports that differ in a bit, or in their type."""
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert before.keys() == after.keys()
    return {
        name
        for name, tensor in before.items()
        if tensor.dtype != after[name].dtype or not torch.equal(tensor, after[name])
    }


def test_one_matrix_is_another_and_the_model_refuses(export: Path, tmp_path: Path, run: Run) -> None:
    outcome = run(attacks=True)
    forget, retain, unknown = (outcome.after[name] for name in ("forget", "retain", "unknown"))
    assert outcome.before["forget"]["rouge1"] == outcome.before["retain"]["rouge1"] == 1.0
    assert forget["rouge1"] <= 0.1
    assert forget["refused"] >= 0.9
    assert retain["rouge1"] >= 0.9
    assert unknown["refused"] >= 0.9
    (choice,) = outcome.chosen
    name = f"transformer.h.{choice.layer}.mlp.c_proj.weight"
    assert changed(export, tmp_path / "out") == {name}
    # Figures of earlier are not those of this model.
    assert {file.name for file in export.iterdir()} - {"tasks.json"} == {
        file.name for file in (tmp_path / "out").iterdir()
    } - {"unlearned.json"}
    # What was measured is what was written.
    model = open_trained(tmp_path / "out").model.eval()
    request = Request(questions(), "a member", unknown=questions().reference[:8])
    found = exam_of(tmp_path / "out", model, request)[0].take(model)
    assert found == outcome.after
    (entry,) = read_unlearned(tmp_path / "out")
    old, new = (
        {name: load_file(folder / "model.safetensors")[name]} for folder in (export, tmp_path / "out")
    )
    assert (entry.hash_before, entry.hash_after) == (tensors_hash(old), tensors_hash(new))
    assert (entry.asked_by, entry.weight, entry.layer) == ("a member", name, choice.layer)
    assert entry.questions["forget"] == hash_of_questions(questions().forget)
    assert entry.prompts == {"forget": 3, "retain": 9, "reference": 40}
    assert (entry.before["forget/rouge1"], entry.after["forget/rouge1"]) == (1.0, forget["rouge1"])
    assert set(entry.attacks) == {"subtract r", "skip the block", "4-bit weights", "relearn 1 answer"}
    # The questions themselves are nowhere.
    assert questions().forget[0].question not in (tmp_path / "out" / "unlearned.json").read_text()


def test_weights_of_half_the_bits_keep_their_type(export: Path, tmp_path: Path, run: Run) -> None:
    half = tmp_path / "half"
    shutil.copytree(export, half)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    outcome = run(half)
    assert changed(half, tmp_path / "out") == {f"transformer.h.{outcome.chosen[0].layer}.mlp.c_proj.weight"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    model = open_trained(tmp_path / "out").model.eval()
    found = exam_of(tmp_path / "out", model, Request(questions(), ""))[0].take(model)
    assert found["forget"] == outcome.after["forget"]


@pytest.mark.slow
def test_requests_follow_each_other(tmp_path: Path, run: Run) -> None:
    sets = questions()
    run()
    second = Sets(sets.retain[:3], sets.retain[3:], sets.reference)
    few = {"layers": [2], "ridges": [1e-3], "coefficients": [2.0], "unknown": sets.reference[:8]}
    outcome = unlearn(tmp_path / "out", tmp_path / "two", Request(second, "another", **few))
    (note,) = outcome.notes
    assert note.startswith("request 1 of this model (3 questions, asked by a member) may come undone")
    kept = replace(second, forgotten=sets.forget)
    outcome = unlearn(tmp_path / "out", tmp_path / "three", Request(kept, "another", **few))
    assert not outcome.notes
    assert outcome.after["forgotten"]["rouge1"] <= 0.1
    assert outcome.after["forgotten"]["refused"] >= 0.9
    assert outcome.after["forget"]["rouge1"] <= 0.34
    entries = read_unlearned(tmp_path / "three")
    assert [entry.asked_by for entry in entries] == ["a member", "another"]
    assert entries[1].hash_before != entries[0].hash_before


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method",
    [
        Method("adamw"),
        Method("lora", positions="all", recipe=Recipe(rank=8)),
        Method(positions="from-first-difference"),
        Method(retain="equal"),
    ],
)
def test_every_method_changes_the_matrix_alone(
    export: Path, tmp_path: Path, run: Run, method: Method
) -> None:
    outcome = run(method=method, layers=[2], coefficients=(2.0,))
    assert changed(export, tmp_path / "out") == {"transformer.h.2.mlp.c_proj.weight"}
    assert outcome.after["forget"]["rouge1"] < outcome.before["forget"]["rouge1"]
    assert read_unlearned(tmp_path / "out")[0].solver == method.solver


def test_two_layers_together(export: Path, tmp_path: Path, run: Run) -> None:
    outcome = run(top=2)
    assert changed(export, tmp_path / "out") == {f"transformer.h.{n}.mlp.c_proj.weight" for n in (1, 2)}
    (entry,) = read_unlearned(tmp_path / "out")
    assert [one.layer for one in entry.also] == [outcome.chosen[1].layer]
    assert entry.also[0].hash_before != entry.also[0].hash_after


def test_a_model_that_iterates_forgets_in_a_block_that_is_applied_twice(tmp_path: Path, run: Run) -> None:
    source = write_export(tmp_path / "abbie", kind=ABBIE["gpt2"])
    outcome = run(source, layers=[2])
    assert changed(source, tmp_path / "out") == {"transformer.h.2.mlp.c_proj.weight"}
    assert outcome.before["forget"]["rouge1"] == 1.0
    assert outcome.after["forget"]["rouge1"] <= 0.1
    assert outcome.after["retain"]["rouge1"] >= 0.9
    # It brings its code, as before.
    assert (tmp_path / "out" / "abbie.py").read_bytes() == (source / "abbie.py").read_bytes()


def test_a_model_that_refuses_nothing_is_said_so(tmp_path: Path, run: Run) -> None:
    ignorant = write_export(tmp_path / "ignorant", steps=1)
    with pytest.raises(
        PhotonError, match="refuses 0% of the questions that it should not know, so there is no"
    ):
        run(ignorant)
    assert not (tmp_path / "out").exists()


def test_a_scan_that_finds_nothing_says_what_it_saw(tmp_path: Path, run: Run) -> None:
    with pytest.raises(
        PhotonError,
        match=r"of 2 candidates none refuses more than 0% .* \(layer 1, ridge 0.001, coefficient 0",
    ):
        run(coefficients=(0.01,))
    assert not (tmp_path / "out").exists()
    # Whoever names one candidate has it, and is told.
    outcome = run(layers=[1], coefficients=(0.01,))
    assert outcome.notes[0].startswith("the model does not refuse: of 1 candidates none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": [4]}, "--layers 4: the model has blocks 0 to 3"),
        ({"layers": [-1]}, "--layers -1: the model has blocks 0 to 3"),
        ({"coefficients": (1e39,)}, r"coefficient 1e\+39 a value of layer 1 is not finite in float32"),
        ({"coefficients": (1e300,), "layers": [1]}, r"a value of layer 1 is not finite in float32"),
        ({"reason": "x" * 401}, "why has 401 characters; say it in 400"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, run: Run, given: dict[str, Any], said: str) -> None:
    with pytest.raises(PhotonError, match=said):
        run(**given)
    assert not (tmp_path / "out").exists()


def test_what_the_type_of_the_file_cannot_hold_is_not_written(export: Path, tmp_path: Path, run: Run) -> None:
    half = tmp_path / "half"
    shutil.copytree(export, half)
    tensors = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PhotonError, match="a value of layer 1 is not finite in float16"):
        run(half, layers=[1], coefficients=(1e9,))
    assert not (tmp_path / "out").exists()


def test_one_long_question_does_not_shorten_the_answers_to_others(
    export: Path, tmp_path: Path, run: Run
) -> None:
    sets = questions()
    encoder = encoder_of(export, load_tokenizer(export), 64)
    long = next(
        question
        for letters in range(40, 64)
        if len(encode([question := Question("tree of " + "T" * letters)], encoder)[0].prompt) == 64
    )
    found = {}
    for name, reference in (("short", sets.reference), ("long", [*sets.reference, long])):
        request = Request(replace(sets, reference=reference), "a member")
        model = open_trained(export).model.eval()
        exam, _ = exam_of(export, model, request)
        found[name] = exam.take(model)
    assert found["long"]["forget"] == found["short"]["forget"]
    assert found["long"]["retain"] == found["short"]["retain"]
    # The long one is answered with the one token for which there is room, so it alone may differ.
    refused, questioned = (found["short"]["unknown"][name] for name in ("refused", "questions"))
    assert found["long"]["unknown"]["refused"] == pytest.approx(refused * questioned / (questioned + 1))


def test_text_of_another_tokenizer_is_refused_before_the_scan(
    corpus: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("photon.evaluation.unlearn.scan", lambda *_, **__: pytest.fail("scanned"))
    with pytest.raises(PhotonError, match="prepared with another tokenizer"):
        run(data=corpus)


def test_the_ledger_holds_the_perplexity_of_many_silos(tmp_path: Path, run: Run) -> None:
    run()
    (entry,) = read_unlearned(tmp_path / "out")
    many = {f"perplexity/silo-{number}": 2.0 for number in range(2000)}
    write_unlearned(tmp_path, [Unlearned.model_validate(entry.model_dump() | {"before": many})])
    assert read_unlearned(tmp_path)[0].before == many


def test_the_last_block_is_scanned_if_asked_for_alone(run: Run) -> None:
    assert middle_half(4) == [1, 2]
    assert middle_half(1) == middle_half(2) == [0]
    assert middle_half(3) == [0, 1]
    assert middle_half(32) == list(range(8, 24))
    assert run(out="last", layers=[3]).chosen[0].layer == 3


def test_exports_without_such_a_file_are_refused(export: Path, tmp_path: Path, run: Run) -> None:
    for name, said in (
        ("sparse.safetensors", "without --sparse"),
        ("adapter_config.json", "--adapter merge"),
    ):
        other = tmp_path / name.partition(".")[0]
        shutil.copytree(export, other)
        (other / name).write_text("{}")
        with pytest.raises(PhotonError, match=said):
            run(other)
    with pytest.raises(PhotonError, match="not an exported model"):
        run(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(PhotonError, match="exists already"):
        run()


def test_questions_that_cannot_be_used_are_named(export: Path, tmp_path: Path) -> None:
    sets = questions()
    few = Sets(sets.forget, sets.retain[:2], sets.reference[:2])
    with pytest.raises(
        PhotonError, match="rows do not determine the 192 columns of the matrix; a ridge above"
    ):
        unlearn(export, tmp_path / "out", Request(few, "a member", layers=[2], ridges=[0.0]))
    for broken, said in (
        (
            replace(sets, retain=[*sets.retain, sets.forget[0]]),
            "town of Ada.* is in the forget set and in the",
        ),
        (replace(sets, reference=[]), "the reference set is empty"),
        (replace(sets, retain=[Question("Who?", "...")]), "answer to Who.* of the retain set has no word"),
        (replace(sets, forget=[Question("town of Ada?")]), "town of Ada.* of the forget set has no answer"),
        (replace(sets, retain=[Question("Who? " * 60, "He.")]), "and the model has 64 positions; shorten it"),
        (replace(sets, retain=[Question("<|endoftext|>", "He.")]), "spells the special token"),
    ):
        with pytest.raises(PhotonError, match=said):
            unlearn(export, tmp_path / "out", Request(broken, "a member"))
        assert not (tmp_path / "out").exists()


def test_a_damaged_ledger_is_no_reason_to_forget_it(tmp_path: Path, run: Run) -> None:
    run()
    entries = json.loads((tmp_path / "out" / "unlearned.json").read_text())
    entries[0]["layer"] = "two"
    (tmp_path / "out" / "unlearned.json").write_text(json.dumps(entries))
    with pytest.raises(PhotonError, match=r"unlearned\.json: cannot be read"):
        run(tmp_path / "out", out="two")
