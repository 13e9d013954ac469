"""Whole runs under a sync plan against local loops written by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.data.loader import WindowStream, stream_seed
from photon.data.prepared import PreparedData
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.state.checkpoint import CheckpointStore
from photon.state.silo import SiloStore
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]

ADAM = ("exp_avg", "exp_avg_sq")
#: Large enough that gradients which are zero but for rounding (the key's bias) do not move anything.
EPS = 1e-3
PLAIN = (
    f"optimizer.eps={EPS}",
    "cohort=3",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "strategy.weighting=uniform",
)


def by_hand(
    config: RunConfig, data: Path, periods: dict[str, int], *, reset: bool = False, refresh: bool = False
) -> dict[str, torch.Tensor]:
    """Local AdamW loops; after a step whatever is due is averaged over them, or all state is forgotten.

    With ``refresh`` the first moments are set from what a round has changed.
    """
    torch.set_num_threads(1)
    prepared = PreparedData.open(data)
    models, optimizers, streams = [], [], []
    for silo in prepared.silo_names:
        models.append(build_model(config.model, prepared.manifest.vocab_size, seed=config.seed))
        optimizers.append(
            torch.optim.AdamW(
                models[-1].parameters(),
                lr=config.model.recipe.learning_rate,
                betas=(0.9, 0.95),
                eps=EPS,
                weight_decay=0.0,
                fused=True,
            )
        )
        windows = prepared.windows(silo, "train")
        streams.append(WindowStream([windows], stream_seed(config.seed, [silo])))
    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    for step in range(1, config.total_steps + 1):
        for model, optimizer, stream in zip(models, optimizers, streams, strict=True):
            optimizer.zero_grad()
            causal_loss(model, stream.next_batch(4)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for group, period in periods.items():
            if step % period == 0:
                _average(models, optimizers, group)
        if reset and step % periods["params"] == 0:
            for optimizer in optimizers:
                optimizer.state.clear()
        if refresh and step % periods["params"] == 0:
            travelled = periods["params"] * config.model.recipe.learning_rate
            for model, optimizer in zip(models, optimizers, strict=True):
                for old, parameter in zip(before, model.parameters(), strict=True):
                    state = optimizer.state[parameter]
                    velocity = (old - parameter.detach()) / travelled
                    corrected = (state["exp_avg_sq"] / (1 - 0.95**step)).sqrt() + EPS
                    state["exp_avg"].copy_(velocity * corrected * (1 - 0.9**step))
            before = [parameter.detach().clone() for parameter in models[0].parameters()]
    return {name: parameter.detach() for name, parameter in models[0].named_parameters()}


@torch.no_grad()
def _average(models: list[Any], optimizers: list[Any], group: str) -> None:
    for copies in zip(*(model.parameters() for model in models), strict=True):
        tensors = list(copies)
        if group != "params":
            tensors = [o.state[p][group] for o, p in zip(optimizers, copies, strict=True)]
        mean = torch.stack(tensors).double().mean(0).float()
        for tensor in tensors:
            tensor.copy_(mean)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("overrides", "periods"),
    [
        (["strategy=local-adam"], {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}),
        (["strategy=desloc"], {"params": 4, "exp_avg": 12, "exp_avg_sq": 24}),
        (
            ["strategy=desloc", "strategy.sync={exp_avg: 8, exp_avg_sq: 12}"],
            {"params": 4, "exp_avg": 8, "exp_avg_sq": 12},
        ),
        (["strategy=photon"], {"params": 4}),
    ],
)
def test_a_run_equals_local_loops_averaged_by_hand(
    overrides: list[str],
    periods: dict[str, int],
    run_small: Run,
    small_config: Make,
    corpus: Path,
    tmp_path: Path,
) -> None:
    chosen = (*overrides, *PLAIN, "rounds=7")
    run_small(*chosen)
    expected = by_hand(small_config(*chosen), corpus, periods)
    _assert_trained(tmp_path, expected)


def test_equal_periods_are_local_adam_and_none_is_fedavg_with_kept_states(run_small: Run) -> None:
    def weights(name: str, *overrides: str) -> str:
        return str(run_small(*overrides, *PLAIN, "rounds=4", name=name)["weights_sha256"])

    local_adam = weights("a", "strategy=local-adam")
    assert weights("b", "strategy=desloc", "strategy.sync={exp_avg: 4, exp_avg_sq: 4}") == local_adam
    kept = weights("c", "strategy=photon")
    assert (
        weights("d", "strategy=desloc", "strategy.sync.exp_avg=never", "strategy.sync.exp_avg_sq=never")
        == kept
    )
    assert len({local_adam, kept, weights("e", "strategy=fedavg-reset")}) == 3


def test_kept_states_with_nesterov_outside_are_diloco(run_small: Run) -> None:
    diloco = run_small("strategy=diloco", *PLAIN, "rounds=4", name="diloco")
    never = ("strategy.sync.exp_avg=never", "strategy.sync.exp_avg_sq=never")
    desloc = run_small("strategy=desloc", *never, "outer=diloco", *PLAIN, "rounds=4", name="desloc")
    assert desloc["weights_sha256"] == diloco["weights_sha256"]


def test_states_zeroed_at_every_sync_are_the_reset_baseline(
    run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    chosen = ("strategy=fedavg-reset", *PLAIN, "rounds=4")
    run_small(*chosen)
    expected = by_hand(small_config(*chosen), corpus, {"params": 4}, reset=True)
    _assert_trained(tmp_path, expected)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("overrides", "periods"),
    [
        (["strategy=photon"], {"params": 4}),
        (["strategy=desloc", "strategy.sync.exp_avg=never"], {"params": 4, "exp_avg_sq": 24}),
    ],
)
def test_first_moments_are_read_from_the_pseudo_gradient(
    overrides: list[str],
    periods: dict[str, int],
    run_small: Run,
    small_config: Make,
    corpus: Path,
    tmp_path: Path,
) -> None:
    chosen = ("optimizer=refreshed-adamw", *overrides, *PLAIN, "rounds=7")
    run_small(*chosen)
    _assert_trained(tmp_path, by_hand(small_config(*chosen), corpus, periods, refresh=True))
    with pytest.raises(AssertionError):
        _assert_trained(tmp_path, by_hand(small_config(*chosen), corpus, periods))


def test_momentum_sgd_that_averages_after_every_step_is_one_large_batch(
    run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    """With all periods 1 and a state that is linear in the gradient, local updates are data-parallel."""
    chosen = (
        *("strategy=local-adam", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"),
        *("strategy.weighting=uniform", "schedule=constant", "schedule.warmup_steps=0", "cohort=3"),
        *("training.clip_norm=null", "local_steps=1", "rounds=8"),
    )
    run_small(*chosen)
    config, data = small_config(*chosen), PreparedData.open(corpus)
    torch.set_num_threads(1)
    model = build_model(config.model, data.manifest.vocab_size, seed=config.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    streams = [
        WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name]))
        for name in data.silo_names
    ]
    for _ in range(8):
        optimizer.zero_grad()
        for stream in streams:
            (causal_loss(model, stream.next_batch(4)) / 3).backward()
        optimizer.step()
    _assert_trained(tmp_path, {name: parameter.detach() for name, parameter in model.named_parameters()})


def _assert_trained(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    trained = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=2e-5, atol=2e-6, msg=name)


def test_one_silo_is_its_local_optimizer_whatever_is_averaged(run_small: Run, lone_corpus: Path) -> None:
    one = [
        run_small(f"strategy={strategy}", "cohort=1", data=lone_corpus, name=strategy)["weights_sha256"]
        for strategy in ("photon", "local-adam", "desloc")
    ]
    assert len(set(one)) == 1


@pytest.mark.slow
def test_six_rounds_send_nine_payloads(run_small: Run, tmp_path: Path) -> None:
    """Periods (1, 3, 6) · K_x: parameters 6 times, first moments twice, second moments once."""

    def sent(name: str, *overrides: str) -> int:
        run_small(*overrides, *PLAIN, "rounds=6", name=name)
        events = read_events(tmp_path / name / "events.jsonl")
        return sum(e.bytes_up for e in events if isinstance(e, SiloFinished) and e.silo == "alpha")

    payload = sent("fedavg", "strategy=photon")
    assert sent("desloc", "strategy=desloc") == pytest.approx(payload * 9 / 6, rel=0.05)
    assert sent("local", "strategy=local-adam") == pytest.approx(payload * 3, rel=0.05)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("transport", "overrides", "sent"),
    [
        ("inline", ["strategy=photon"], lambda p: {"params": p}),
        ("inline", ["strategy=photon", "link=bf16"], lambda p: {"params": p // 2}),
        ("store", ["strategy=photon", "link=bf16"], lambda p: {"params": p // 2}),
        ("inline", ["strategy=local-adam"], lambda p: {"params": p, "exp_avg": p, "exp_avg_sq": p}),
        *(
            (
                transport,
                ["strategy=mtdao", "optimizer.betas=[0.9,0.99,0.999]", "optimizer.weights=[0.1,0.8]"],
                lambda p: {"params": p, "exp_avg": p, "exp_avg_2": p, "exp_avg_sq": p},
            )
            for transport in ("inline", "store")
        ),
    ],
)
def test_the_bytes_of_each_group_are_four_times_its_elements(
    transport: str,
    overrides: list[str],
    sent: Callable[[int], dict[str, int]],
    run_small: Run,
    tmp_path: Path,
) -> None:
    way = (f"link.transport={transport}", f"link.store.url={tmp_path / 'store'}", "link.keep_received=false")
    summary = run_small(*overrides, *way, "rounds=2", "local_steps=2", "cohort=3")
    params = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    expected = sent(sum(4 * tensor.numel() for tensor in params.values()))
    events = read_events(tmp_path / "run" / "events.jsonl")
    replies = [event for event in events if isinstance(event, SiloFinished)]
    down = {1: {"params": expected["params"]}, 2: expected}
    for reply in replies:
        assert reply.group_bytes_up == expected
        assert reply.group_bytes_down == down[reply.round]
        assert 0 < reply.bytes_up - sum(expected.values()) < 20_000
    assert summary["bytes"]["per_group"] == {
        group: {"up": 6 * count, "down": 3 * (count + down[1].get(group, 0))}
        for group, count in expected.items()
    }


def test_lordo_sends_the_papers_entries_and_its_bases(run_small: Run, tmp_path: Path) -> None:
    """p·q + 2·r·max(p, q) for a projected matrix, thrice the size of all else; the basis is r·min(p, q)."""
    rank = 4
    run_small("strategy=lordo", f"optimizer.rank={rank}", "rounds=1")
    params = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    hidden = [
        t.shape for name, t in params.items() if t.ndim == 2 and "wte" not in name and "wpe" not in name
    ]
    assert len(hidden) == 4
    matrices = sum(p * q for p, q in hidden)
    others = sum(tensor.numel() for tensor in params.values()) - matrices
    entries = matrices + 2 * rank * sum(max(shape) for shape in hidden) + 3 * others
    for event in read_events(tmp_path / "run" / "events.jsonl"):
        if isinstance(event, SiloFinished):
            basis = event.group_bytes_up.pop("basis")
            assert basis == 4 * rank * sum(min(shape) for shape in hidden)
            assert sum(event.group_bytes_up.values()) == 4 * entries


def test_all_silos_hold_the_same_states_after_a_round_in_which_everything_is_due(
    run_small: Run, tmp_path: Path
) -> None:
    """One more round, in which nobody moves (rate 0), shows what the silos started from."""
    run_small("strategy=local-adam", *PLAIN, "rounds=2")
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0]
    assert checkpoint.state.averaged_rounds == {"exp_avg": 2, "exp_avg_sq": 2}
    assert checkpoint.state.local_scalars == {"step": 8.0}
    run_id = checkpoint.state.run_id
    states = [
        SiloStore(tmp_path / "run" / "silos" / name, 3).load(run_id, 2) for name in ("alpha", "beta", "gamma")
    ]
    for group in ADAM:
        averaged = checkpoint.load_averaged(group)
        for name, tensor in averaged.items():
            mean = torch.stack([state.groups[group][name] for state in states]).double().mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-9)


def test_an_absent_silo_receives_the_averages_and_a_new_one_the_step_count(
    run_small: Run, tmp_path: Path
) -> None:
    """With two of three silos a round somebody is new later, and starts at the others' step count."""
    run_small("strategy=local-adam", "cohort=2", "rounds=4", "checkpoint.keep=8")
    first: dict[str, int] = {}
    for event in read_events(tmp_path / "run" / "events.jsonl"):
        if isinstance(event, SiloFinished):
            first.setdefault(event.silo, event.round)
    newcomer, joined = max(first.items(), key=lambda item: item[1])
    assert joined > 1
    run_id = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].state.run_id
    state = SiloStore(tmp_path / "run" / "silos" / newcomer, 9).load(run_id, joined)
    assert state is not None
    assert state.scalars["step"] == 4 * joined


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=local-adam", "strategy.sync={exp_avg: 8, exp_avg_sq: 12}"),
        ("strategy=desloc", "strategy.sync={exp_avg: 8, exp_avg_sq: 12}"),
        ("strategy=photon", "optimizer=refreshed-adamw"),
    ],
)
def test_a_resumed_run_averages_as_an_uninterrupted_one(run_small: Run, overrides: tuple[str, ...]) -> None:
    chosen = (*overrides, "cohort=2")
    whole = run_small(*chosen, "rounds=6", name="whole")
    interrupted(run_small, *chosen)
    assert (
        run_small(*chosen, "rounds=6", name="parts", resume=True)["weights_sha256"] == whole["weights_sha256"]
    )


