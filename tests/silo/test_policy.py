"""A silo's own rules: what goes beyond one is refused, shown, and costs nobody else the round."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.client_app import answer
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError, RefusedError, RunError
from photon.federation.run import prepare_run, run_federation
from photon.link.messages import Masking, TrainRequest
from photon.models.build import build_model
from photon.silo.policy import Cost, PrivacyRule, SiloPolicy, read_policy
from photon.silo.shapes import contract_of
from photon.state.checkpoint import CheckpointStore
from photon.state.silo import SiloCounts, Use
from photon.telemetry.events import Evaluated, Event, Notice, RunStarted, SiloFailed, SiloFinished
from photon.telemetry.log import read_events

Make = Callable[..., RunConfig]
ORDER = TrainRequest(
    run_id="run",
    model_id="model",
    round=1,
    silo="alpha",
    members=["alpha"],
    global_step=0,
    steps=10,
    batch_size=4,
    last_round=0,
    position=0,
    cohort=3,
)
COST = Cost(steps=10, windows=40, tokens=640, releases=1)


def events_of(run_dir: Path, kind: type[Event]) -> list[Any]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, kind)]


# --- rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "trained", "message"),
    [
        ({"max_local_steps": 9}, 0, "max_local_steps=9, and the request asks for 10 local steps"),
        (
            {"max_round_tokens": 639},
            0,
            "max_round_tokens=639, and the request asks for 640 tokens in a round",
        ),
        ({"max_run_tokens": 1000}, 361, "max_run_tokens=1,000, and the request asks for 1,001 tokens so far"),
        ({"min_cohort": 4}, 0, "min_cohort=4, and the request asks for a cohort of 3"),
    ],
)
def test_an_order_beyond_a_limit_is_refused(rules: dict[str, int], trained: int, message: str) -> None:
    """Ten steps of four windows of 16 tokens are 640 tokens."""

    def judged(policy: SiloPolicy) -> None:
        policy.check_train_request(ORDER)
        policy.check_cost("alpha", COST, trained)

    with pytest.raises(RefusedError) as refusal:
        judged(SiloPolicy(**rules))
    assert str(refusal.value).startswith("refused by alpha's policy: ")
    assert message in str(refusal.value)
    at_the_limit = {rule: limit - 1 if rule == "min_cohort" else limit + 1 for rule, limit in rules.items()}
    judged(SiloPolicy(**at_the_limit))


def test_an_update_without_masks_is_refused() -> None:
    with pytest.raises(
        RefusedError, match="secure_aggregation=true, and the request asks for an update without"
    ):
        SiloPolicy(secure_aggregation=True).check_train_request(ORDER)
    masking = Masking(attempt="a" * 32, silos=[])
    SiloPolicy(secure_aggregation=True).check_train_request(ORDER.model_copy(update={"masking": masking}))


def test_key_layers_that_would_leave_without_masks_are_refused(small_config: Make) -> None:
    policy, deep = SiloPolicy(secure_aggregation=True), "model.architecture.n_layer=2"

    def judge(*overrides: str) -> None:
        policy.check_contract("alpha", contract_of(small_config(*overrides, deep), 300, 1, "alpha"))

    with pytest.raises(RefusedError, match=r"secure_aggregation=true.*transformer\.h\.1\..* without a mask"):
        judge("strategy=worldlm")
    for strategy in ("fedper", "hierfavg"):
        judge(f"strategy={strategy}")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            SiloPolicy(secure_aggregation=True),
            "secure_aggregation=true, and the request asks for exp_avg/.* without",
        ),
        (SiloPolicy(privacy=PrivacyRule(clip_norm=1.0)), "the state groups exp_avg, exp_avg_sq"),
    ],
)
def test_a_smoothed_gradient_does_not_leave_beside_what_is_masked_or_bounded(
    policy: SiloPolicy, message: str, small_config: Make
) -> None:
    contract = contract_of(small_config("strategy=local-adam"), 300, 1, "alpha")
    with pytest.raises(RefusedError, match=message):
        policy.check_contract("alpha", contract)


def test_a_vocabulary_that_would_leave_without_noise_is_refused(small_config: Make) -> None:
    restricted = small_config("strategy=worldlm", "strategy.embeddings=restricted")
    clipping = PrivacyRule(clip_norm=1.0)
    SiloPolicy(privacy=clipping).check_run("alpha", restricted, 300)
    noise = PrivacyRule(clip_norm=1.0, noise_multiplier=0.5)
    with pytest.raises(RefusedError, match=r"privacy=noise on what leaves.*the vocabulary, which has none"):
        SiloPolicy(privacy=noise).check_run("alpha", restricted, 300)
    SiloPolicy(privacy=noise).check_run("alpha", small_config("strategy=worldlm"), 300)


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        ("strategies", ["Photon", "photon.strategy.photon.Photon"], ["Centralized", "photon"]),
        ("models", ["tiny", "gpt2"], ["photon-125m", "llama"]),
        ("optimizers", ["AdamW", "torch.optim.AdamW"], ["SGD", "torch.optim.Adam"]),
    ],
)
def test_names_are_those_of_the_run(
    small_config: Make, rule: str, allowed: list[str], refused: list[str]
) -> None:
    config = small_config()
    for name in allowed:
        SiloPolicy(**{rule: ["other", name]}).check_names("alpha", config)
    for names in ([], *([name] for name in refused)):
        with pytest.raises(RefusedError, match=rf"refused by alpha's policy: {rule}=\["):
            SiloPolicy(**{rule: names}).check_names("alpha", config)


def test_a_model_that_iterates_has_a_type_of_its_own(small_config: Make) -> None:
    parts = "{head_blocks: 1, body_blocks: 1, tail_blocks: 1}"
    config = small_config("model.architecture.n_layer=3", f"model.abbie={parts}")
    SiloPolicy(models=["abbie_gpt2"]).check_names("alpha", config)
    with pytest.raises(RefusedError, match=r"refused by alpha's policy: models=\[gpt2\]"):
        SiloPolicy(models=["gpt2"]).check_names("alpha", config)


def test_the_largest_model_is_judged_by_what_would_be_built(small_config: Make) -> None:
    config = small_config()
    size = sum(parameter.numel() for parameter in build_model(config.model, 300, seed=0).parameters())
    SiloPolicy(max_parameters=size).check_run("alpha", config, 300)
    with pytest.raises(RefusedError, match=rf"{size - 1:,}, .* a model of {size:,} parameters"):
        SiloPolicy(max_parameters=size - 1).check_run("alpha", config, 300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_local_step: 3", "max_local_step: unknown key; did you mean 'max_local_steps'?"),
        ("min_cohort: 0", "min_cohort=0: input should be greater than or equal to 1"),
        ("min_cohort: two", "min_cohort='two'"),
        ("share_validation: maybe", "share_validation='maybe'"),
        ("models: tiny", "models='tiny': input should be a valid list"),
        ("- models", "expected a mapping of rules"),
        ("", "expected a mapping of rules"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_policy_is_one_clear_line(tmp_path: Path, text: str | None, message: str) -> None:
    """A rule that nobody understood must not be a rule that nobody keeps."""
    path = tmp_path / "policy.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PhotonError) as error:
        read_policy(path)
    assert str(error.value).startswith(f"policy {path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_are_counted_on_the_silos_own_disk(tmp_path: Path) -> None:
    counts = SiloCounts(tmp_path, "alpha")
    assert counts.used() == {}
    counts.add("run", 5, 1)
    counts.add("other", 7, 1)
    counts.add("run", 6, 2)
    assert SiloCounts(tmp_path, "alpha").used() == {"run": Use(11, 3), "other": Use(7, 1)}
    (tmp_path / "alpha" / "counts.json").write_text('{"run": "many"}')
    with pytest.raises(PhotonError, match="the silo's count cannot be read"):
        counts.used()


def test_what_an_earlier_photon_has_counted_goes_on_to_count(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "tokens.json").write_text('{"run": 5, "old": 9}')
    counts = SiloCounts(tmp_path, "alpha")
    counts.add("run", 6, 1)
    (tmp_path / "alpha" / "tokens.json").write_text('{"run": 500}')
    assert counts.used() == {"run": Use(11, 1), "old": Use(9)}, "from then on there is one count"


# --- in a federation ----------------------------------------------------------------------------------


@pytest.fixture
def federate(
    small_config: Make, silo_folders: dict[str, Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Train alpha and beta on nodes of their own, beta with a policy."""

    def run(rules: dict[str, Any], *overrides: str, resume: bool = False) -> dict[str, Any]:
        policy = tmp_path / "policy.yaml"
        policy.write_text(json.dumps(rules))
        nodes: dict[int, dict[str, Any]] = {
            number: {"data-dir": str(data), "state-dir": str(tmp_path / "state" / silo)}
            for number, (silo, data) in enumerate(silo_folders.items(), start=1)
        }
        nodes[2]["policy"] = str(policy)
        config = prepare_run(small_config("cohort=2", "local_steps=2", *overrides))
        return run_federation(config, InProcessGrid(answer, nodes), resume=resume, live=False)

    return run


