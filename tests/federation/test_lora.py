"""Adapters in a run: what travels, what stays, and what a run, a restart and an export make of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from photon.config.adapter import AdapterSection
from photon.config.compose import load
from photon.data.loader import BatchStream, stream_seed
from photon.data.prepared import PreparedData
from photon.errors import PhotonError, RefusedError
from photon.evaluation.export import export_run
from photon.evaluation.load import open_trained
from photon.federation.origin import sent_config
from photon.models.build import build_model
from photon.objective.configured import model_of
from photon.silo.policy import SiloPolicy
from photon.silo.service import SiloNode
from photon.silo.shapes import param_shapes
from photon.silo.size import sizes_of
from photon.state.checkpoint import CheckpointStore
from photon.state.fixed import BASE
from photon.telemetry.events import Evaluated, RunStarted, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from photon.training.devices import stop_group
from photon.training.groups import write_params
from tests.conftest import small_run
from tests.models.lora_by_hand import put_by_hand, trainable
from tests.told import told_loss

Run = Callable[..., dict[str, Any]]
TWO = "model.architecture.n_layer=2"
LORA = (TWO, "adapter=lora", "adapter.rank=2", "optimizer.lr=0.01")


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of the small model, none of them zero."""
    folder = tmp_path_factory.mktemp("base")
    config = small_run(TWO, data=corpus, run_dir=folder)
    model = build_model(config.model, PreparedData.open(corpus).manifest.vocab_size, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run_lora(run_small: Run, base: Path) -> Run:
    return lambda *overrides, **how: run_small(*LORA, f"model.warm_start={base}", *overrides, **how)


def events(run_dir: Path, kind: type) -> list[Any]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, kind)]


def last(run_dir: Path) -> dict[str, torch.Tensor]:
    return CheckpointStore(run_dir / "checkpoints").latest()[0].load_params()


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


WAYS = {
    "plain": (),
    "update": ("link=int8",),
    "both-ways": (
        "link=bf16",
        "link.uplink_payload=update",
        "link.downlink_payload=update",
        "cohort=2",
        "rounds=4",
    ),
    "states": ("strategy=local-adam",),
    "desloc": ("strategy=desloc", "schedule=desloc", "cohort=2"),
    "mtdao": ("strategy=mtdao", "optimizer=qhadamw"),
    "lordo": ("strategy=lordo", "optimizer=lordo", "optimizer.rank=1", "cohort=2"),
    "refreshed": ("optimizer=refreshed-adamw", "cohort=2"),
    "muon": ("optimizer=muon",),
    "averaged-muon": ("strategy=muloco-averaged", "cohort=2"),
    "streaming": ("strategy=streaming-diloco", "strategy.fragments=2", "cohort=2"),
    "scaffold": ("strategy=scaffold",),
    "fedprox": ("strategy=fedprox",),
    "fedper": ("strategy=fedper",),
    "diloco": ("strategy=diloco", "outer=diloco"),
    "robust": ("strategy=robust", "strategy.fold.liars=1"),
    "noise": ("privacy=gaussian", "privacy.clip_norm=0.5", "privacy.noise_multiplier=0.1", "privacy.seed=1"),
    "masked": ("privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"),
    "tree": ("federation.tree={north: [alpha, beta], south: [gamma]}", "cohort=null"),
    "diagnostics": ("telemetry.diagnostics=true",),
    "dropout": ("adapter.dropout=0.5",),
    "probe": ("training.micro_batch_size=auto",),
    "checkpointing": ("training.activation_checkpointing=true",),
}


