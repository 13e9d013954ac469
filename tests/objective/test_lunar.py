"""LUNAR over a federation: what the silos sum is what one machine would have, under masks and without.

Most of these runs have a model of random weights, whose answers mean nothing; what is counted of them is
made up (`judged`).
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from photon.commands.app import app
from photon.config.compose import load
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.questions import SETS
from photon.data.silo_data import SiloData
from photon.engine.inprocess import InProcessGrid, run_inprocess
from photon.errors import PhotonError, RefusedError, RunError
from photon.evaluation.unlearn import unlearn
from photon.federation.run import prepare_run, run_federation
from photon.link.messages import BODY, TrainReport, TrainRequest, pack, unpack
from photon.link.records import decode_groups, encode_groups
from photon.models.build import build_model
from photon.node import answer
from photon.objective import lunar, probe
from photon.objective.base import Behind
from photon.objective.lunar import Lunar
from photon.objective.probe import Judged
from photon.privacy.masking import SUM_RANGE, FixedPoint
from photon.silo.policy import NO_POLICY, SiloPolicy
from photon.state.checkpoint import CheckpointStore, weights_sha256
from photon.state.unlearned import read_unlearned
from photon.strategy.base import Participant
from photon.strategy.sums import Sums
from photon.telemetry.events import Evaluated, Notice, SiloFailed
from photon.telemetry.log import read_events
from photon.training.groups import read_params
from photon.unlearning.capture import sites_of
from photon.unlearning.problem import Choice, Method, Problem
from photon.unlearning.questions import Question, Sets
from photon.unlearning.request import Request
from photon.unlearning.statistics import gram_sums
from tests.conftest import small_run, write_corpus
from tests.federation.test_federation import TamperingGrid
from tests.objective.forgetting import SILOS, World, encoded, make_world, questions, write_questions

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


def test_the_guard_lets_a_model_forget(make: Make, asked: Path) -> None:
    """What is made of sums was asked for: a worse loss is no reason to put the model back."""
    config = make("federation.guard.tolerance=0.0001")
    run(config)
    check_weights(config, *central(config, asked, SILOS), atol=0)
    assert store(config).load(3).state.progress.undone == 0


@pytest.mark.few(1)
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


@pytest.mark.slow
def test_masks_lose_no_more_than_is_stated(make: Make, asked: Path) -> None:
    """n s / 2 in each sum, and what a linear system makes of that.

    With M = HᵀH + μI, M g = s, errors e of each value of s and of HᵀH, and d columns:
    ‖δg‖ ≤ (√d e + d e (1 + λ) ‖g‖) / (μ − d e (1 + λ)).
    """
    config = make(*MASKED)
    run(config)
    model, problem = central(config, asked, SILOS)
    step = FixedPoint({"x": SUM_RANGE}, 4).step("x")
    assert step == 2.0**-40
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


# --- who answers, and who does not --------------------------------------------------------------------


class Absent(TamperingGrid):
    """One silo's replies to train requests of a round do not come."""

    def __init__(self, silo: str, server_round: int) -> None:
        super().__init__(silo, lambda reply: self._lost(reply, server_round))

    def _lost(self, reply: Message, server_round: int) -> Message:
        if unpack(reply.content, TrainReport).round != server_round:
            return reply
        return Message(Error(2, "the machine is off"), reply_to=reply)


@pytest.mark.few(1)
@pytest.mark.parametrize("masked", [[], MASKED], ids=["open", "masked"])
def test_a_silo_that_is_away_in_a_later_round_stops_the_run_and_resuming_gives_the_same(
    make: Make, masked: list[str]
) -> None:
    whole = make(*masked, name="whole")
    run(whole)
    config = make(*masked)
    with pytest.raises(RunError, match="the machine is off"):
        run_federation(config, Absent("delta", 2), resume=False, live=False)
    assert store(config).latest()[0].state.round == 1
    run(load(Path(str(config.run_dir)) / "config.yaml"), resume=True)
    found, expected = (store(one).load(3) for one in (config, whole))
    assert weights_sha256(found.load_params()) == weights_sha256(expected.load_params())


def test_a_later_round_is_over_the_silos_of_the_first(make: Make) -> None:
    config = make()
    run(config)
    strategy = Sums(config)
    first = store(config).load(2)
    everybody = [Participant(name, (name,), 4) for name in SILOS]
    strategy.configure_train(3, first, everybody)
    with pytest.raises(RunError, match="round 3: gamma answered round 2 and is away; resume the run with"):
        strategy.configure_train(3, first, everybody[:3])
    more = [*everybody, Participant("omega", ("omega",), 4)]
    with pytest.raises(RunError, match="omega was not in round 2"):
        strategy.configure_train(3, first, more)


