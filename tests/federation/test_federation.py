"""Whole runs against independent references: plain training, one large batch, a schedule, a bad reply."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message

from photon.client_app import answer
from photon.components import import_target
from photon.config.schema import RunConfig
from photon.data.loader import WindowStream, stream_seed
from photon.data.prepared import PreparedData
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError, RunError
from photon.federation.run import prepare_run, run_federation
from photon.link.messages import BODY, TrainReport, TrainRequest, pack, unpack
from photon.link.records import RAW
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    SiloFailed,
    SiloFinished,
)
from photon.telemetry.log import read_events
from photon.training.diagnostics import activation_norms
from tests.told import told_loss

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]


def final_params(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = CheckpointStore(run_dir / "checkpoints").latest()
    return checkpoint.load_params()


def events_of(run_dir: Path, kind: type[Event]) -> list[Any]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, kind)]


def bare_model(config: RunConfig, data: Path) -> torch.nn.Module:
    return build_model(config.model, PreparedData.open(data).manifest.vocab_size, seed=config.seed)


def test_one_silo_is_plain_training(
    run_small: Run, small_config: Make, lone_corpus: Path, tmp_path: Path
) -> None:
    """Three rounds of four local steps on one silo equal twelve steps of a plain torch loop, bit for bit."""
    run_small("cohort=1", data=lone_corpus)
    config = small_config("cohort=1", data=lone_corpus)

    torch.set_num_threads(1)
    model = bare_model(config, lone_corpus)
    windows = PreparedData.open(lone_corpus).windows("alone", "train")
    stream = WindowStream([windows], stream_seed(config.seed, ["alone"]))
    lr = config.model.recipe.learning_rate
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    steps = config.total_steps
    for step in range(steps):
        if step < 2:
            factor = (step + 1) / 2
        else:
            factor = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (steps - 2))) / 2
        optimizer.param_groups[0]["lr"] = lr * factor
        batch = stream.next_batch(4)
        optimizer.zero_grad()
        causal_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    trained = final_params(tmp_path / "run")
    for name, parameter in model.named_parameters():
        assert torch.equal(trained[name], parameter.detach()), name


def test_one_silo_federated_is_centralised_bit_for_bit(run_small: Run, lone_corpus: Path) -> None:
    federated = run_small("cohort=1", data=lone_corpus, name="federated")
    centralised = run_small("cohort=1", "strategy=centralized", data=lone_corpus, name="centralised")
    rounds_do_not_show = run_small(
        "cohort=1", "rounds=1", "local_steps=12", data=lone_corpus, name="one-round"
    )
    assert federated["weights_sha256"] == centralised["weights_sha256"]
    assert federated["weights_sha256"] == rounds_do_not_show["weights_sha256"]


def test_one_sgd_step_of_three_silos_is_one_large_batch(
    run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    overrides = (
        "rounds=1",
        "local_steps=1",
        "cohort=3",
        "optimizer=sgd",
        "optimizer.lr=0.5",
        "training.clip_norm=null",
        "schedule=constant",
        "schedule.warmup_steps=0",
    )
    run_small(*overrides)
    config = small_config(*overrides)
    model = bare_model(config, corpus)
    data = PreparedData.open(corpus)
    batch = torch.cat(
        [
            WindowStream([data.windows(silo, "train")], stream_seed(config.seed, [silo])).next_batch(4)
            for silo in data.silo_names
        ]
    )
    told_loss(model, batch).backward()
    trained = final_params(tmp_path / "run")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            trained[name], (parameter - 0.5 * parameter.grad).detach(), rtol=1e-5, atol=1e-6, msg=name
        )


def test_every_silo_sits_on_one_schedule_also_after_missed_rounds(
    run_small: Run, small_config: Make, tmp_path: Path
) -> None:
    overrides = ("cohort=1", "rounds=6")
    run_small(*overrides)
    config = small_config(*overrides)
    from photon.training.schedule import build_schedule

    schedule = build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    replies = events_of(tmp_path / "run", SiloFinished)
    assert len({reply.silo for reply in replies}) > 1, "the draw must leave somebody out"
    for reply in replies:
        last_step = reply.round * config.local_steps - 1
        assert reply.learning_rate == pytest.approx(
            config.model.recipe.learning_rate * schedule(last_step), rel=1e-12
        )


def test_no_window_is_trained_twice_or_skipped(run_small: Run, tmp_path: Path) -> None:
    run_small("cohort=2", "rounds=5")
    checkpoint, _ = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    replies = events_of(tmp_path / "run", SiloFinished)
    for silo, entry in checkpoint.state.ledger.items():
        steps = sum(reply.steps for reply in replies if reply.silo == silo)
        assert entry.position == steps * 4
        assert entry.tokens == steps * 4 * 16
    assert checkpoint.state.tokens == sum(entry.tokens for entry in checkpoint.state.ledger.values())


def test_summary_holds_the_measured_figures(run_small: Run, tmp_path: Path) -> None:
    summary = run_small("cohort=2", "link.keep_received=false")
    replies = events_of(tmp_path / "run", SiloFinished)
    model_bytes = sum(tensor.nbytes for tensor in final_params(tmp_path / "run").values())
    assert summary["rounds"] == 3
    assert summary["tokens"] == 3 * 2 * 4 * 4 * 16
    evaluated = events_of(tmp_path / "run", Evaluated)
    for direction in ("up", "down"):
        crossed = sum(getattr(event, f"bytes_{direction}") for event in [*replies, *evaluated])
        assert summary["bytes"][direction] == crossed
    for reply in replies:
        assert model_bytes < reply.bytes_up < model_bytes * 1.2 + 4000
        assert model_bytes < reply.bytes_down < model_bytes * 1.2 + 8000
    assert summary["perplexity"]["final"] < summary["perplexity"]["initial"]
    assert summary["seconds"]["total"] > summary["seconds"]["training"] > 0
    assert len(summary["weights_sha256"]) == 64
    assert [event.round for event in evaluated] == [0, 1, 2, 3]


class ArrivingGrid(InProcessGrid):
    """Lets train replies arrive in a given order of silos, whatever order they are asked for in."""

    def __init__(self, arrival: Sequence[str]) -> None:

        super().__init__(answer, {1: {}})
        self._arrival = list(arrival)

    def pull_messages(self, message_ids: Any) -> Any:
        for identifier in list(message_ids):
            message = self._mailbox.get(identifier)
            if message is not None and message.metadata.message_type == "train":
                if unpack(message.content, TrainRequest).silo != self._arrival[0]:
                    continue
                self._arrival.append(self._arrival.pop(0))
            yield from super().pull_messages([identifier])


def test_the_result_is_the_same_for_every_order_of_arrival(small_config: Make, tmp_path: Path) -> None:
    hashes = set()
    for arrival in itertools.permutations(["alpha", "beta", "gamma"]):
        name = "-".join(arrival)
        config = prepare_run(small_config("cohort=3", "rounds=1", "strategy.weighting=uniform", name=name))
        summary = run_federation(config, ArrivingGrid(arrival), resume=False, live=False)
        assert [e.silo for e in events_of(tmp_path / name, SiloFinished)] == ["alpha", "beta", "gamma"]
        hashes.add(summary["weights_sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize("local_state", ["keep", "reset"])
def test_local_state_decides_what_the_silo_keeps(run_small: Run, tmp_path: Path, local_state: str) -> None:
    run_small("cohort=3", "rounds=2", f"strategy.local_state={local_state}")
    kept = tmp_path / "run" / "silos" / "alpha" / "round-000002" / "state.json"
    scalars = json.loads(kept.read_text())["scalars"]
    assert scalars == ({"step": 8.0} if local_state == "keep" else {})


@pytest.mark.few(1)
@pytest.mark.parametrize("outer", ["fedadam", "fedmom", "diloco"])
def test_outer_optimizers_go_on_from_their_own_state(
    run_small: Run, small_config: Make, tmp_path: Path, outer: str
) -> None:
    """Rounds of a run equal the torch optimizer stepping on the recorded pseudo-gradients."""
    run_small("cohort=3", "rounds=3", f"outer={outer}", "checkpoint.keep=9")
    config = small_config("cohort=3", "rounds=3", f"outer={outer}")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    params = {name: t.clone().requires_grad_() for name, t in store.load(0).load_params().items()}
    settings = config.outer.as_mapping()
    optimizer = import_target(settings.pop("_target_"), "outer")(list(params.values()), **settings)
    for server_round in (1, 2, 3):
        replies = [
            load_groups(tmp_path / "run" / "silos" / silo / f"round-{server_round:06d}" / "reply.safetensors")
            for silo in ("alpha", "beta", "gamma")
        ]
        for name, parameter in params.items():
            first, second, third = (reply["params"][name] for reply in replies)
            mean = first.lerp(second, 1 / 2).lerp(third, 1 / 3)
            parameter.grad = parameter.detach() - mean
        optimizer.step()
        after = store.load(server_round).load_params()
        for name, parameter in params.items():
            torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_bf16_link_halves_the_bytes_and_still_learns(run_small: Run) -> None:
    dense = run_small("cohort=3", name="dense")
    half = run_small("cohort=3", "link=bf16", name="half")
    assert half["bytes"]["up"] < 0.75 * dense["bytes"]["up"]
    assert half["perplexity"]["final"] < half["perplexity"]["initial"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("+transition.step=2", "+transition.lr_scale=0.25", "+transition.zero=[exp_avg]"),
    ],
)
def test_two_processes_of_a_silo_train_as_one(
    more: tuple[str, ...], run_small: Run, lone_corpus: Path, tmp_path: Path
) -> None:
    overrides = ("cohort=1", "rounds=2", "local_steps=2", *more)
    one = run_small(*overrides, data=lone_corpus, name="one")
    two = run_small(*overrides, "training.processes=2", data=lone_corpus, name="two")
    assert one["tokens"] == two["tokens"]
    together = final_params(tmp_path / "two")
    for name, tensor in final_params(tmp_path / "one").items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


# --- bad replies ------------------------------------------------------------------------------------


class TamperingGrid(InProcessGrid):
    """Lets one silo's train reply pass through ``change``."""

    def __init__(self, silo: str, change: Callable[[Message], Message]) -> None:

        super().__init__(answer, {1: {}})
        self._silo, self._change = silo, change

    def pull_messages(self, message_ids: Any) -> Any:
        for reply in super().pull_messages(message_ids):
            tampered = reply.metadata.message_type == "train" and not reply.has_error()
            if tampered and unpack(reply.content, TrainReport).silo == self._silo:
                yield self._change(reply)
            else:
                yield reply


