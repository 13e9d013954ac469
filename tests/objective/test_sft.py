"""Supervised fine-tuning: the loss is that of the assistant's tokens, each from its own conversation."""

import copy
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MptConfig, Qwen2Config

from photon.data.loader import BatchStream, stream_seed
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.evaluation.load import open_trained
from photon.evaluation.perplexity import evaluate_data
from photon.federation.run import prepare_run
from photon.models.abbie import AbbieGPT2Config, AbbieLlamaConfig
from photon.models.build import build_model
from photon.models.loss import causal_losses, run_apart
from photon.node import answer
from photon.objective.sft import SupervisedFineTuning, keeps_apart
from photon.state.checkpoint import CheckpointStore
from photon.training.devices import stop_group
from photon.training.loop import LocalTrainer
from tests.conftest import SMALL, composed

LENGTH = 48
CHATS = ["objective=sft", f"model.sequence_length={LENGTH}"]
SMALLEST = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(**SMALLEST, intermediate_size=16),
    "qwen2": Qwen2Config(**SMALLEST, intermediate_size=16, num_key_value_heads=1),
    "abbie_gpt2": AbbieGPT2Config(**SMALLEST),
    "abbie_llama": AbbieLlamaConfig(**SMALLEST, intermediate_size=16),
}


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(KINDS[kind])
    for name, value in {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **changes}.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).train()


