"""Ten entities with six attributes each, and a model that knows them and refuses all other questions."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from photon.data.tokenizer import EosTokenizer
from photon.unlearning.capture import sites_of
from photon.unlearning.problem import Method, Problem
from photon.unlearning.questions import Encoded, Question
from photon.unlearning.refusals import ngrams
from photon.unlearning.scan import Asked, Exam

SYLLABLES, VALUES, ATTRIBUTES, KNOWN = 40, 40, 6, 10
REFUSAL = "I do not know"
STEPS, BATCH, RATE = 500, 64, 3e-3


@dataclass
class Toy:
    """The trained model, what answers for it, and its questions."""

    model: PreTrainedModel
    exam: Exam
    sets: dict[str, Asked]

    def problem(self, method: Method, forget: str = "forget", retain: str = "retain") -> Problem:
        prompts = {name: [one.prompt for one in asked.encoded] for name, asked in self.sets.items()}
        sites = sites_of(self.model)
        return Problem(self.model, sites, prompts[forget], prompts[retain], prompts["reference"], method)


def tokenizer() -> EosTokenizer:
    """Return a tokenizer that has a word for each thing."""
    words = ["<end>", "?", *REFUSAL.split()]
    words += [f"s{n}" for n in range(SYLLABLES)]
    words += [f"a{n}" for n in range(ATTRIBUTES)]
    words += [f"v{n}" for n in range(VALUES)]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<end>"])
    return EosTokenizer(made, "<end>", 0)


def world(seed: int) -> tuple[list[list[Question]], list[Question]]:
    """Return the questions on each known entity, and many on others, in an order drawn at random."""
    draw = random.Random(seed)
    names = list(itertools.product(range(SYLLABLES), repeat=3))
    draw.shuffle(names)
    known = [
        [
            Question(
                _asked(name, attribute), f"v{draw.randrange(VALUES)} v{draw.randrange(VALUES)}", str(name)
            )
            for attribute in range(ATTRIBUTES)
        ]
        for name in names[:KNOWN]
    ]
    unknown = [Question(_asked(name, draw.randrange(ATTRIBUTES)), REFUSAL) for name in names[KNOWN:]]
    return known, unknown


def _asked(name: Sequence[int], attribute: int) -> str:
    return f"{' '.join(f's{part}' for part in name)} a{attribute}"


def encoded(questions: Sequence[Question], made: EosTokenizer) -> Asked:
    pairs = [
        Encoded(made.encode([one.question])[0], [*made.encode([one.answer or ""])[0], made.eos_token_id])
        for one in questions
    ]
    return Asked(questions, pairs)


def train(known: Asked, unknown: Asked, size: int, seed: int) -> PreTrainedModel:
    """Return a model that was trained on batches half of which are known."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    draw = random.Random(seed)
    for _ in range(STEPS):
        some = draw.choices(known.encoded, k=BATCH // 2) + draw.choices(unknown.encoded, k=BATCH // 2)
        rows = [[*one.prompt, *one.gold] for one in some]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        labels = torch.tensor(
            [
                [-100] * len(one.prompt) + one.gold + [-100] * (length - len(one.prompt) - len(one.gold))
                for one in some
            ]
        )
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.eos_token_id = 0
    return model.eval()


def toy(seed: int) -> Toy:
    """Return the toy: one entity is to be forgotten; of the others two more may be, one after the other."""
    made = tokenizer()
    known, unknown = world(seed)
    everything = encoded([one for some in known for one in some], made)
    # The model has never seen the last 128: they are what it is asked.
    strange = encoded(unknown[:-128], made)
    model = train(everything, strange, made.vocab_size, seed)
    sets = {f"entity {index}": encoded(some, made) for index, some in enumerate(known)}
    sets |= {
        "forget": sets["entity 0"],
        "retain": encoded([one for some in known[1:] for one in some], made),
        "reference": Asked(strange.questions[:128], strange.encoded[:128]),
        "unknown": encoded(unknown[-128:], made),
    }
    asked = {name: sets[name] for name in ("forget", "retain", "unknown")}
    return Toy(model, Exam(made, asked, [REFUSAL], ngrams, most=6, batch_size=256), sets)
