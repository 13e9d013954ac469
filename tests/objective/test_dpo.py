"""Direct preference optimisation: trl's loss and gradient, and a reference that stays where the run began."""

import copy
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from photon.config.adapter import AdapterSection
from photon.data.chat_windows import Encoded
from photon.data.loader import BatchStream, stream_seed
from photon.data.pairs import EncodedPair, pack_pairs
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.load import open_trained
from photon.evaluation.perplexity import evaluate_data
from photon.models.adapter import add_adapter, merge_adapter
from photon.models.build import build_model
from photon.models.reference import reference_of
from photon.objective.dpo import DirectPreference, log_probabilities
from photon.silo.service import SiloNode
from photon.state.checkpoint import CheckpointStore
from photon.state.fixed import BASE
from photon.training.devices import stop_group
from photon.training.groups import read_params
from tests.conftest import SMALL, composed
from tests.objective.test_sft import model_of

LENGTH = 80
PAIRS = ["objective=dpo", f"model.sequence_length={LENGTH}"]


def some_pairs(count: int = 5, seed: int = 0) -> list[EncodedPair]:
    """Return pairs of random tokens: a question of some, and two answers of different lengths."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(64) for _ in range(draw.randint(least, most))]

    found = []
    for _ in range(count):
        prompt = tokens(1, 4)
        sides = (tokens(1, 6), tokens(1, 6))
        found.append(
            EncodedPair(*(Encoded(prompt + s, [False] * len(prompt) + [True] * len(s)) for s in sides))
        )
    return found


def batch_of(pairs: list[EncodedPair], length: int = 24) -> dict[str, Tensor]:
    arrays = pack_pairs(pairs, length, np.dtype(np.uint16), 0)._asdict()
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def of_trl(policy: Any, reference: Any, pairs: list[EncodedPair], beta: float, folder: Path) -> Any:
    """Return trl's loss of pairs, with what it tells; its gradients are left in the policy."""
    from trl import DPOConfig, DPOTrainer

    words = {str(number): number for number in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder), beta=beta, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True
        ),
        train_dataset=Dataset.from_list([{"prompt": "1 2", "chosen": "3 4", "rejected": "5 6"}]),
        processing_class=tokenizer,
    )
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    width = max(len(side.ids) for side in sides)
    inputs = {
        "input_ids": [side.ids + [0] * (width - len(side.ids)) for side in sides],
        "attention_mask": [[1] * len(side.ids) + [0] * (width - len(side.ids)) for side in sides],
        "completion_mask": [[*side.targets] + [False] * (width - len(side.ids)) for side in sides],
    }
    tensors = {name: torch.tensor(rows).long() for name, rows in inputs.items()}
    loss = trainer._compute_loss(trainer.model, tensors, False)
    loss.backward()
    return loss.detach(), {name: values[-1] for name, values in trainer._metrics["train"].items()}


