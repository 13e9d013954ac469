"""LUNAR over a federation: what the silos sum is what one machine would have, under masks and without.

Most of these runs have a model of random weights, whose answers mean nothing; what is counted of them is
made up (`judged`).
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor
from transformers import PreTrainedModel

from photon.config.schema import RunConfig
from photon.data.questions import SETS
from photon.data.silo_data import SiloData
from photon.engine.inprocess import InProcessGrid, run_inprocess
from photon.federation.run import prepare_run, run_federation
from photon.link.records import decode_groups
from photon.models.build import build_model
from photon.node import answer
from photon.objective import lunar
from photon.objective.lunar import Lunar
from photon.privacy.masking import SUM_RANGE, FixedPoint
from photon.state.checkpoint import CheckpointStore
from photon.training.groups import read_params
from photon.unlearning.capture import sites_of
from photon.unlearning.problem import Choice, Method, Problem
from photon.unlearning.statistics import gram_sums
from tests.conftest import small_run
from tests.objective.forgetting import SILOS, encoded, questions, write_questions

LUNAR = [
    "strategy=sums",
    "objective=lunar",
    "objective.asked_by=the member alpha",
    "objective.layers=[0,1]",
    "objective.coefficients=[1.0,2.0]",
    "rounds=3",
    "cohort=null",
    "model.architecture.n_layer=3",
    "model.sequence_length=48",
]
MASKED = ["privacy=secure", "link.uplink_payload=update"]
#: What is chosen, by what `judged` makes up.
CHOSEN = Choice(1, 1e-2, 2.0)
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), questions())


@pytest.fixture
def make(asked: Path, tmp_path: Path) -> "Make":
    def config(*overrides: str, data: Path = asked, name: str = "run") -> RunConfig:
        return prepare_run(small_run(*LUNAR, *overrides, data=data, run_dir=tmp_path / name))

    return config


@pytest.fixture(autouse=True)
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each candidate look better than the one before."""
    monkeypatch.setattr("os.fsync", lambda _: None)

    def scanned(self: Lunar, model: Any, sites: Any, data: SiloData, candidates: Any) -> Tensor:
        forget, retain, reference = (float(len(of)) for of in lunar._questions(data))
        count = 1 + len(self._choices(sites))
        rows = []
        for index in range(count):
            share = index / count
            of_forget = [forget, share * forget, (1 - share) * forget]
            rows.append([of_forget, [retain, 0.0, retain], [reference, reference, 0.0]])
        return torch.tensor(rows, dtype=torch.float64)

    monkeypatch.setattr(Lunar, "_scanned", scanned)


