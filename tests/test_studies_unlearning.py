"""The losses of the methods that LUNAR is compared with, and the questions that are made up."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.unlearning.models import random_model, random_prompts

STUDIES = Path(__file__).parent.parent / "scripts" / "studies"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


def some(seed: int) -> list:
    from photon.unlearning.questions import Encoded

    return [Encoded(prompt, prompt[:2]) for prompt in random_prompts(4, seed)]


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def test_npo_begins_as_gradient_ascent_on_whole_answers() -> None:
    import unlearning as study

    from photon.unlearning.attacks import answer_losses

    model, forget, retain = random_model("gpt2"), some(0), some(1)
    loss = study.npo(model, model, forget, retain)
    assert loss.item() == pytest.approx(2 / study.BETA * math.log(2), rel=1e-5)
    ascent = gradient(-answer_losses(model, forget)[0].mean(), model)
    assert torch.allclose(gradient(loss, model), ascent, rtol=1e-4, atol=1e-6)
    # Far below the reference it has no slope any more: (π / π_ref)^β → 0.
    unsure, sure = (answer_losses(one, forget)[0].detach() for one in (model, random_model("gpt2", 1)))
    by_hand = 2 / study.BETA * torch.log1p(((sure - unsure) * study.BETA).exp()).mean()
    found = study.npo(model, random_model("gpt2", 1), forget, retain)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_the_difference_and_the_ascent_are_of_mean_losses() -> None:
    import unlearning as study

    from photon.unlearning.attacks import answer_losses

    model, forget, retain = random_model("llama"), some(0), some(1)
    losses = [answer_losses(model, one) for one in (forget, retain)]
    forgotten, kept = ((nll.sum() / tokens.sum()).item() for nll, tokens in losses)
    assert study.gradient_ascent(model, None, forget, retain).item() == pytest.approx(-forgotten)
    assert study.gradient_difference(model, None, forget, retain).item() == pytest.approx(
        kept - forgotten, abs=1e-5
    )
    npo = study.npo(model, model, forget, retain).item()
    assert study.npo_and_retain(model, model, forget, retain).item() == pytest.approx(npo + kept, rel=1e-5)


def test_contracts_are_made_up_again_in_the_same_way(tmp_path: Path) -> None:
    import contracts

    from photon.unlearning.questions import Sets, read_questions, split_by_edge

    for folder in ("one", "two"):
        contracts.write_all(tmp_path / folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    known = read_questions(tmp_path / "one" / "questions.jsonl")
    forget, retain = split_by_edge(known, ["A_B"], "questions")
    assert (len(forget), len(retain)) == (12, 36)
    Sets(forget, retain, read_questions(tmp_path / "one" / "reference.jsonl")).check()
    chats = [json.loads(line) for line in (tmp_path / "one" / "chats.jsonl").read_text().splitlines()]
    assert [chat["messages"][0]["content"] for chat in chats[:48]] == [one.question for one in known]
    strange = {one.key for one in read_questions(tmp_path / "one" / "unknown.jsonl")}
    assert not strange & {" ".join(chat["messages"][0]["content"].casefold().split()) for chat in chats}