def test_a_round_goes_on_without_a_silo_that_refuses(federate: Any, tmp_path: Path) -> None:
    summary = federate({"max_local_steps": 1}, "rounds=2")
    assert summary["status"] == "finished"
    failures = events_of(tmp_path / "run", SiloFailed)
    reason = "refused by beta's policy: max_local_steps=1, and the request asks for 2 local steps"
    assert [(f.round, f.silo, f.kind, f.reason) for f in failures] == [
        (1, "beta", "refused", reason),
        (2, "beta", "refused", reason),
    ]
    assert {event.silo for event in events_of(tmp_path / "run", SiloFinished)} == {"alpha"}
    assert not (tmp_path / "state" / "beta" / "beta").exists(), "nothing was trained there"


def test_a_refusal_counts_against_the_quorum(federate: Any) -> None:
    with pytest.raises(RunError, match=r"quorum=2.*beta: refused by beta's policy: min_cohort=3"):
        federate({"min_cohort": 3}, "federation.quorum=2")


def test_tokens_of_a_run_are_limited_over_rounds_and_resumes(federate: Any, tmp_path: Path) -> None:
    """A round of two steps of four windows of 16 tokens is 128 tokens: three of them fit."""
    rules = {"max_run_tokens": 400}
    federate(rules, "rounds=2", "schedule=constant")
    assert events_of(tmp_path / "run", SiloFailed) == []
    federate(rules, "rounds=5", "schedule=constant", resume=True)
    failures = events_of(tmp_path / "run", SiloFailed)
    assert [(failure.round, failure.silo) for failure in failures] == [(4, "beta"), (5, "beta")]
    assert "max_run_tokens=400, and the request asks for 512 tokens" in failures[0].reason
    checkpoint, _ = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint.state.ledger["beta"].tokens == 3 * 128


