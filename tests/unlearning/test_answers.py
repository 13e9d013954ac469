"""What a model answers, compared with its own logits, a token at a time."""

import pytest
import torch

from photon.data.tokenizer import EosTokenizer, load_tokenizer
from photon.evaluation.load import open_trained
from photon.unlearning.answers import ask, show
from photon.unlearning.attacks import answer_losses, quantised, relearned, skipped, subtracted
from photon.unlearning.capture import batches, captured, sites_of, starts
from photon.unlearning.figures import extraction_strength, rank_of
from photon.unlearning.problem import Choice, Edit
from photon.unlearning.questions import Encoded, Question, encode, encoder_of

from .exported import questions, write_export
from .models import random_abbie, random_model, random_prompts
from .toy import tokenizer


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A model that has learnt half of what it was asked, and what it was asked."""
    folder = write_export(tmp_path_factory.mktemp("answers") / "export", steps=66)
    model, tokenizer = open_trained(folder).model.eval(), load_tokenizer(folder)
    asked = [*questions().forget, *questions().retain]
    return model, tokenizer, asked, encode(asked, encoder_of(folder, tokenizer, 64))


def by_hand(
    model: torch.nn.Module, tokenizer: EosTokenizer, one: Encoded, most: int
) -> tuple[str, list[int]]:
    """Return the greedy answer, and the ranks of the gold tokens, without a cache."""
    written, ranks = list(one.prompt), []
    for step in range(most):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([written])).logits[0, -1]
        if step < len(one.gold):
            ranks.append(rank_of(logits, one.gold[step]))
        written.append(int(logits.argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.tokenizer.decode(written[len(one.prompt) :]).strip(), ranks


def test_answers_are_greedy_and_ranks_are_of_their_own_steps(known: tuple) -> None:
    model, tokenizer, asked, encoded = known
    found = ask(model, tokenizer, encoded, most=6, batch_size=5)
    wanted = [by_hand(model, tokenizer, one, 6) for one in encoded]
    assert [tuple(one) for one in found] == wanted
    # Some answers are right, some are not, and one ends before the gold answer does.
    right = [one.text == question.answer for one, question in zip(found, asked, strict=True)]
    assert any(right)
    assert not all(right)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "opt", "abbie"])
def test_prompts_in_one_batch_are_answered_as_if_they_were_alone(kind: str) -> None:
    model, made = random_abbie() if kind == "abbie" else random_model(kind), tokenizer()
    asked = [Encoded(prompt, [1, 2]) for prompt in random_prompts(6)]
    alone, together = (ask(model, made, asked, most=5, batch_size=size) for size in (1, 6))
    assert alone == together
    assert len({one.text for one in alone}) > 1


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "llama"])
def test_prompts_up_to_the_last_position_are_answered_as_far_as_there_are_positions(kind: str) -> None:
    # Roberta counts positions from behind the padding's, so two are no token's.
    before = 2 if kind == "roberta" else 0
    model = random_model(kind, max_position_embeddings=12 + before)
    asked = [Encoded(prompt, [1, 2]) for prompt in random_prompts(4)]
    asked += [Encoded(list(range(1, 1 + size)), [1]) for size in (9, 11, 12)]
    found = ask(model, tokenizer(), asked, most=5)
    alone = [ask(model, tokenizer(), [one], most=min(5, 13 - len(one.prompt)))[0] for one in asked]
    assert found == alone
    assert found[-1].ranks


def test_the_shortest_beginning_that_is_gone_on_with_rightly(known: tuple) -> None:
    model, _, _, encoded = known
    strengths = []
    for one, taken in zip(encoded, show(model, encoded, batch_size=5), strict=True):
        for shown in range(len(one.gold) + 1):
            written = [*one.prompt, *one.gold[:shown]]
            while len(written) < len(one.prompt) + len(one.gold):
                with torch.no_grad():
                    written.append(int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()))
            if written[len(one.prompt) :] == one.gold:
                break
        assert extraction_strength(taken.right) == pytest.approx(1 - shown / len(one.gold))
        strengths.append(shown)
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(one.prompt) + one.gold])
            loss = model(input_ids=torch.tensor([[*one.prompt, *one.gold]]), labels=labels).loss
        assert taken.nll / len(one.gold) == pytest.approx(loss.item(), rel=1e-4)
    assert len(set(strengths)) > 1


def test_the_losses_of_answers_are_those_that_are_shown(known: tuple) -> None:
    model, _, _, encoded = known
    with torch.no_grad():
        losses, tokens = answer_losses(model, encoded)
    assert losses.tolist() == pytest.approx([one.nll for one in show(model, encoded)], rel=1e-4)
    assert tokens.tolist() == [len(one.gold) for one in encoded]


def test_who_learns_again_knows_more_of_what_it_is_shown(known: tuple) -> None:
    model, _, _, encoded = known
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = relearned(model, encoded[:2])
    with torch.no_grad():
        assert answer_losses(made, encoded[:2])[0].sum() < answer_losses(model, encoded[:2])[0].sum()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attacks_at_a_block_do_what_they_are_called(kind: str) -> None:
    model, prompts = random_model(kind), random_prompts(3)
    sites = sites_of(model)
    vector = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edit = Edit(Choice(1, 0.0, 2.0), sites[1], vector, torch.zeros_like(sites[1].weight))
    batch = next(batches(prompts, starts(prompts, "all")))
    plain = captured(model, sites, batch)
    with skipped([edit]):
        around = captured(model, sites, batch)
    assert torch.equal(around[1].outputs, plain[0].outputs)
    assert not torch.allclose(around[1].outputs, plain[1].outputs)
    with subtracted([edit]):
        less = captured(model, sites, batch)
    assert torch.allclose(less[1].outputs, plain[1].outputs - 2 * vector.float(), atol=1e-5)
    assert torch.equal(less[0].outputs, plain[0].outputs)
    again = captured(model, sites, batch)
    assert all(torch.equal(again[layer].outputs, plain[layer].outputs) for layer in plain)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_four_bits_are_fifteen_values_an_output(kind: str) -> None:
    model = random_model(kind)
    made = quantised(model)
    for before, after in zip(sites_of(model), sites_of(made), strict=True):
        for old, new in zip(before.weight, after.weight, strict=True):
            assert len(new.unique()) <= 15
            assert (new - old).abs().max() <= old.abs().max() / 14 + 1e-6
        assert not torch.equal(before.weight, after.weight)
    heads = (one.get_output_embeddings().weight for one in (model, made))
    assert torch.equal(*heads)


def test_a_question_is_a_conversation_by_the_plain_template(known: tuple) -> None:
    _, tokenizer, asked, encoded = known
    text = tokenizer.tokenizer.decode([*encoded[0].prompt, *encoded[0].gold], skip_special_tokens=False)
    assert text == f"User:\n{asked[0].question}\n\nAssistant:\n{asked[0].answer}<|endoftext|>"
    assert encoded[0].gold[-1] == tokenizer.eos_token_id
    assert Question("a  B") != Question("A b")
    assert Question("a  B").key == Question("A b").key