def moved(model: Any, seed: int, size: float = 0.3) -> Any:
    """Return a copy of a model with other weights."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return other


@pytest.mark.parametrize("kind", ["gpt2", "llama", "abbie_llama"])
def test_loss_and_gradient_are_those_of_trl(kind: str, tmp_path: Path) -> None:
    start, pairs, objective = model_of(kind), some_pairs(), DirectPreference(beta=0.4)
    model = objective.build(copy.deepcopy(start))
    policy = moved(start, seed=3)
    model.load_state_dict(policy.state_dict(), strict=False)
    batch = batch_of(pairs)
    loss = objective.loss(model, batch, None)
    loss.value.backward()
    expected, told = of_trl(policy, copy.deepcopy(start).eval(), pairs, 0.4, tmp_path)
    assert abs(expected.item() - np.log(2)) > 0.02, "policy and reference differ"
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss.figures["reward_accuracy"].item() == pytest.approx(told["rewards/accuracies"])
    assert 0 < told["rewards/accuracies"] < 1
    assert loss.figures["reward_margin"].item() == pytest.approx(told["rewards/margins"], abs=1e-5)
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(own) == set(gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-5), name
    assert any(gradient.abs().max() > 0.01 for gradient in gradients.values())


def test_micro_batches_of_unequal_pairs_add_up() -> None:
    objective = DirectPreference(beta=0.4)
    model = objective.build(model_of("gpt2"))
    model.load_state_dict(moved(model_of("gpt2"), seed=3).state_dict(), strict=False)
    batch = batch_of(some_pairs(9))
    counts = [
        int(objective.count({k: v[i : i + 1] for k, v in batch.items()})) for i in range(len(batch["tokens"]))
    ]
    assert sum(counts) == int(objective.count(batch)) == 9
    assert len(set(counts)) > 1
    whole = objective.loss(model, batch, None)
    parts = [
        objective.loss(model, {k: v[i : i + 1] for k, v in batch.items()}, None) for i in range(len(counts))
    ]
    for name, figure in whole.figures.items():
        summed = sum(n * part.figures[name].item() for n, part in zip(counts, parts, strict=True)) / 9
        assert figure.item() == pytest.approx(summed, abs=1e-6), name
    nothing = {name: torch.zeros_like(array[:1]) for name, array in batch.items()}
    empty = objective.loss(model, nothing, None)
    empty.value.backward()
    assert empty.value.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_an_answer_counts_all_its_tokens_and_no_other() -> None:
    pairs, model = some_pairs(), model_of("gpt2").eval()
    found = log_probabilities(model, batch_of(pairs)).flatten(0, 1)
    found = found[found.abs().sum(1) > 0]
    expected = []
    for pair in sorted(pairs, key=len):
        for side in pair:
            logits = model(input_ids=torch.tensor([side.ids])).logits[0].log_softmax(1)
            places = [at for at, target in enumerate(side.targets) if target]
            expected.append(sum(logits[at - 1, side.ids[at]].item() for at in places))
    assert sorted(found.flatten().tolist()) == pytest.approx(sorted(expected), abs=1e-4)


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path: Path) -> None:
    start, pairs, objective = model_of("llama"), some_pairs(), DirectPreference(beta=0.4)
    model = add_adapter(copy.deepcopy(start), AdapterSection(rank=2), seed=0)
    assert objective.build(model) is model
    assert reference_of(model) is None
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=draw))
    loss = objective.loss(model, batch_of(pairs), None).value
    loss.backward()
    policy = merge_adapter(copy.deepcopy(model))
    expected, _ = of_trl(policy, start.eval(), pairs, 0.4, tmp_path)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected.item() - np.log(2)) > 0.02
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad} != set()
    assert model.training


# --- runs -----------------------------------------------------------------------------------------------


def write_pairs(folder: Path, silos: dict[str, str]) -> Path:
    sources = {}
    for name, alphabet in silos.items():
        draw = random.Random(name)
        words = ["".join(draw.choices(alphabet, k=draw.randint(1, 3))) for _ in range(180)]
        rows = [
            {"prompt": question, "chosen": f"{question}!", "rejected": f"{one} {other}?"}
            for question, one, other in zip(words[::3], words[1::3], words[2::3], strict=True)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = [file]
    output = folder / "data"
    prepare(
        sources,
        output,
        vocab_size=300,
        sequence_length=LENGTH,
        validation_fraction=0.2,
        seed=0,
        near_duplicates="none",
        kind="pairs",
    )
    return output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silos = {"alpha": "abcdefgh", "beta": "ijklmnop", "gamma": "qrstuvwxyz"}
    return write_pairs(tmp_path_factory.mktemp("pairs"), silos)


@pytest.fixture(scope="module")
def lone_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("lone"), {"alone": "abcdefgh"})


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_with_one_silo_it_is_plain_training(
    processes: int, lone_pairs: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Against torch alone over two rounds, with a reference that was copied before the first."""
    ways = ["rounds=2", "schedule=constant", "schedule.warmup_steps=0", "training.micro_batch_size=2"]
    ways += ["optimizer=sgd", "optimizer.lr=0.5", "objective.beta=0.5", f"training.processes={processes}"]
    run_small(*PAIRS, *ways, "cohort=1", data=lone_pairs)
    stop_group()
    data = PreparedData.open(lone_pairs)
    config = composed(*SMALL, *PAIRS, *ways, "data.path=x")
    policy = build_model(config.model, data.manifest.vocab_size, seed=0).train()
    reference, optimizer = copy.deepcopy(policy).eval(), torch.optim.SGD(policy.parameters(), lr=0.5)
    arrays = {name: [array] for name, array in data.arrays("alone", "train").items()}
    stream, losses = BatchStream(arrays, stream_seed(0, ["alone"])), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = by_hand(policy, reference, stream.next_batch(4), 0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    found = [event["loss"] for event in events(tmp_path / "run", "silo_finished")]
    assert found == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], abs=1e-5)
    assert losses[-1] < losses[0] == pytest.approx(np.log(2), abs=1e-6)
    trained = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    for name, parameter in policy.named_parameters():
        assert torch.allclose(trained[name], parameter, rtol=0, atol=1e-5), name