def alone(tmp_path: Path, asked: Path) -> Path:
    """Return questions of which one silo alone has some to be forgotten."""
    silos = questions()
    silos["alpha"] += [row for row in silos["beta"] if row["set"] == "forget"]
    silos["beta"] = [row for row in silos["beta"] if row["set"] != "forget"]
    return write_questions(tmp_path, silos, tokenizer=asked / "tokenizer")


def test_who_would_be_alone_is_told_before_anything_but_counts_leaves(
    make: Make, asked: Path, tmp_path: Path
) -> None:
    config = make(*MASKED, data=alone(tmp_path, asked))
    grid = Recorder(answer, {1: {}})
    with pytest.raises(RunError, match="one silo alone has rows of the set forget, so masks would hide noth"):
        run_federation(config, grid, resume=False, live=False)
    groups = {
        name
        for reply in grid.replies
        for name, record in reply.content.items()
        if isinstance(record, ArrayRecord)
    }
    assert groups == {"shared/counts"}


def test_consent_and_sums_without_masks_go_on(make: Make, asked: Path, tmp_path: Path) -> None:
    data = alone(tmp_path, asked)
    for name, overrides in (("consent", [*MASKED, "privacy.alone=[forget]"]), ("open", [])):
        config = make(*overrides, data=data, name=name)
        run(config)
        assert len(store(config).load(3).state.unlearned) == 1


def behind(forget: int, silos: int) -> Behind:
    return Behind(
        {"forget": forget, "retain": 20, "reference": 0}, {"forget": silos, "retain": 3, "reference": 1}
    )


def test_a_policy_asks_for_rows_and_for_company() -> None:
    policy = SiloPolicy()
    policy.check_sums("alpha", behind(8, 2), masked=True)
    # One that has no part in a sum is not asked.
    policy.check_sums("alpha", behind(0, 1), masked=True)
    with pytest.raises(RefusedError, match=r"=8, .* a sum over 7 row\(s\) of the set forget"):
        policy.check_sums("alpha", behind(7, 2), masked=True)
    with pytest.raises(RefusedError, match=r"alone=\[\], .* the set forget, in which it would be alone"):
        policy.check_sums("alpha", behind(8, 1), masked=True)
    # Without masks nothing is promised, and a silo that wants them is asked for none.
    policy.check_sums("alpha", behind(8, 1), masked=False)
    SiloPolicy(alone=["forget"]).check_sums("alpha", behind(8, 1), masked=True)
    NO_POLICY.check_sums("alpha", behind(1, 1), masked=True)


def test_a_silos_policy_is_asked_at_the_gate(make: Make, asked: Path, tmp_path: Path) -> None:
    config = make("federation=deployment")
    params = read_params(build_model(config.model, PreparedData.open(asked).manifest.vocab_size, seed=1))
    content = encode_groups({"params": params})
    body = {"run_id": "r", "model_id": "m", "round": 1, "silo": "alpha", "members": ["alpha"], "steps": 0}
    body |= {"global_step": 0, "batch_size": 4, "last_round": 0, "position": 0, "cohort": 4}
    content[BODY] = pack(TrainRequest.model_validate(body), config)
    node = {"data-dir": str(asked), "state-dir": str(tmp_path / "state"), "policy": str(tmp_path / "p.yaml")}
    for rule, says in (
        ("{}", r"min_round_windows=8, and the request asks for a sum over 2 row\(s\) of the set forget"),
        (
            "objectives: [CausalLM]",
            r"objectives=\[CausalLM\], and the request asks for photon",
        ),
        ("secure_aggregation: true", "secure_aggregation=true"),
    ):
        (tmp_path / "p.yaml").write_text(rule)
        with pytest.raises(PhotonError, match=says):
            unpack(answer("train", content, node), TrainReport)
    (tmp_path / "p.yaml").write_text("{objectives: [Lunar], min_round_windows: 2}")
    assert unpack(answer("train", content, node), TrainReport).steps == 0


# --- what is chosen, and what is refused --------------------------------------------------------------