def test_a_round_that_is_asked_for_again_is_not_counted_again(
    federate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies after the silos have trained; their replies still lie within the limit."""
    from photon.federation import federation

    writing = federation.CheckpointStore.writing

    def dying(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.round == 1:
            raise RuntimeError("the server dies")
        return writing(self, state, *rest, **more)

    rules = {"max_run_tokens": 128}
    with monkeypatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            federate(rules, "rounds=1")
    federate(rules, "rounds=1", resume=True)
    assert events_of(tmp_path / "run", SiloFailed) == []
    assert len(events_of(tmp_path / "run", SiloFinished)) >= 2


def test_a_silo_can_keep_its_validation_figures(
    federate: Any, tmp_path: Path, silo_folders: dict[str, Path]
) -> None:
    summary = federate({"share_validation": False}, "rounds=2", "telemetry.report=true")
    run_dir = tmp_path / "run"
    assert events_of(run_dir, SiloFailed) == []
    assert all(set(event.per_silo) == {"alpha"} for event in events_of(run_dir, Evaluated))
    about_beta = [n for n in events_of(run_dir, Notice) if "beta" in n.message]
    assert [(n.level, n.message) for n in about_beta] == [
        ("info", "beta does not evaluate the model: it keeps its validation figures")
    ]
    (started,) = events_of(run_dir, RunStarted)
    facts = {silo["name"]: silo for silo in started.silos}
    assert facts["beta"]["validation_tokens"] is facts["beta"]["unigram_loss"] is None
    assert summary["perplexity"]["per_silo"]["beta"] == dict.fromkeys(
        ("initial", "final", "unigram", "initial_loss", "final_loss")
    )
    alpha = PreparedData.open(silo_folders["alpha"]).manifest.silos["alpha"]
    assert facts["alpha"]["unigram_loss"] == alpha.unigram_loss
    # Nothing that lies on the server holds one of beta's figures.
    beta = PreparedData.open(silo_folders["beta"]).manifest.silos["beta"]
    for file in (run_dir / "events.jsonl", run_dir / "summary.json", run_dir / "report.html"):
        assert str(beta.unigram_loss) not in file.read_text()
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_a_federation_may_have_no_validation_figures_at_all(
    small_config: Make, silo_folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("share_validation: false")
    nodes = {
        1: {
            "data-dir": str(silo_folders["alpha"]),
            "state-dir": str(tmp_path / "state"),
            "policy": str(policy),
        }
    }
    config = prepare_run(small_config("cohort=1", "rounds=1", "telemetry.report=true"))
    summary = run_federation(config, InProcessGrid(answer, nodes), resume=False, live=False)
    assert summary["status"] == "finished"
    assert summary["perplexity"]["final"] is summary["perplexity"]["unigram"] is None
    assert events_of(tmp_path / "run", Evaluated) == []
    assert (tmp_path / "run" / "report.html").exists(), "a report without perplexities"


def test_a_silo_that_is_asked_to_evaluate_all_the_same_refuses(
    federate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description was given before the policy was made."""
    from photon.silo import service

    describe = service.describe

    def sharing(site: Any, config: Any) -> Any:
        return describe(dataclasses.replace(site, policy=SiloPolicy()), config)

    monkeypatch.setattr(service, "describe", sharing)
    federate({"share_validation": False}, "rounds=2")
    assert events_of(tmp_path / "run", SiloFailed) == []
    assert all(set(event.per_silo) == {"alpha"} for event in events_of(tmp_path / "run", Evaluated))
    told = [n.message for n in events_of(tmp_path / "run", Notice) if "beta" in n.message]
    assert len(told) == 1
    assert "refused by beta's policy: share_validation=false" in told[0]