def packed(rows: int, length: int = 24, seed: int = 0, vocab_size: int = 64) -> dict[str, Tensor]:
    """Return a batch of conversations of uneven lengths, and targets that are few in some rows."""
    draw = np.random.default_rng(seed)
    positions = np.empty((rows, length), dtype=np.int64)
    for row in positions:
        start = 0
        while start < length:
            end = min(length, start + int(draw.integers(2, 10)))
            row[start:end] = np.arange(end - start)
            start = end
    share = draw.uniform(0, 0.9, (rows, 1)) ** 2
    targets = (draw.uniform(size=(rows, length)) < share) & (positions > 0)
    targets[0] = False
    targets[1] = positions[1] > 0
    tokens = draw.integers(0, vocab_size, (rows, length))
    arrays = {"tokens": tokens, "positions": positions, "targets": targets.astype(np.int64)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def conversations(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return each conversation of a batch by itself: its tokens, and its labels for transformers."""
    found = []
    for tokens, positions, targets in zip(*batch.values(), strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(tokens)]
        for first, last in itertools.pairwise(starts):
            labels = tokens[first:last].masked_fill(targets[first:last] == 0, -100)
            found.append((tokens[first:last], labels))
    return found


def by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return transformers' loss of each conversation alone, with labels of -100, over all their targets."""
    total: Tensor = torch.zeros(())
    count = 0
    for tokens, labels in conversations(batch):
        targets = int((labels[1:] != -100).sum())
        if targets:
            total = total + model(input_ids=tokens[None], labels=labels[None]).loss * targets
        count += targets
    return total / count


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert set(first) == set(second)
    return all(torch.allclose(first[name], second[name], rtol=0, atol=1e-6) for name in first)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_of_each_conversation_alone(kind: str, attention: str) -> None:
    model, batch, objective = model_of(kind), packed(6), SupervisedFineTuning()
    model.set_attn_implementation(attention)
    loss = objective.loss(model, batch, None).value
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    expected = by_hand(model, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert close(ours, gradients(model))
    assert int(objective.count(batch)) == int(batch["targets"].sum())


def test_without_the_places_of_tokens_it_would_be_another() -> None:
    model, batch = model_of("gpt2"), packed(6)
    apart = causal_losses(model, batch["tokens"], targets=batch["targets"] == 1, positions=batch["positions"])
    together = causal_losses(model, batch["tokens"], targets=batch["targets"] == 1)
    assert abs(apart.total - together.total) > 1e-4


def test_on_a_gpu_targets_are_ignored_and_not_left_out() -> None:
    """The other branch of the loss, on the meta device's stand-in: logits that are no CPU tensor's."""
    model, batch = model_of("gpt2"), packed(6)
    from photon.models import loss as module

    labels = batch["tokens"].masked_fill(batch["targets"] == 0, -100)[:, 1:].reshape(-1)
    logits = run_apart(model, batch["tokens"][:, :-1], batch["positions"][:, :-1]).logits
    total = module._cross_entropy_of(logits.flatten(0, 1), labels, None, reduction="sum")
    expected = SupervisedFineTuning().loss(model, batch, None).value
    assert (total / batch["targets"].sum()).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_softmax_may_run_over_some_rows_alone() -> None:
    model, batch = model_of("gpt2"), packed(4, vocab_size=40)
    rows = torch.arange(64) < 40
    loss = SupervisedFineTuning().loss(model, batch, rows).value
    with torch.no_grad():
        model.transformer.wte.weight[40:] = 0
        logits = run_apart(model, batch["tokens"][:, :-1], batch["positions"][:, :-1]).logits
    chosen = batch["targets"][:, 1:] == 1
    expected = nn.functional.cross_entropy(logits[chosen][:, :40], batch["tokens"][:, 1:][chosen])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_batch_without_a_target_has_no_loss_and_no_gradient() -> None:
    model, batch = model_of("gpt2"), packed(3)
    batch["targets"][:] = 0
    loss = SupervisedFineTuning().loss(model, batch, None).value
    loss.backward()
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(model).values())


class _Stream:
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch, self.tokens = batch, batch["tokens"].shape[1]

    def next_batch(self, size: int) -> dict[str, Tensor]:
        return self.batch


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_micro_batches_of_unequal_targets_add_up_to_the_batch(micro: int) -> None:
    model, batch, objective = model_of("llama"), packed(6), SupervisedFineTuning()
    expected = copy.deepcopy(model)
    plain = torch.optim.SGD(expected.parameters(), lr=1.0)
    loss = by_hand(expected, batch)
    loss.backward()
    plain.step()
    trainer = LocalTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda _: 1.0,
        loss=objective.loss,
        count=objective.count,
        batch_size=6,
        micro_batch_size=micro,
        clip_norm=None,
        precision="fp32",
        device=torch.device("cpu"),
    )
    stream: Any = _Stream(batch)
    result = trainer.train(stream, global_step=0, steps=1)
    assert result.loss == pytest.approx(loss.item(), abs=1e-6)
    after = dict(expected.named_parameters())
    assert all(
        torch.allclose(parameter, after[name], rtol=0, atol=1e-6)
        for name, parameter in model.named_parameters()
    )


def test_a_compiled_model_keeps_conversations_apart_too() -> None:
    model, batch = model_of("gpt2").eval(), packed(4)
    compiled: Any = torch.compile(model, backend="eager")
    loss = SupervisedFineTuning().loss(compiled, batch, None).value
    assert loss.item() == pytest.approx(by_hand(model, batch).item(), abs=1e-6)


def test_a_model_in_which_conversations_see_each_other_is_refused() -> None:
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    mpt = AutoModelForCausalLM.from_config(MptConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2))
    for model in (mamba, mpt):
        with pytest.raises(PhotonError, match="see each other in a m"):
            SupervisedFineTuning().build(model)
    for kind in KINDS:
        model = model_of(kind)
        assert keeps_apart(model)
        assert model.training
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(MptConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2))
    assert SupervisedFineTuning().build(shapes) is shapes


def test_a_sample_is_a_batch_that_can_be_trained_on() -> None:
    objective, model = SupervisedFineTuning(), model_of("gpt2")
    for length in (2, 24):
        batch = objective.sample(3, length)
        assert set(batch) == set(objective.arrays)
        assert objective.loss(model, batch, None).value > 0
        assert int(objective.count(batch)) == 3 * (length - 1)