def by_hand(policy: Any, reference: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Return the mean loss of pairs, each answer read alone: −log σ(β (Δ_chosen − Δ_rejected))."""
    losses = []
    for tokens, _, targets, sides in zip(*batch.values(), strict=True):
        ratios = []
        for side in range(1, int(sides.max()) + 1):
            ids, answers = tokens[sides == side], targets[sides == side] == 1
            both = []
            for model in (policy, reference):
                logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(1)
                both.append((logits.gather(1, ids[1:, None])[:, 0] * answers[1:]).sum())
            ratios.append(both[0] - both[1].detach())
        losses += [
            -torch.sigmoid(beta * (ratios[at] - ratios[at + 1])).log() for at in range(0, len(ratios), 2)
        ]
    return torch.stack(losses).mean()


@pytest.mark.few(1)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_is_the_runs_start_whatever_happens(
    adapted: bool, pairs: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    """In every round, after the server began anew, and at a silo that was away."""
    ways = [*PAIRS, "cohort=2", "rounds=5", "checkpoint.keep=9", "optimizer.lr=0.01"]
    if adapted:
        build_model(composed(*SMALL, *PAIRS, "data.path=x").model, 300, seed=0).save_pretrained(
            tmp_path / "base"
        )
        ways += ["adapter=lora", "adapter.rank=2", f"model.warm_start={tmp_path / 'base'}"]
    seen: dict[tuple[int, str], dict[str, Tensor]] = {}
    original = SiloNode.train

    def train(self, request, groups, contract):
        frozen = {
            name: t.clone()
            for name, t in groups["params"].items()
            if name not in contract.leaving["params"].shapes
        }
        seen[request.round, request.silo] = frozen
        return original(self, request, groups, contract)

    monkeypatch.setattr(SiloNode, "train", train)
    whole = run_small(*ways, data=pairs, name="whole")
    run_small(*ways, data=pairs, name="half")
    for number in (3, 4, 5):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / f"round-{number:06d}")
    assert run_small(*ways, data=pairs, name="half", resume=True)["weights_sha256"] == whole["weights_sha256"]
    store = CheckpointStore(tmp_path / "half" / "checkpoints")
    begun, ended = store.load(0).load_params(), store.latest()[0].load_params()
    frozen = {name: begun[name] for name in seen[5, next(s for r, s in seen if r == 5)]}
    for place, came in seen.items():
        assert set(came) == set(frozen), place
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in came.items()), place
    if not adapted:
        plain = {name.removeprefix("reference.model.") for name in frozen}
        assert all(torch.equal(begun[name], begun[f"reference.model.{name}"]) for name in plain)
        assert any(not torch.equal(ended[name], begun[name]) for name in plain)
    rounds = {silo: [r for r, s in sorted(seen) if s == silo] for silo in ("alpha", "beta", "gamma")}
    assert any(b - a > 1 for of in rounds.values() for a, b in itertools.pairwise(of)), "one was away"
    down = [e["group_bytes_down"] for e in events(tmp_path / "whole", "silo_finished")]
    assert not any(BASE in groups for groups in down), "the first evaluation has brought it"
    up = [e["group_bytes_up"] for e in events(tmp_path / "whole", "silo_finished")]
    assert all(set(groups) == {"params"} for groups in up)


def test_it_learns_tells_how_and_exports_the_policy_alone(
    pairs: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*PAIRS, "rounds=6", "optimizer.lr=0.01", "telemetry.export=true", data=pairs)
    run = tmp_path / "run"
    told = [event["values"] for event in events(run, "diagnostics")]
    accuracy = [
        np.mean([v for k, v in values.items() if k.startswith("reward_accuracy/")]) for values in told
    ]
    margin = [np.mean([v for k, v in values.items() if k.startswith("reward_margin/")]) for values in told]
    assert accuracy[-1] > 0.9
    assert margin[-1] > margin[0] > 0
    losses = [event["loss"] for event in events(run, "evaluated")]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    (started,) = events(run, "run_started")
    exported: Any = AutoModelForCausalLM.from_pretrained(run / "export")
    assert started["parameters"] == sum(p.numel() for p in exported.parameters())
    params = CheckpointStore(run / "checkpoints").latest()[0].load_params()
    own = read_params(exported)
    assert all(torch.equal(tensor, params[name]) for name, tensor in own.items())
    assert set(params) == set(own) | {f"reference.model.{name}" for name in own}
    scores = evaluate_data(
        open_trained(run).model, PreparedData.open(pairs), batch_size=4, device="cpu", precision="fp32"
    )
    arrays = PreparedData.open(pairs).arrays("alpha", "validation")
    chosen = (arrays["targets"] == 1) & (arrays["pairs"] % 2 == 1)
    assert scores["alpha"].tokens == int(chosen.sum()) > 0


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "way",
    [
        ["strategy=diloco", "outer=diloco"],
        ["strategy=desloc", "cohort=2"],
        ["strategy=streaming-diloco", "strategy.fragments=1", "strategy.mixing=1", "cohort=2"],
        ["strategy=scaffold"],
        ["strategy=sparsyfed"],
        ["optimizer=muon"],
        ["link=int8"],
        ["link=bf16", "link.uplink_payload=update", "link.downlink_payload=update", "cohort=2"],
        ["privacy=gaussian", "link.uplink_payload=update"],
        ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"],
        ["federation.tree={north: [alpha, beta], south: [gamma]}", "cohort=null"],
        ["training.micro_batch_size=auto", "telemetry.diagnostics=true"],
        ["training.activation_checkpointing=true"],
        ["model=abbie-tiny", "model.architecture.n_layer=4"],
        ["strategy=worldlm", "strategy.embeddings=restricted"],
    ],
    ids=lambda way: way[0],
)
def test_it_goes_with(
    way: list[str], pairs: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*PAIRS, *way, "rounds=2", data=pairs)
    first, *_, last = [event["loss"] for event in events(tmp_path / "run", "evaluated")]
    assert first == pytest.approx(np.log(2), abs=1e-3 if way[0].startswith("link=") else 1e-6)
    assert np.isfinite(last)
    assert last != first
    assert not events(tmp_path / "run", "silo_failed")


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (["objective.beta=0"], "beta=0: must be above 0"),
        (
            ["training.processes=2", "training.parallel=fsdp"],
            "training.parallel=fsdp: DirectPreference needs",
        ),
        (["objective=sft"], r"SupervisedFineTuning cannot train on the pairs in .*objective=dpo"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    way: list[str], message: str, pairs: Path, run_small: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(PhotonError, match=message) as refusal:
        run_small(*PAIRS, *way, data=pairs)
    assert "\n" not in str(refusal.value)