def run(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    return run_inprocess(config, answer, resume=resume)


def store(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(Path(str(config.run_dir)) / "checkpoints")


def first_model(config: RunConfig) -> PreTrainedModel:
    return build_model(config.model, store(config).load(3).state.vocab_size, seed=config.seed).eval()


def central(config: RunConfig, data: Path, silos: list[str]) -> tuple[PreTrainedModel, Problem]:
    """Return the problem of all questions in one place, prompt by prompt."""
    model = first_model(config)
    prompts = {name: [] for name in SETS}
    for one in encoded(data, silos):
        prompts[SETS[one.set - 1]].append(one.prompt)
    sites = [sites_of(model)[layer] for layer in (0, 1)]
    method = Method(batch_size=1)
    return model, Problem(model, sites, prompts["forget"], prompts["retain"], prompts["reference"], method)


def solved(config: RunConfig) -> dict[str, Tensor]:
    """Return what the server made of the sums."""
    return store(config).load(2).load_kept()["shared/candidates"]


def check_weights(config: RunConfig, model: PreTrainedModel, problem: Problem, *, atol: float) -> None:
    """Check that one matrix has moved by what one machine would add, and everything else has its bits."""
    before = read_params(model)
    after = store(config).load(3).load_params()
    edit = problem.edit(CHOSEN)
    name = edit.site.name
    # GPT-2 has the matrix the other way round.
    expected = (before[name].double() + edit.delta.T).float()
    torch.testing.assert_close(after[name], expected, rtol=2**-23, atol=atol)
    assert not torch.equal(after[name], before[name])
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)


def test_sums_over_silos_give_what_one_machine_has(make: Make, asked: Path) -> None:
    config = make()
    run(config)
    model, problem = central(config, asked, SILOS)
    for layer in (0, 1):
        vector = problem.vectors[layer]
        found = solved(config)[f"layer-{layer}.vector"]
        assert float((found - vector).norm()) <= 1e-10 * float(vector.norm())
        for index, ridge in enumerate((1e-3, 1e-2)):
            expected = problem.edit(Choice(layer, ridge, 2.0)).delta
            gain = solved(config)[f"layer-{layer}.gains"][index]
            delta = 2.0 * torch.outer(found, gain)
            assert float((delta - expected).norm()) <= 1e-10 * float(expected.norm())
    check_weights(config, model, problem, atol=0)
    state = store(config).load(3).state
    assert state.global_step == 0
    (told,) = state.unlearned
    assert (told.layer, told.ridge, told.coefficient) == CHOSEN
    assert told.asked_by == "the member alpha"
    assert told.prompts == {"forget": 4, "retain": 16, "reference": 24}
    assert told.hash_before != told.hash_after
    assert told.before["forget/refused"] == 0
    assert told.after["forget/refused"] == pytest.approx(8 / 9)


@pytest.mark.parametrize("silos", [["all"], ["left", "right"]])
def test_any_split_gives_the_same(make: Make, asked: Path, tmp_path: Path, silos: list[str]) -> None:
    everything = [row for rows in questions().values() for row in rows]
    parts = {silo: everything[index :: len(silos)] for index, silo in enumerate(silos)}
    # What a tokenizer learns depends on who has what, and is given here.
    data = write_questions(tmp_path, parts, tokenizer=asked / "tokenizer")
    config = make(data=data)
    run(config)
    _, problem = central(config, asked, SILOS)
    expected = problem.edit(CHOSEN).delta
    found = solved(config)
    delta = 2.0 * torch.outer(found["layer-1.vector"], found["layer-1.gains"][1])
    assert float((delta - expected).norm()) <= 1e-10 * float(expected.norm())


def test_masks_lose_no_more_than_is_stated(make: Make, asked: Path) -> None:
    """n s / 2 in each sum, and what a linear system makes of that.

    With M = HᵀH + μI, M g = s, errors e of each value of s and of HᵀH, and d columns:
    ‖δg‖ ≤ (√d e + d e (1 + λ) ‖g‖) / (μ − d e (1 + λ)).
    """
    config = make(*MASKED)
    run(config)
    model, problem = central(config, asked, SILOS)
    step = FixedPoint({"x": SUM_RANGE}, 4).step("x")
    assert step == 2.0**-39
    error = 4 * step / 2
    found, ridge = solved(config), 1e-2
    vector, gain = found["layer-1.vector"], found["layer-1.gains"][1]
    sums = gram_sums(model, [sites_of(model)[1]], problem._steered, problem._kept)[1]
    exact = problem._gain(1, ridge)
    columns, mu = len(exact), ridge * float(sums.gram().diagonal().mean())
    of_gram = columns * error * (1 + ridge)
    bound = (math.sqrt(columns) * error + of_gram * float(exact.norm())) / (mu - of_gram)
    off = float((gain - exact).norm())
    assert 0 < off <= bound + 1e-13
    assert bound < 1e-6 * float(exact.norm()), "the bound says something"
    off = float((vector - problem.vectors[1]).abs().max())
    assert off <= error * (1 / 24 + 1 / 4) + 1e-14
    reach = 2.0 * (float(vector.norm()) * bound + float(exact.norm()) * 4 * error)
    check_weights(config, model, problem, atol=reach)


def test_nothing_but_the_named_sums_reaches_the_server(make: Make, asked: Path) -> None:
    config = make(*MASKED)
    grid = Recorder(answer, {1: {}})
    run_federation(config, grid, resume=False, live=False)
    for message in grid.replies:
        arrays = {name for name, record in message.content.items() if isinstance(record, ArrayRecord)}
        if arrays:
            for group, tensors in decode_groups(message.content).items():
                grid.seen.setdefault(group, []).append(tensors)
                assert all(tensor.dtype == torch.int64 for tensor in tensors.values()), group
    assert {group: len(of) for group, of in grid.seen.items()} == {
        "shared/counts": 4,
        "shared/vectors": 4,
        "shared/grams": 4,
        "shared/figures": 4,
    }
    names = {group: set(of[0]) for group, of in grid.seen.items()}
    assert names["shared/counts"] == {"prompts", "silos", "all"}
    assert names["shared/vectors"] == {
        f"layer-{n}.{x}" for n in (0, 1) for x in ("reference", "forget", "rows")
    }
    assert names["shared/grams"] == {f"layer-{n}.{x}" for n in (0, 1) for x in ("upper", "forget", "rows")}
    assert names["shared/figures"] == {"figures"}
    # To the server a silo without anything to forget looks as one with it: like noise.
    for silo in range(4):
        sent = grid.seen["shared/grams"][silo]["layer-1.forget"]
        high = (sent >> 56).float()
        assert 20 < float(high.std()) < 130
        assert len(set(sent.tolist())) == sent.numel()


class Recorder(InProcessGrid):
    """Remembers the replies to train requests."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replies: list[Message] = []
        self.seen: dict[str, list[Mapping[str, Tensor]]] = {}

    def pull_messages(self, message_ids: Any) -> Any:
        for reply in super().pull_messages(message_ids):
            if not reply.has_error():
                self.replies.append(reply)
            yield reply
