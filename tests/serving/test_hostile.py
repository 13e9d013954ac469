"""What the endpoint and the terminal are given wrongly is refused in one line, and both live on."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from photon.errors import PhotonError
from photon.evaluation.generate import generate_text
from photon.serving.model import ServedModel, Settings

from .test_endpoint import running

_JSON = {"content-type": "application/json"}
_SURROGATE = chr(0xD800)


def test_hostile_bodies_are_refused_and_the_next_is_answered(base: ServedModel) -> None:
    plain: dict[str, Any] = {"model": base.name, "prompt": "a", "max_tokens": 2}
    bodies = {
        "": "a request has a body",
        "{": "the body is no JSON",
        "[" * 100_000: "parsing the body",
        json.dumps({**plain, "prompt": _SURROGATE}): "half of a character",
        json.dumps({**plain, "max_tokens": True}): "max_tokens: Input should be a valid integer",
        json.dumps({**plain, "stream": "yes"}): "stream: Input should be a valid boolean",
        json.dumps({**plain, "stop": 3}): "stop: Input should be a valid string",
        json.dumps({"model": base.name}): "prompt: missing",
    }
    with running(base) as address:
        for body, told in bodies.items():
            answer = httpx.post(f"{address}/v1/completions", content=body, headers=_JSON)
            message = answer.json()["error"]["message"]
            assert (answer.status_code, told in message, "\n" in message) == (400, True, False), message
        untold = httpx.post(f"{address}/v1/completions", content=json.dumps(plain))
        assert (untold.status_code, "Content-Type" in untold.text) == (400, True)
        other = httpx.post(f"{address}/v1/completions", json={**plain, "model": "x" * 10_000})
        assert (other.status_code, len(other.text) < 400) == (404, True)
        coldest = httpx.post(f"{address}/v1/completions", json={**plain, "temperature": 1e-300})
        likeliest = httpx.post(f"{address}/v1/completions", json={**plain, "temperature": 0})
    assert coldest.json()["choices"] == likeliest.json()["choices"]


def test_a_model_that_cannot_write_is_told_in_one_line(export: Path, base: ServedModel) -> None:
    with torch.no_grad():
        next(base._model.parameters()).fill_(float("nan"))
    with pytest.raises(PhotonError, match="weights that are no finite numbers"):
        list(base.answer([1], Settings(most=2)))
    with running(base) as address:
        asked = {"model": base.name, "prompt": "a"}
        assert httpx.post(f"{address}/v1/completions", json=asked).status_code == 500
        assert httpx.get(f"{address}/health").status_code == 200
    base._model.save_pretrained(export)
    with pytest.raises(PhotonError, match="weights that are no finite numbers"):
        generate_text(export, "a", max_new_tokens=2)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_what_is_no_temperature_is_refused(export: Path, temperature: float) -> None:
    with pytest.raises(PhotonError, match="temperature="):
        generate_text(export, "a", temperature=temperature)
    with pytest.raises(PhotonError, match="temperature="):
        Settings(temperature=temperature)


def test_bytes_that_are_no_text_are_no_prompt(export: Path) -> None:
    with pytest.raises(PhotonError, match="no UTF-8"):
        generate_text(export, chr(0xDCFF))


def test_a_token_that_the_model_lacks_is_named(export: Path) -> None:
    file = export / "tokenizer.json"
    told = json.loads(file.read_text())
    first, size = told["added_tokens"][0], ServedModel(export, torch.device("cpu")).tokenizer.vocab_size
    more = [{**first, "id": size + each, "content": f"<z{each}>"} for each in range(200)]
    told["added_tokens"] += more
    file.write_text(json.dumps(told))
    with pytest.raises(PhotonError, match="the token"):
        generate_text(export, "<z199>", max_new_tokens=2)


@pytest.mark.parametrize(
    ("setting", "told"), [({"eos_token_id": "x"}, "eos_token_id"), ({"repetition_penalty": -1}, "penalty")]
)
def test_a_damaged_generation_config_is_named(export: Path, setting: dict[str, Any], told: str) -> None:
    file = export / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    with pytest.raises(PhotonError, match=told):
        list(ServedModel(export, torch.device("cpu")).answer([1], Settings(most=2)))
