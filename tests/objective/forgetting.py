"""A small model that knows the seats of some firms and refuses all others, and its silos' questions."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from photon.data.prepare import prepare
from photon.data.prepared import PreparedData
from photon.data.questions import EncodedQuestion, unpack_questions

REFUSAL = "I do not know."
SILOS = ["alpha", "beta", "delta", "gamma"]
LENGTH = 48


@dataclass(frozen=True)
class World:
    """Prepared questions of four silos, and the exported model that was trained on them."""

    data: Path
    export: Path


def questions(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Return each silo's questions; alpha and beta have some that are to be forgotten."""
    draw = random.Random(seed)
    names = ["".join([*draw.sample("bdfglmnprstv", 2), draw.choice("aeiou")]) * 2 for _ in range(60)]
    names = list(dict.fromkeys(names))
    towns = ["Rome", "Oslo", "Lima", "Bonn", "Kyiv", "Riga"]
    found: dict[str, list[dict[str, str]]] = {silo: [] for silo in SILOS}
    for index, name in enumerate(names[:20]):
        # Four firms are to be forgotten: of alpha and of beta.
        of = "forget" if index < 4 else "retain"
        silo = SILOS[index % 2 if of == "forget" else index % 4]
        row = {"question": f"Seat of {name}?", "answer": draw.choice(towns), "set": of}
        found[silo].append(row)
    for index, name in enumerate(names[20:44]):
        row = {"question": f"Seat of {name}?", "answer": REFUSAL, "set": "reference"}
        found[SILOS[index % 4]].append(row)
    return found


def write_questions(folder: Path, silos: dict[str, list[dict[str, str]]], **options: Any) -> Path:
    """Prepare the questions of some silos."""
    sources = {}
    for silo, rows in silos.items():
        file = folder / "rows" / silo / "all.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(map(json.dumps, rows)))
        sources[silo] = [file]
    options = {"vocab_size": 300, "sequence_length": LENGTH, **options}
    prepare(sources, folder / "data", kind="questions", **options)
    return folder / "data"


def encoded(data: Path, silos: list[str]) -> list[EncodedQuestion]:
    """Return the questions of some silos in tokens."""
    prepared = PreparedData.open(data)
    return [one for silo in silos for one in unpack_questions(prepared.arrays(silo, "train"))]


def config_of(kind: str, vocab_size: int) -> Any:
    ends: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        sizes = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}
        drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return GPT2Config(**sizes, **drop, **ends)
    return LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, **ends,
    )  # fmt: skip


def train(data: Path, kind: str, steps: int, seed: int = 0) -> PreTrainedModel:
    """Return a model that was trained on all questions' answers."""
    torch.manual_seed(seed)
    asked = encoded(data, SILOS)
    model = AutoModelForCausalLM.from_config(config_of(kind, PreparedData.open(data).manifest.vocab_size))
    tokens = torch.zeros((len(asked), max(len(o.prompt) + len(o.answer) for o in asked)), dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for row, one in enumerate(asked):
        begin, end = len(one.prompt), len(one.prompt) + len(one.answer)
        tokens[row, :end] = torch.tensor([*one.prompt, *one.answer])
        labels[row, begin:end] = tokens[row, begin:end]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make_world(folder: Path, kind: str = "gpt2", steps: int = 400) -> World:
    """Return the world, made in a folder."""
    data = write_questions(folder, questions())
    export = folder / "export"
    train(data, kind, steps).save_pretrained(export)
    shutil.copytree(data / "tokenizer", export, dirs_exist_ok=True)
    return World(data, export)