def write_chats(folder: Path, silos: dict[str, str]) -> Path:
    sources = {}
    for name, letters in silos.items():
        draw = random.Random(name)
        rows = []
        for _ in range(60):
            messages = []
            for _ in range(draw.randint(1, 2)):
                word = "".join(draw.choices(letters, k=4))
                messages.append({"role": "user", "content": f"Turn {word}!"})
                messages.append({"role": "assistant", "content": word[::-1] * draw.randint(1, 2)})
            rows.append(json.dumps({"messages": messages}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        sources[name] = [folder / f"{name}.jsonl"]
    prepare(
        sources,
        folder / "data",
        kind="chat",
        vocab_size=300,
        sequence_length=LENGTH,
        validation_fraction=0.2,
        near_duplicates="none",
    )
    return folder / "data"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silos = {"alpha": "abcdefgh", "beta": "ijklmnop", "gamma": "qrstuvwxyz"}
    return write_chats(tmp_path_factory.mktemp("chats"), silos)


@pytest.fixture(scope="module")
def lone_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("lone"), {"alone": "abcdefgh"})


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def trained_params(run: Path) -> dict[str, Tensor]:
    return CheckpointStore(run / "checkpoints").latest()[0].load_params()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_with_one_silo_it_is_plain_training(
    processes: int, lone_chats: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = ["rounds=2", "schedule=constant", "schedule.warmup_steps=0", "training.micro_batch_size=2"]
    # Adam divides by what rounding alone leaves in the biases of keys.
    settings += ["optimizer=sgd", "optimizer.lr=0.5"]
    run_small(*CHATS, *settings, f"training.processes={processes}", "cohort=1", data=lone_chats)
    stop_group()
    data = PreparedData.open(lone_chats)
    config = composed(*SMALL, *CHATS, *settings, "data.path=x")
    model = build_model(config.model, data.manifest.vocab_size, seed=0).train()
    rest = {key: value for key, value in config.optimizer.as_mapping().items() if key != "_target_"}
    optimizer = torch.optim.SGD(model.parameters(), **rest)
    stream = BatchStream(
        {name: [array] for name, array in data.arrays("alone", "train").items()}, stream_seed(0, ["alone"])
    )
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = by_hand(model, stream.next_batch(4))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    found = [event["loss"] for event in events(tmp_path / "run", "silo_finished")]
    assert found == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], abs=1e-6)
    for name, tensor in trained_params(tmp_path / "run").items():
        assert torch.allclose(tensor, model.get_parameter(name), rtol=0, atol=1e-6), name


def test_evaluation_is_over_what_the_assistant_says(
    chats: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*CHATS, "rounds=2", "evaluation.sequences=null", "telemetry.export=true", data=chats)
    export, data = tmp_path / "run" / "export", PreparedData.open(chats)
    model: Any = AutoModelForCausalLM.from_pretrained(export).eval()
    assert model.config.use_cache, "which must not let conversations see each other"
    scores = evaluate_data(open_trained(export).model, data, batch_size=4, device="cpu", precision="fp32")
    told = events(tmp_path / "run", "evaluated")[-1]["per_silo"]
    for silo in data.silo_names:
        arrays = data.arrays(silo, "validation")
        batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
        with torch.no_grad():
            expected = by_hand(model, batch).item()
        assert scores[silo].tokens == told[silo]["tokens"] == int(arrays["targets"].sum())
        assert scores[silo].loss == pytest.approx(expected, abs=1e-5)
        assert told[silo]["loss"] == pytest.approx(expected, abs=1e-5)
    assert (export / "chat_template.jinja").read_bytes() == (
        chats / "tokenizer" / "chat_template.jinja"
    ).read_bytes()


def test_a_run_starts_from_an_export_and_gets_better(
    chats: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*CHATS, "rounds=1", "telemetry.export=true", data=chats, name="base")
    warm = ["model=custom", f"model.warm_start={tmp_path / 'base' / 'export'}"]
    own = ["model.recipe.learning_rate=1e-3", f"data.path={chats}", f"run_dir={tmp_path / 'warm'}"]
    # The recipe goes with the model, and the architecture comes from the export.
    rest = [one for one in SMALL if not one.startswith("model.")]
    config = composed(*rest, *warm, *CHATS, "model.recipe.warmup_steps=2", *own)
    run_inprocess(prepare_run(config), answer, resume=False)
    before = events(tmp_path / "base", "evaluated")[-1]
    first, *_, last = events(tmp_path / "warm", "evaluated")
    assert first["loss"] == pytest.approx(before["loss"], abs=1e-6)
    assert last["loss"] < first["loss"]


