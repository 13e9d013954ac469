"""Settings drawn at random: what can be combined trains, and goes on after a crash as if there were none."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation import federation
from photon.federation.run import prepare_run
from photon.node import answer
from photon.silo import service

ROUNDS = 4
SILOS = ("alpha", "beta", "gamma")
CODECS = ("bf16", "fp8", "int8", "int4", "e3m0", "sign", "topk", "powersgd", "top64of4096", "top1of32")
TREES = ("{n: [alpha, beta], s: [gamma]}", "{n: {m: [alpha], k: [beta]}, s: [gamma]}")
INT8 = "[{_target_: photon.link.codecs.Int, bits: 8, block: 256}]"
E5M2 = "[{_target_: photon.link.codecs.Float8, dtype: float8_e5m2}]"

#: Overrides of which one is drawn.
Axis = list[list[str]]


def axis(key: str, *values: object) -> Axis:
    return [[f"{key}={value}"] for value in values]


ANY: list[Axis] = [
    axis("link", *CODECS),
    axis("link.downlink", INT8),
    axis("outer", "diloco", "fedadam", "fedmom"),
    [["evaluation.every=2"], ["training.micro_batch_size=2"], ["telemetry.diagnostics=true"]],
]
#: Strategies, and what can be combined with each of them.
FAMILIES: list[tuple[Axis, list[Axis]]] = [
    (
        axis("strategy", "photon", "diloco", "fedavg-reset", "streaming-diloco", "centralized"),
        [
            *ANY,
            axis("link", "sparseloco"),
            axis("optimizer", "adopt", "qhadopt", "muon", "sgd"),
            [["privacy=gaussian", "privacy.seed=3"], ["+transition.step=8", "+transition.lr_scale=0.5"]],
        ],
    ),
    (
        axis("strategy", "photon", "diloco"),
        [
            axis("optimizer", "lordo", "refreshed-adamw"),
            axis("outer", "fedadam", "fedmom"),
            [
                ["link.uplink_payload=update", "link.downlink_payload=update"],
                ["link=int8", "link.downlink_payload=update"],
            ],
            [["privacy=secure", "link=dense", "link.uplink_payload=update", "strategy.weighting=uniform"]],
        ],
    ),
    (
        axis("strategy", "local-adam", "desloc", "mtdao", "lordo"),
        [*ANY, axis("link.states", INT8, E5M2), axis("+transition.step", 8)],
    ),
    (
        axis("strategy", "sparsyfed", "topk", "zerofl", "flash"),
        [axis("outer", "fedmom"), axis("optimizer", "sgd", "adopt"), axis("strategy.sparsity", 0.5, 0.9)],
    ),
    (
        axis("strategy", "worldlm", "hierfavg", "fedper", "local"),
        [*ANY, axis("federation.tree", *TREES), axis("optimizer", "qhadamw", "muon")],
    ),
]


STRATEGIES = [(strategy, axes) for strategies, axes in FAMILIES for strategy in strategies]


def draw(number: int, chance: random.Random) -> list[str]:
    """Return overrides, of every second axis that goes with a strategy; of a key the last one counts."""
    strategy, axes = STRATEGIES[number % len(STRATEGIES)]
    drawn: dict[str, str] = {"cohort": f"cohort={chance.choice((2, 3, 'null'))}"}
    for options in [[strategy], *(one for one in axes if chance.random() < 0.5)]:
        drawn |= {override.partition("=")[0]: override for override in chance.choice(options)}
    if "federation.tree" in drawn:
        drawn["cohort"] = "cohort=null"
    # Dropout draws in every step, whoever else has drawn in the process before.
    model = ["model.architecture.n_layer=2", "model.architecture.resid_pdrop=0.1"]
    return [f"rounds={ROUNDS}", *model, "federation.quorum=1", *drawn.values()]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3 * len(STRATEGIES)))
def test_what_can_be_combined_trains_and_resumes(
    seed: int, small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    overrides = draw(seed, chance)
    failing = (chance.choice(SILOS), chance.randint(2, ROUNDS)) if chance.random() < 0.3 else None
    last_words = (chance.choice(("train", "write", "write")), chance.randint(2, ROUNDS))
    mortal = False
    train, writing = service.train, federation.CheckpointStore.writing

    def train_or_fail(request: Any, *rest: Any) -> Any:
        if (request.silo, request.round) == failing:
            raise PhotonError("its disk is full")
        if mortal and last_words == ("train", request.round):
            raise Killed
        return train(request, *rest)

    def write_or_die(store: Any, state: Any, *rest: Any, **kept: Any) -> Any:
        if mortal and last_words == ("write", state.round):
            raise Killed
        return writing(store, state, *rest, **kept)

    monkeypatch.setattr(service, "train", train_or_fail)
    monkeypatch.setattr(federation.CheckpointStore, "writing", write_or_die)
    whole = run_inprocess(prepare_run(small_config(*overrides, name="whole")), answer, resume=False)
    killed = prepare_run(small_config(*overrides, name="killed"))
    mortal = True
    with pytest.raises(Killed):
        run_inprocess(killed, answer, resume=False)
    mortal = False
    resumed = run_inprocess(killed, answer, resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["perplexity"]["final"] == whole["perplexity"]["final"]