#: Those that the default suite does; the others are alike to it.
QUICK = ("plain", "both-ways", "lordo", "scaffold", "fedper", "noise", "masked", "tree", "streaming")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_the_base_stays_and_is_sent_once(way: str, run_lora: Run, base: Path, tmp_path: Path) -> None:
    run_lora(*WAYS[way])
    run_dir = tmp_path / "run"
    after, loaded = last(run_dir), load_file(base / "model.safetensors")
    adapters = {name for name in after if is_lora(name)}
    for name in set(after) - adapters:
        assert torch.equal(after[name], loaded[name.replace(".base_layer", "")]), name
    moved = [name for name in adapters if ".lora_B." in name and after[name].abs().max() > 0]
    # Under FedPer the last block's are the silos' own.
    assert len(moved) * 2 == len(adapters) // (2 if way == "fedper" else 1) > 0
    base_bytes = sum(t.nbytes for name, t in after.items() if name not in adapters)
    adapter_bytes = sum(after[name].nbytes for name in adapters)
    finished = events(run_dir, SiloFinished)
    assert finished
    for event in finished:
        assert BASE not in event.group_bytes_down, "the first evaluation has brought it"
        # Nothing at all where the silo has kept what it measured.
        assert event.group_bytes_down.get("params", 0) <= adapter_bytes + 64 * len(adapters)
        assert not any(group.startswith("fixed") for group in event.group_bytes_up)
    first, *others = [event.bytes_down for event in events(run_dir, Evaluated)]
    receivers = 2 if way == "tree" else 3
    assert first > receivers * base_bytes
    assert all(bytes_down < first - receivers * 0.9 * base_bytes for bytes_down in others)