def test_a_model_that_does_not_refuse_is_told_with_what_was_seen() -> None:
    def found(refused: float, unknown: float = 1.0) -> dict[str, dict[str, float]]:
        known = {"rouge1": 0.5, "refused": 0.0}
        return {"forget": {**known, "refused": refused}, "retain": known, "unknown": {"refused": unknown}}

    one, other = (Choice(1, 1e-2, 0.5), found(0.3)), (Choice(2, 1e-2, 1.0), found(0.4))
    with pytest.raises(PhotonError, match="refuses 30% of the reference questions, so there is no direction"):
        lunar._check_refuses(found(0.0, 0.3), [one, other])
    with pytest.raises(PhotonError, match=r"of 2 candidates none refuses more than 40% .*\(layer 2"):
        lunar._check_refuses(found(0.0), [one, other])
    # One alone was named, so it is taken; and half of them are enough.
    lunar._check_refuses(found(0.0), [one])
    lunar._check_refuses(found(0.0), [one, (Choice(2, 1e-2, 1.0), found(0.5))])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective.asked_by=null"], "asked_by: name who asks"),
        (["rounds=2"], "Lunar takes 3 rounds; set rounds=3"),
        (["cohort=2"], "Lunar asks all silos in every round; set cohort=null"),
        (["objective.layers=[3]"], "the model has blocks 0 to 2, no 3"),
        (["objective.ridges=[]"], "ridges=.*give one value or more"),
        (["objective.coefficients=[0.0]"], "coefficients=.*in its range"),
        (["objective.positions=from-first-difference"], "input should be 'last' or 'all'"),
        (["objective.layer=1"], "objective.layer: unknown key; did you mean 'objective.layers'"),
        (["privacy.clip_norm=1.0"], "privacy.clip_norm: nothing bounds the sums"),
        (
            ["link.downlink=[{_target_: photon.link.quantize.Cast, dtype: bfloat16}]"],
            "link.downlink: silos",
        ),
        (["training.processes=2", "training.parallel=fsdp"], "Lunar needs the whole model on a device"),
        (["federation.tree={north: [alpha, beta], south: [gamma, delta]}"], "north is a federation, which"),
        (["strategy=photon"], "the objective Lunar takes no steps; use strategy=sums"),
        ([*MASKED, "link.states=[{_target_: photon.link.lossless.Zstd}]"], "looks like noise"),
    ],
)
def test_what_does_not_go_with_it_is_told(make: Make, overrides: list[str], says: str) -> None:
    with pytest.raises(PhotonError, match=says):
        run(make(*overrides))


def test_sets_that_nobody_has_are_told(make: Make, asked: Path, tmp_path: Path) -> None:
    for number, missing in enumerate(("forget", "reference")):
        silos = {name: [row for row in rows if row["set"] != missing] for name, rows in questions().items()}
        data = write_questions(tmp_path / missing, silos, tokenizer=asked / "tokenizer")
        with pytest.raises(PhotonError, match=f"no silo has a question of the set {missing}; one must have"):
            run(make(data=data, name=f"run-{number}"))


# --- what becomes of it later -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_later_run_knows_what_was_forgotten_and_warns_when_it_comes_back(
    make: Make, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("telemetry.export=true", "evaluation.tasks=[]")
    run(config)
    export = Path(str(config.run_dir)) / "export"
    (told,) = read_unlearned(export)
    assert told == store(config).load(3).state.unlearned[0]
    assert "Answers suppressed on request" in (export / "README.md").read_text()
    data = write_corpus(tmp_path / "text", dict.fromkeys(SILOS, "abcdef"), asked / "tokenizer")
    recalls = iter([0.0, 0.2, 1.0, 1.0])
    model_asked = []

    def answers_to(model: Any, some: Any, *_: Any) -> list[Judged]:
        # alpha and beta have two questions each, of which both models know as much.
        if len(model_asked) % 2 == 0:
            model_asked.append(next(recalls))
        else:
            model_asked.append(model_asked[-1])
        assert not model.training
        return [Judged(model_asked[-1], False)] * len(some)

    monkeypatch.setattr(probe, "answers_to", answers_to)
    later = prepare_run(
        small_run(
            "model.architecture.n_layer=3",
            f"model.warm_start={export}",
            "model.sequence_length=48",
            f"evaluation.forgotten={asked}",
            "telemetry.export=true",
            "rounds=2",
            "cohort=null",
            data=data,
            run_dir=tmp_path / "later",
        )
    )
    summary = run(later)
    events = read_events(tmp_path / "later" / "events.jsonl")
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [round(event.recall or 0.0, 6) for event in evaluated] == [0.0, 0.2, 1.0]
    assert set(evaluated[0].remembered) == {"alpha", "beta"}
    assert evaluated[0].remembered["alpha"]["asked"] == 2
    warned = [
        event.message for event in events if isinstance(event, Notice) and "comes back" in event.message
    ]
    # By 8/9 of the candidates' share what was to be forgotten was refused, and 1/9 recalled.
    assert [line[:8] for line in warned] == ["round 2:"]
    assert "gives 1.00 of the answers (ROUGE-1 recall), and gave 0.11 when the member alpha" in warned[0]
    assert summary["recall_of_forgotten"] == 1.0
    assert read_unlearned(tmp_path / "later" / "export") == [told]


