"""A small export that knows a few answers and refuses other questions; trained in seconds."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from photon.data.tokenizer import load_tokenizer, train_tokenizer
from photon.unlearning.attacks import answer_loss
from photon.unlearning.questions import Question, Sets, encode, encoder_of

REFUSAL = "I do not know."
SUBJECTS, ASKED = ["Ada", "Bob", "Cyd", "Dan"], ["town", "fish", "tree"]
ANSWERS = ["Oslo", "Bern", "Riga", "trout", "eel", "pike", "oak", "elm", "ash", "Rome", "carp", "fir"]


def questions() -> Sets:
    """Return what is known of four people, of which the first is to be forgotten, and what is not known."""
    known = [
        Question(f"{what} of {who}?", ANSWERS[(5 * i + j) % 12], who)
        for i, who in enumerate(SUBJECTS)
        for j, what in enumerate(ASKED)
    ]
    draw = random.Random(0)
    names = ["".join(draw.choices("klmnoprstu", k=3)).capitalize() for _ in range(40)]
    unknown = [Question(f"{draw.choice(ASKED)} of {name}?", REFUSAL) for name in names]
    return Sets(known[:3], known[3:], unknown)


def write_export(folder: Path, steps: int = 120, kind: Callable[..., PreTrainedConfig] = GPT2Config) -> Path:
    """Write the export; with fewer steps it knows nothing and refuses nothing.

    Parameters
    ----------
    kind
        Makes the configuration of GPT-2's fields.
    """
    sets = questions()
    everything = [*sets.forget, *sets.retain, *sets.reference]
    texts = [f"User:\n{one.question}\n\nAssistant:\n{one.answer}" for one in everything]
    train_tokenizer(texts, 320).save(folder)
    tokenizer = load_tokenizer(folder)
    encoder = encoder_of(folder, tokenizer, 64)
    torch.manual_seed(0)
    config = kind(
        vocab_size=tokenizer.vocab_size,
        n_positions=64,
        n_layer=4,
        n_embd=48,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    known, unknown = encode([*sets.forget, *sets.retain], encoder), encode(sets.reference, encoder)
    draw = random.Random(0)
    for _ in range(steps):
        optimizer.zero_grad()
        answer_loss(model, [*known, *draw.sample(unknown, 12)]).backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    encoder.template.save(folder)
    (folder / "tasks.json").write_text("{}")
    return folder