def test_what_a_silo_has_lost_of_the_base_costs_one_reply(
    run_lora: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    original, lost = SiloNode.train, []

    def train(self, request, groups, contract):
        reply = original(self, request, groups, contract)
        if request.round == 1 and not lost:
            lost.append(request.silo)
            shutil.rmtree(self.site.state / request.silo / "fixed")
        return reply

    monkeypatch.setattr(SiloNode, "train", train)
    summary = run_lora("cohort=3", "federation.max_failures=1", "rounds=3", "evaluation.every=3")
    assert summary["status"] == "finished"
    (failed,) = events(tmp_path / "run", SiloFailed)
    assert (failed.round, failed.silo) == (2, lost[0])
    assert failed.reason == (
        f"{lost[0]} has lost fixed/base, which is sent once; its next request after this failure brings it"
    )
    brought = {
        (e.round, e.silo) for e in events(tmp_path / "run", SiloFinished) if BASE in e.group_bytes_down
    }
    assert brought == {(3, lost[0])}


def test_a_run_that_was_cut_off_ends_with_the_same_bits(run_lora: Run, tmp_path: Path) -> None:
    ways = ("cohort=2", "rounds=4", "checkpoint.keep=5")
    whole = run_lora(*ways, name="whole")
    run_lora(*ways, name="half")
    for number in (3, 4):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / f"round-{number:06d}")
    assert run_lora(*ways, name="half", resume=True)["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_with_one_silo_it_is_plain_training(
    processes: int, run_lora: Run, base: Path, lone_corpus: Path, tmp_path: Path
) -> None:
    """Against torch alone, with an adapter that is written by hand."""
    # Adam divides by what rounding alone leaves in A, whose gradient is zero at first; large steps are
    # chaotic.
    ways = ["rounds=2", "cohort=1", "checkpoint.keep=5", "optimizer=sgd", "optimizer.lr=0.1"]
    ways += ["schedule=constant", "schedule.warmup_steps=0", "adapter.alpha=4"]
    run_lora(*ways, f"training.processes={processes}", data=lone_corpus)
    stop_group()
    store, data = CheckpointStore(tmp_path / "run" / "checkpoints"), PreparedData.open(lone_corpus)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapters = put_by_hand(model, store.load(0).load_params(), 4 / 2)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    stream = BatchStream({"tokens": [data.windows("alone", "train")]}, stream_seed(0, ["alone"]))
    for _ in range(8):
        optimizer.zero_grad()
        tokens = stream.next_batch(4)["tokens"]
        told_loss(model, tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
    trained, begun = last(tmp_path / "run"), store.load(0).load_params()
    for name, tensor in adapters.items():
        assert torch.allclose(trained[name], tensor, rtol=0, atol=1e-6), name
        assert not torch.allclose(trained[name], begun[name], rtol=0, atol=1e-4), name


def test_an_export_is_what_the_run_has(run_lora: Run, corpus: Path, tmp_path: Path) -> None:
    run_lora("telemetry.export=true")
    run_dir, tokens = tmp_path / "run", torch.arange(12).view(2, 6)
    config = small_run(*LORA, f"model.warm_start={tmp_path}", data=corpus, run_dir=run_dir)
    config = config.model_copy(update={"model": load(run_dir / "config.yaml").model})
    adapted = model_of(config, PreparedData.open(corpus).manifest.vocab_size)
    write_params(adapted, last(run_dir))
    kept = tmp_path / "kept"
    export_run(run_dir, kept, keep_adapter=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= {
        file.name for file in kept.iterdir()
    }
    with torch.no_grad():
        expected = adapted.eval()(input_ids=tokens).logits
        for folder in (run_dir / "export", run_dir, kept):
            logits = open_trained(folder).model.eval()(input_ids=tokens).logits
            assert torch.allclose(logits, expected, rtol=0, atol=1e-5), folder
        assert not torch.allclose(
            AutoModelForCausalLM.from_pretrained(load(run_dir / "config.yaml").model.warm_start)
            .eval()(input_ids=tokens)
            .logits,
            expected,
            atol=1e-3,
        ), "it was trained"
    export_run(run_dir, kept, keep_adapter=True)
    with pytest.raises(PhotonError, match="--adapter keep: the run has no adapter, or --sparse is set"):
        export_run(run_dir, tmp_path / "sparse", keep_adapter=True, sparse=True)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (("strategy=sparsyfed",), "adapter: SparsyFed trains sparse weights"),
        (("strategy=topk",), "trains sparse weights"),
        (
            ("strategy=worldlm", "strategy.embeddings=restricted"),
            "strategy.embeddings=restricted: WorldLM trains rows of the embedding",
        ),
        (("adapter.target_modules=[c_atn]",), "adapter.target_modules: 'c_atn' is no linear layer"),
        (("adapter.rank=0",), "adapter.rank"),
        (("adapter.rnk=2",), "adapter.rank"),
        (("model.warm_start=null",), "adapter: the model beside it stays as it is, and would be random"),
    ],
)
def test_what_makes_no_sense_is_one_line(way: tuple[str, ...], message: str, run_lora: Run) -> None:
    with pytest.raises(PhotonError) as refusal:
        run_lora(*way)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_adapter_is_not_resumed(run_lora: Run) -> None:
    run_lora("rounds=1")
    with pytest.raises(
        PhotonError, match=r"adapter: it is not the one of the checkpoint \(adapter.rank: 2 → 3\)"
    ):
        run_lora("rounds=2", "adapter.rank=3", resume=True)
    run_lora("rounds=2", "adapter.dropout=0.1", resume=True)


def test_a_deployed_silo_counts_the_adapter(run_lora: Run, base: Path, corpus: Path, tmp_path: Path) -> None:
    config = small_run(*LORA, f"model.warm_start={base}", data=corpus, run_dir=tmp_path / "run")
    assert ("max_width", "adapter.rank", 2) in list(sizes_of(config))
    sent = sent_config(config, PreparedData.open(corpus).manifest.vocab_size)
    adapters = (
        param_shapes(sent, 300).keys() - param_shapes(sent.model_copy(update={"adapter": None}), 300).keys()
    )
    assert sum("lora" in name for name in adapters) == 16
    policy = SiloPolicy(max_width=16)
    policy.check_components("alpha", sent)
    wide = sent.model_copy(update={"adapter": AdapterSection(rank=17)})
    with pytest.raises(RefusedError, match=r"max_width=16, and the request asks for adapter.rank=17"):
        policy.check_components("alpha", wide)


def test_how_much_is_trained_is_told(run_lora: Run, tmp_path: Path) -> None:
    run_lora("rounds=1")
    (started,) = events(tmp_path / "run", RunStarted)
    assert started.parameters == sum(t.numel() for t in last(tmp_path / "run").values())