def with_report(**changes: Any) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        report = unpack(reply.content, TrainReport).model_copy(update=changes)
        reply.content[BODY] = pack(report)
        return reply

    return change


def with_weights(edit: Callable[[dict[str, Array]], None]) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        arrays = dict(reply.content.array_records["params"])
        edit(arrays)
        reply.content["params"] = ArrayRecord(arrays)
        return reply

    return change


def poison(value: float) -> Callable[[dict[str, Array]], None]:
    def edit(arrays: dict[str, Array]) -> None:
        name = min(arrays)
        old = arrays[name]
        tensor = torch.frombuffer(bytearray(old.data), dtype=torch.float32)
        tensor[0] = value
        arrays[name] = Array(old.dtype, old.shape, RAW, tensor.numpy().tobytes())

    return edit


def reshape(arrays: dict[str, Array]) -> None:
    name = max(arrays, key=lambda key: len(arrays[key].data))
    old = arrays[name]
    arrays[name] = Array(old.dtype, (len(old.data) // 4,), RAW, old.data)


def add_group(reply: Message) -> Message:
    header = reply.content.config_records["link"]
    text = json.loads(str(header["header"]))
    text["groups"]["exp_avg"] = {}
    header["header"] = json.dumps(text)
    reply.content["exp_avg"] = ArrayRecord({})
    return reply


BAD_REPLIES = {
    "nan": (with_weights(poison(math.nan)), "not finite"),
    "inf": (with_weights(poison(-math.inf)), "not finite"),
    "shape": (with_weights(reshape), "has shape"),
    "missing tensor": (with_weights(lambda arrays: arrays.pop(min(arrays)) and None), "missing or unknown"),
    "wrong group": (add_group, "holds the groups"),
    "wrong round": (with_report(round=77), "answers round 77"),
    "wrong silo": (with_report(silo="gamma"), "answers round 1 of gamma"),
    "wrong steps": (with_report(steps=1), "reports 1 steps"),
    "too many tokens": (with_report(tokens=10**9), "not what was asked for"),
    "wrong position": (with_report(position=3), "up to window 3"),
    "no body": (lambda reply: reply.content.pop(BODY) and reply, "no photon body"),
    "junk body": (lambda r: r.content.update({BODY: ConfigRecord({"body": "{}"})}) or r, "message: "),
    "no header": (lambda reply: reply.content.pop("link") and reply, "no header"),
    "error": (lambda reply: Message(Error(2, "disk full"), reply_to=reply), "disk full"),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("case", BAD_REPLIES)
def test_a_bad_reply_is_named_and_does_not_touch_the_model(
    small_config: Make, run_small: Run, tmp_path: Path, case: str
) -> None:
    change, message = BAD_REPLIES[case]
    config = prepare_run(small_config("rounds=1", "cohort=3", name="tampered"))
    # What the tampered run must equal: a run in which beta fails outright.
    reference_config = prepare_run(small_config("rounds=1", "cohort=3", name="absent"))
    absent = TamperingGrid("beta", lambda reply: Message(Error(2, "gone"), reply_to=reply))
    reference = run_federation(reference_config, absent, resume=False, live=False)
    tampered = run_federation(config, TamperingGrid("beta", change), resume=False, live=False)
    failures = events_of(tmp_path / "tampered", SiloFailed)
    assert [failure.silo for failure in failures] == ["beta"]
    assert message in failures[0].reason
    assert tampered["weights_sha256"] == reference["weights_sha256"]
    assert tampered["failures"] == 1


def test_quorum_and_accepted_failures_stop_the_run_resumably(small_config: Make, tmp_path: Path) -> None:
    broken = TamperingGrid("beta", with_report(round=77))
    config = prepare_run(small_config("cohort=3", "federation.quorum=3"))
    with pytest.raises(RunError, match=r"round 1: 1 of 3 silos failed.*quorum=3.*answers round 77"):
        run_federation(config, broken, resume=False, live=False)
    strict = prepare_run(small_config("cohort=3", "federation.max_failures=0", name="strict"))
    with pytest.raises(RunError, match="max_failures=0"):
        run_federation(strict, broken, resume=False, live=False)
    summary = run_federation(config, InProcessGrid(answer, {1: {}}), resume=True, live=False)
    assert summary["status"] == "finished"


def test_an_outer_step_to_infinity_is_no_round_and_the_last_one_stays(run_small: Run, tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"round 1: the outer step leaves no finite parameters; lower outer\.lr or optimizer\.lr in",
    ):
        run_small("cohort=1", "rounds=1", "outer.lr=1e5", "+outer.weight_decay=1e38")
    assert CheckpointStore(tmp_path / "run" / "checkpoints").rounds() == [0]


def test_a_silo_that_lost_its_disk_goes_on_and_says_so(
    small_config: Make, run_small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    run_small("cohort=3", "rounds=1")
    shutil.rmtree(tmp_path / "run" / "silos" / "beta")
    config = small_config("cohort=3", "rounds=2")
    from photon.engine.inprocess import run_inprocess

    run_inprocess(prepare_run(config), answer, resume=True)
    notices = [notice.message for notice in events_of(tmp_path / "run", Notice)]
    assert any("beta had lost its local state" in notice for notice in notices)
    checkpoint, _ = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint.state.ledger["beta"].position == 2 * 4 * 4


# --- what cannot work is said before any training ---------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cohort=4"], "cohort=4 is larger than the federation of 3 silos"),
        (["federation.server_silo=alfa"], "no such silo; did you mean 'alpha'"),
        (["model.sequence_length=8"], "longer than the model's"),
        (["model.vocab_size=100"], "vocabulary of 100|vocab_size=100"),
        (["data.path=/nowhere"], "nowhere"),
        (["training.device=cuda:99"], "cuda"),
    ],
)
def test_impossible_settings_end_in_one_clear_error(
    run_small: Run, overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PhotonError, match=message):
        run_small(*overrides)


def test_a_silo_with_another_tokenizer_than_most_is_turned_away(
    small_config: Make, corpus: Path, lone_corpus: Path, tmp_path: Path
) -> None:
    sites = {
        node: {"data-dir": str(data), "state-dir": str(tmp_path / f"state{node}")}
        for node, data in {1: corpus, 2: lone_corpus}.items()
    }
    run_federation(
        prepare_run(small_config("cohort=3")), InProcessGrid(answer, sites), resume=False, live=False
    )
    told = [event.message for event in events_of(tmp_path / "run", Notice)]
    assert any("alone is turned away" in line and "differ in tokenizer_sha256" in line for line in told)
    assert {event.silo for event in events_of(tmp_path / "run", SiloFinished)} == {"alpha", "beta", "gamma"}


def test_of_two_that_disagree_on_the_tokenizer_nobody_can_say_which_is_right(
    small_config: Make, silo_folders: dict[str, Path], lone_corpus: Path, tmp_path: Path
) -> None:
    sites = {
        node: {"data-dir": str(data), "state-dir": str(tmp_path / f"state{node}")}
        for node, data in {1: silo_folders["alpha"], 2: lone_corpus}.items()
    }
    config = prepare_run(small_config("cohort=null"))
    with pytest.raises(PhotonError, match="differ in tokenizer_sha256"):
        run_federation(config, InProcessGrid(answer, sites), resume=False, live=False)


def test_rounds_report_what_the_outer_step_did(run_small: Run, tmp_path: Path) -> None:
    run_small("cohort=3")
    rounds = events_of(tmp_path / "run", RoundFinished)
    for event in rounds:
        assert event.pseudo_gradient_norm > 0
        assert -1 <= event.silo_cosine <= 1
        assert 0 < event.consensus <= 1 + 1e-6
        assert event.seconds["round"] >= event.seconds["training"] > 0


def test_diagnostics_tell_the_norms_of_layers_states_and_activations(run_small: Run, tmp_path: Path) -> None:
    run_small("telemetry.diagnostics=true", "telemetry.report=true", "outer=diloco")
    run_dir = tmp_path / "run"
    told, finished = events_of(run_dir, Diagnostics)[-1], events_of(run_dir, RoundFinished)[-1]
    last = CheckpointStore(run_dir / "checkpoints").latest()[0]
    for figure in ("parameter_norm", "pseudo_gradient_norm"):
        layers = {k: v for k, v in told.values.items() if k.startswith(f"{figure}/")}
        assert {f"{figure}/transformer.wte", f"{figure}/transformer.h.0"} < set(layers)
        assert math.hypot(*layers.values()) == pytest.approx(getattr(finished, figure))
    embedding = last.load_params()["transformer.wte.weight"]
    assert told.values["parameter_norm/transformer.wte"] == pytest.approx(float(embedding.norm()), rel=1e-5)
    momentum = last.load_outer()["momentum_buffer"].values()
    assert told.values["outer_momentum_buffer_norm/all"] == pytest.approx(
        math.sqrt(sum(float(t.double().square().sum()) for t in momentum)), rel=1e-5
    )
    assert told.values["noise/trace"] > 0
    silo = events_of(run_dir, SiloFinished)[-1].silo
    measured = ("exp_avg_norm", "exp_avg_sq_norm", "exp_avg_change", "exp_avg_sq_change")
    for figure in (*measured, "activation_norm_in", "activation_norm_out"):
        assert told.values[f"{figure}/{silo}"] > 0
    assert -1 <= told.values[f"exp_avg_cosine/{silo}"] <= 1
    report = (run_dir / "report.html").read_text()
    assert "Exp avg norm" in report
    assert "transformer.h.0" in report


def test_lordo_tells_that_its_subspace_turns_with_the_full_rank_term_alone(
    run_small: Run, tmp_path: Path
) -> None:
    """At ω = 1 every pseudo-gradient lies in the subspace, which stays; one matrix of weights shows it."""
    similarity = {}
    for weight in (1.0, 0.5):
        name = f"weight-{weight}"
        chosen = ("optimizer.rank=2", f"optimizer.weight={weight}", "rounds=4", "telemetry.diagnostics=true")
        run_small("strategy=lordo", *chosen, name=name)
        told = events_of(tmp_path / name, Diagnostics)[-1].values
        similarity[weight] = min(v for k, v in told.items() if k.startswith("basis_similarity/"))
    assert similarity[1.0] > 0.999
    assert similarity[0.5] < 0.9


def test_activation_norms_of_a_known_model() -> None:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    ).eval()
    torch.nn.init.constant_(model.transformer.wte.weight, 0.5)
    torch.nn.init.normal_(model.transformer.wpe.weight)
    figures = activation_norms(model, torch.zeros((2, 8), dtype=torch.int64))
    assert figures["activation_norm_in"] == pytest.approx(1.0)
    # What enters the head has passed a layer norm with unit gain: its norm is √d.
    assert figures["activation_norm_out"] == pytest.approx(2.0, rel=1e-2)