def test_questions_of_another_tokenizer_are_told(make: Make, asked: Path, tmp_path: Path) -> None:
    other = write_questions(tmp_path, questions(), vocab_size=280)
    config = make(f"evaluation.forgotten={other}", "rounds=3")
    run(config)
    failed = [e for e in read_events(Path(str(config.run_dir)) / "events.jsonl") if isinstance(e, SiloFailed)]
    assert failed
    assert all("were prepared with another tokenizer than" in event.reason for event in failed)


def test_report_and_display_tell_of_the_request(make: Make, tmp_path: Path) -> None:
    run(make())
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert "Requests, in this run" in page
    assert "the member alpha" in page
    assert "transformer.h.1.mlp.c_proj.weight (ridge 0.01, coefficient 2)" in page
    done = CliRunner().invoke(app, ["watch", str(tmp_path / "run")])
    assert "unlearned as the member alpha asked: layer 1, ridge 0.01, coefficient 2" in done.output


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["inprocess", "simulation"])
def test_photon_unlearn_and_the_federation_give_the_same_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """A trained model, secure sums over four silos, and the scan as it is."""
    monkeypatch.undo()
    rows = [row for of in questions().values() for row in of]
    sets = {
        name: [Question(row["question"], row["answer"]) for row in rows if row["set"] == name]
        for name in SETS
    }
    # How far so small a model can be steered hangs on the bits that its training gave. Of a Llama one
    # candidate is taken, whatever comes of it; the GPT-2 is scanned, and has to refuse.
    is_scanned = "gpt2" in (world.export / "config.json").read_text()
    layers, ridges, factors = ([1, 2], [1e-3, 1e-2], [0.5, 1.0, 2.0]) if is_scanned else ([2], [1e-3], [2.0])
    asked = Request(
        Sets(**sets),
        "me",
        method=Method(batch_size=1),
        layers=layers,
        ridges=ridges,
        coefficients=factors,
        limit=None,
    )
    outcome = unlearn(world.export, tmp_path / "alone", asked)
    config = [
        *("objective=lunar", "strategy=sums", "objective.asked_by=me", "rounds=3", "cohort=null"),
        *("model=custom", f"model.warm_start={world.export}", "model.sequence_length=48", *MASKED),
        *("model.recipe.learning_rate=1e-3", "model.recipe.warmup_steps=1", "telemetry.report=false"),
        *(f"federation={engine}", "data=prepared", f"data.path={world.data}", "telemetry.display=none"),
        *("training.threads=1", "training.precision=fp32", f"run_dir={tmp_path / 'run'}"),
        *(f"objective.layers={layers}", f"objective.ridges={ridges}", f"objective.coefficients={factors}"),
    ]
    done = subprocess.run(
        [Path(sys.executable).parent / "photon", "train", *config],
        env=os.environ | {"PHOTON_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = read_unlearned(tmp_path / "run" / "export")
    assert outcome.chosen == [(told.layer, told.ridge, told.coefficient)]
    assert told.after["forget/rouge1"] == pytest.approx(outcome.after["forget"]["rouge1"])
    assert told.after["forget/refused"] == pytest.approx(outcome.after["forget"]["refused"])
    assert told.hash_before != told.hash_after
    assert not is_scanned or told.after["forget/refused"] >= 0.5
    one, other = (
        load_file(path / "model.safetensors") for path in (tmp_path / "alone", tmp_path / "run/export")
    )
    assert set(one) == set(other)
    for name, tensor in one.items():
        if name.endswith(told.weight.removeprefix("transformer.").removeprefix("model.")):
            torch.testing.assert_close(other[name], tensor, rtol=2**-22, atol=1e-9)
        else:
            assert torch.equal(other[name], tensor)