def interrupted(run_small: Run, *chosen: str) -> None:
    """Stop after four rounds, as a crash in round 5 would."""
    from unittest.mock import patch

    from photon.federation.federation import Federation

    whole_round = Federation._round

    def dying(self: Federation, checkpoint: Any) -> Any:
        if checkpoint.state.round == 4:
            raise RuntimeError("the server dies")
        return whole_round(self, checkpoint)

    with patch.object(Federation, "_round", dying), pytest.raises(RuntimeError, match="dies"):
        run_small(*chosen, "rounds=6", name="parts")


def test_lordos_bases_are_equal_on_all_silos_even_on_those_that_missed_rounds(
    run_small: Run, tmp_path: Path
) -> None:
    run_small("strategy=lordo", "optimizer.rank=4", "cohort=2", "rounds=6", "checkpoint.keep=8")
    state = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].state
    kept = {name: SiloStore(tmp_path / "run" / "silos" / name, 9) for name in state.ledger}
    missed = False
    for server_round in range(2, 7):
        states = {name: store.load(state.run_id, server_round) for name, store in kept.items()}
        bases = {name: one.groups["basis"] for name, one in states.items() if one is not None}
        assert len(bases) == 2
        missed |= any(kept[name].load(state.run_id, server_round - 1) is None for name in bases)
        first, second = bases.values()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert missed, "with two of three silos a round, somebody has missed one"