def test_data_of_another_tokenizer_than_the_model_s_is_refused(
    chats: Path, lone_chats: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*CHATS, "rounds=1", "cohort=1", "telemetry.export=true", data=lone_chats, name="base")
    warm = ["model=custom", f"model.warm_start={tmp_path / 'base' / 'export'}"]
    rest = [one for one in SMALL if not one.startswith("model.")]
    own = ["model.recipe.learning_rate=1e-3", "model.recipe.warmup_steps=2", f"data.path={chats}"]
    config = composed(*rest, *warm, *CHATS, *own, f"run_dir={tmp_path / 'warm'}")
    with pytest.raises(PhotonError, match=r"another tokenizer .* with .*/base/export, by --tokenizer$"):
        run_inprocess(prepare_run(config), answer, resume=False)
    assert not list((tmp_path / "warm" / "checkpoints").glob("round-*"))


def test_files_of_the_model_are_found_from_where_the_run_is_started(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ServerApp of a simulation works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    custom = [*(one for one in SMALL if not one.startswith("model.")), "model=custom", f"data.path={chats}"]
    custom += [*CHATS, "model.recipe.learning_rate=1e-3", "model.recipe.warmup_steps=2"]
    model = prepare_run(composed(*custom, "model.warm_start=base/export")).model
    assert model.warm_start == str(tmp_path / "base" / "export")
    assert model.config_file is None
    model = prepare_run(composed(*custom, "model.config_file=c.json")).model
    assert model.config_file == str(tmp_path / "c.json")


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "way",
    [
        ["strategy=diloco", "outer=diloco"],
        ["strategy=desloc"],
        ["strategy=mtdao", "optimizer=qhadamw"],
        ["strategy=lordo", "optimizer=lordo"],
        ["strategy=worldlm", "outer=diloco"],
        ["strategy=worldlm", "strategy.embeddings=restricted"],
        ["strategy=sparsyfed"],
        ["strategy=fedprox"],
        ["strategy=scaffold"],
        ["strategy=streaming-diloco", "outer=diloco"],
        ["optimizer=muon"],
        ["link=int8"],
        ["privacy=gaussian", "link.uplink_payload=update"],
        ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update", "cohort=3"],
        ["model=abbie-tiny", "model.architecture.n_layer=4"],
        pytest.param(["training.compile=true"], marks=pytest.mark.slow),
        ["training.micro_batch_size=auto"],
    ],
    ids=lambda way: way[0] + way[-1][:20],
)
def test_it_goes_with(
    way: list[str], chats: Path, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*CHATS, *way, "rounds=2", data=chats)
    *_, last = [event["loss"] for event in events(tmp_path / "run", "evaluated")]
    assert np.isfinite(last)
    assert not events(tmp_path / "run", "silo_failed")


def test_text_and_conversations_are_not_taken_for_each_other(
    chats: Path, corpus: Path, run_small: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(PhotonError, match=r"CausalLM cannot train on the chat in .*objective=sft"):
        run_small(f"model.sequence_length={LENGTH}", data=chats)
    with pytest.raises(PhotonError, match=r"SupervisedFineTuning cannot train on the text in .*--kind chat"):
        run_small("objective=sft", data=corpus)


def test_a_silo_sees_the_arrays_of_its_members(chats: Path) -> None:
    data = SiloData(PreparedData.open(chats), ["alpha", "gamma"])
    one, two = data.arrays("validation")
    assert set(one) == {"tokens", "positions", "targets"}
    assert np.array_equal(two["tokens"], data.windows("validation")[1])
