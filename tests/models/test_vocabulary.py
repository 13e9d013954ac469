"""Restricted vocabularies: a softmax over some tokens is training with the embedding cut to their rows."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from photon.config.compose import compose
from photon.config.schema import ModelSection
from photon.data.loader import BatchStream, WindowStream
from photon.errors import PhotonError
from photon.models.vocabulary import (
    choose_rows,
    joined_vocabulary,
    pack_vocabulary,
    token_parameters,
    unpack_vocabulary,
)
from photon.objective.causal_lm import CausalLM
from photon.training.groups import read_params
from photon.training.loop import LocalTrainer

ROWS, KNOWN, LENGTH = 40, 23, 9
ADAMW = {"lr": 0.01, "weight_decay": 0.1}


def model_of(tied: bool, rows: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config: GPT2Config | LlamaConfig
    if tied:
        config = GPT2Config(vocab_size=rows, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH)
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    else:
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return built


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "a head of its own"])
def test_a_softmax_over_the_vocabulary_is_training_with_its_rows_alone(tied: bool) -> None:
    generator = np.random.default_rng(0)
    tokens = np.sort(generator.permutation(ROWS)[:KNOWN])
    cut_windows = generator.integers(KNOWN, size=(12, LENGTH))
    whole, cut = model_of(tied, ROWS), model_of(tied, KNOWN)
    before = {name: tensor.clone() for name, tensor in read_params(whole).items()}
    with torch.no_grad():
        for name, parameter in cut.named_parameters():
            parameter.copy_(before[name][tokens] if len(before[name]) == ROWS else before[name])
    assert sum(len(tensor) == ROWS for tensor in before.values()) == (1 if tied else 2)

    vocabulary = torch.zeros(ROWS, dtype=torch.bool)
    vocabulary[torch.from_numpy(tokens)] = True
    optimizer = torch.optim.AdamW(whole.parameters(), **ADAMW)
    trainer = LocalTrainer(
        whole,
        optimizer,
        lambda _: 1.0,
        loss=CausalLM().loss,
        batch_size=4,
        micro_batch_size=2,
        clip_norm=0.5,
        precision="fp32",
        device=torch.device("cpu"),
    )
    result = trainer.train(
        BatchStream({"tokens": [tokens[cut_windows]]}, seed=1), global_step=0, steps=5, rows=vocabulary
    )

    by_hand, stream, losses = torch.optim.AdamW(cut.parameters(), **ADAMW), WindowStream([cut_windows], 1), []
    for _ in range(5):
        batch = stream.next_batch(4)
        logits = cut(input_ids=batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        by_hand.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cut.parameters(), 0.5)
        by_hand.step()
        losses.append(loss.item())

    assert result.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    trained = read_params(whole)
    for name, parameter in cut.named_parameters():
        own = trained[name][tokens] if len(trained[name]) == ROWS else trained[name]
        torch.testing.assert_close(own, parameter.detach(), rtol=0, atol=2e-5, msg=name)
    for name, parameter in whole.named_parameters():
        if len(parameter) == ROWS:
            state = optimizer.state[parameter]
            assert not state["exp_avg"][~vocabulary].any(), "no gradient reaches the other rows"
            assert not torch.equal(trained[name][~vocabulary], before[name][~vocabulary]), "decay does"


def test_a_vocabulary_is_packed_into_a_bit_for_each_row() -> None:
    vocabulary = torch.rand(1001, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_vocabulary(vocabulary)
    assert len(packed) == 4 * -(-126 // 3)
    assert torch.equal(unpack_vocabulary(packed, 1001), vocabulary)
    other = torch.rand(1001, generator=torch.Generator().manual_seed(1)) < 0.3
    both = joined_vocabulary(joined_vocabulary(None, packed), pack_vocabulary(other))
    assert torch.equal(unpack_vocabulary(both, 1001), vocabulary | other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%", "cannot be read"),
        ("", "has 0 bytes, 40 rows need 5"),
        (pack_vocabulary(torch.ones(48, dtype=torch.bool)), "has 6 bytes, 40 rows need 5"),
        (pack_vocabulary(torch.zeros(40, dtype=torch.bool)), "is empty"),
    ],
)
def test_what_is_no_vocabulary_is_refused(text: str, message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        unpack_vocabulary(text, 40)


def test_rows_are_chosen_of_matrices_and_of_vectors() -> None:
    rows = torch.tensor([True, False, True])
    for shape in ((3,), (3, 2)):
        chosen = choose_rows(rows, torch.ones(shape), torch.zeros(shape))
        assert torch.equal(chosen.reshape(3, -1).sum(1) > 0, rows)


def test_parameters_of_tokens_are_found_by_what_they_do() -> None:
    assert token_parameters(compose(["model=tiny"]).model) == ("transformer.wte.weight",)
    llama = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    section = compose(["model=tiny"]).model.model_copy(
        update={"architecture": {**llama, "tie_word_embeddings": False}}
    )
    assert isinstance(section, ModelSection)
    assert token_parameters(section) == ("lm_head.weight", "model.embed_tokens.weight")
