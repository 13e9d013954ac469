"""Configuration: bad input is one clear line, the three ways of giving it mean the same run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from photon.config.compose import compose, load, parse, settings_from, split_overrides, with_overrides
from photon.config.folders import conf_dir
from photon.errors import PhotonError
from photon.preflight import preflight
from photon.silo.policy import read_policy
from photon.subfederation.gateway import read_gateway
from tests.conftest import SMALL, composed


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "overrides",
    [
        [
            "strategy=desloc",
            "~strategy.sync.exp_avg",
            "outer=diloco",
            "rounds=7",
            "optimizer.betas=[0.8,0.9]",
        ],
        ["strategy=photon", "strategy.weighting=uniform", "strategy=local-adam", "local_steps=9"],
        ["privacy=gaussian", "privacy.seed=3", "link=int8", "link.states=${link.uplink}", "cohort=null"],
        ["+transition.step=8", "+transition.zero=[exp_avg]", "rounds=5"],
        ["strategy=worldlm", "federation.tree={north: [alpha, beta]}", "cohort=null"],
        [
            "strategy=fedprox",
            "strategy.local_state=sync",
            "strategy.sync={exp_avg: 8, exp_avg_sq: never}",
            "run_dir=here",
        ],
    ],
)
def test_the_tests_own_short_cut_composes_what_users_get(overrides: list[str]) -> None:
    chosen = [*SMALL, "data.path=elsewhere", *overrides]
    assert composed(*chosen) == preflight(compose(chosen))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rouds=3", r"^rouds: unknown key; did you mean 'rounds'\?$"),
        ("training.batch_sise=3", "did you mean 'training.batch_size'"),
        ("+training.batch_sise=3", "did you mean 'training.batch_size'"),
        ("strategy=dilico", "no such option; did you mean 'diloco'"),
        ("strategi=photon", "did you mean 'strategy'"),
        ("optimizer.learning_rate=3", "did you mean 'optimizer.lr'|optimizer.learning_rate: unknown key"),
        ("+optimizer.lrr=3", "optimizer.lrr: unknown key; did you mean 'lr'"),
        ("strategy.weighting=alphabetical", "should be 'tokens' or 'uniform'"),
        ("strategy.local_state=synced", "should be 'keep', 'reset' or 'sync'"),
        ("rounds=abc", "rounds='abc': input should be a valid integer"),
        ("rounds=true", "rounds=True: input should be a valid integer"),
        ("rounds=0", "greater than or equal to 1"),
        ("rounds=1.5", "valid integer"),
        ("optimizer.lr=-1", "refused its settings"),
        ("optimizer.lr=high", "optimizer.lr='high'"),
        ("optimizer.lr=nan", "not a finite number"),
        ("optimizer._target_=os.system", "optimizer._target_=os.system is not a torch.optim.Optimizer"),
        ("+link.uplink=[{_target_: os.system, command: id}]", "is not a codec"),
        ("link.states=[{_target_: os.system, command: id}]", "link.states._target_=os.system is not a codec"),
        ("link.uplink=[{_target_: photon.link.codecs.Int, bits: 3}]", "bits=3: expected 4 or 8"),
        ("link.states=[{_target_: photon.link.codecs.Cast, dtype: f12}]", "expected bfloat16 or float16"),
        ("strategy._target_=subprocess.Popen", "is not a photon Strategy"),
        ("schedule._target_=subprocess.Popen", "is not a schedule"),
        ("optimizer._target_=torch.optim.AdamWW", "cannot import 'torch.optim.AdamWW'"),
        ("outer.momentun=0.9", "did you mean 'outer.momentum'"),
        (
            "strategy.sparsity=0.9",
            r"not a key of this strategy; those that have it: flash, sparsyfed, topk, zerofl$",
        ),
        ("training.micro_batch_size=3", "does not divide training.batch_size=4"),
        ("training.processes=3", "does not divide training.batch_size=4"),
        ("training.precision=fp8", "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("schedule.warmup_steps=100000", r"set schedule\.warmup_steps=\d+ or less, or"),
        pytest.param(f"federation.tree={'[' * 3000}{']' * 3000}", "cannot be read", id="deep"),
        pytest.param(f"seed={'9' * 5000}", "cannot be read", id="digits"),
        ("run_dir=\udcff", "cannot be read"),
        ("data=prepared", "data.path is not set"),
        ("federation.quorum=9", "larger than cohort=3"),
        ("rounds", "'rounds': cannot be read; overrides look like KEY=VALUE"),
        ("rounds=[1,2", "cannot be read; overrides look like KEY=VALUE"),
        ("rounds=1,2", "several values make a sweep; add -m"),
        ("=3", "no such option"),
        ("strategy=null", r"strategy=null: no such option \(there are: anchor, centralized"),
        ("model=3", r"model=3: no such option \(there are: abbie-200m"),
        ("hydra/launcher=foo", "hydra/launcher=foo: no such option$"),
        ("outer.foo=1", r"did you mean 'outer\.\w+'"),
        (
            "strategy=mine.Own",
            r"^strategy=mine\.Own: .*; a class of your own is strategy\._target_=mine\.Own ",
        ),
        ("transition.step=64", "key of this transition; those that have it: lordo, mtdao, synchronous$"),
        ("data.hub.corpus=c4", "not a key of this data; those that have it: c4, fineweb-edu, mc4, the-pile$"),
        ("training.micro_batch_size=foo", "^training.micro_batch_size='foo': [a-z ]+ integer or 'auto'$"),
        ("optimizer._target_=torch.optim.SGD", "optimizer.betas: unknown key; SGD takes .*momentum"),
        ("optimizer.betas=[0.9]", "too few values"),
        ("privacy.range=1e30", "less than or equal to 1000000"),
        ("seed=99999999999999999999", "seed=99999999999999999999: input should be less than"),
        ("training.threads=100000", "less than or equal to 1024"),
        ("--rounds=3", "no such option"),
        ("cohort=[1,2]", "cohort"),
    ],
)
def test_bad_overrides_end_in_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(PhotonError, match=message) as caught:
        preflight(compose([override]))
    assert "\n" not in str(caught.value)


_OBJECTIVE_OF = {
    "sums": ["objective._target_=tests.objective.toy.Sums"],
    "anchor": ["objective=anchor", "objective.classes=[a,b]", "federation.server_silo=aggregator"],
}


# The page of all options, which tests/test_docs.py makes, composes each of them, too.
@pytest.mark.few(2)
@pytest.mark.parametrize(
    "group", ["outer", "schedule", "federation", "telemetry", "model", "strategy", "link"]
)
def test_every_option_of_every_group_composes(group: str) -> None:
    options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    assert options
    for option in options:
        # Recipes with long warm-ups need a run to match; two strategies are for objectives of their own.
        own = _OBJECTIVE_OF.get(option, []) if group == "strategy" else []
        preflight(compose([f"{group}={option}", "rounds=100", *own]))


def test_a_wrong_number_that_a_period_is_made_of_is_told_where_it_was_given() -> None:
    with pytest.raises(PhotonError, match=r"^local_steps=1000\.0: input should be a valid integer"):
        compose(["strategy=desloc", "local_steps=1e3"])


def test_a_strategy_may_bring_its_outer_optimizer_and_still_be_overridden() -> None:
    assert compose(["strategy=diloco"]).outer.as_mapping()["nesterov"] is True
    assert compose(["strategy=diloco", "outer=fedadam"]).outer.target == "torch.optim.Adam"
    assert compose([]).outer.as_mapping() == {"_target_": "torch.optim.SGD", "lr": 1.0, "momentum": 0.0}


def test_a_model_brings_its_recipe() -> None:
    config = compose(["model=photon-125m"])
    assert config.training.batch_size == 32
    assert config.optimizer.as_mapping()["lr"] == 6e-4
    assert config.schedule.as_mapping()["tuned_batch_size"] == 256


def test_the_three_ways_mean_the_same_run(tmp_path: Path) -> None:
    overrides = ["strategy=diloco", "rounds=7", "optimizer.betas=[0.9,0.99]", "run_dir='/x y/run'"]
    direct = compose(overrides)
    text = " ".join(f'"{override}"' for override in overrides)
    through_flower, resume = settings_from({"overrides": text, "config": "", "resume": False})
    resolved, _ = settings_from({"overrides": "", "config": direct.text, "resume": False})
    (tmp_path / "config.yaml").write_text(direct.text)
    assert direct == through_flower == resolved == with_overrides(tmp_path / "config.yaml", [])
    assert resume is False
    assert with_overrides(tmp_path / "config.yaml", ["seed=5"]).seed == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [("sead=5", "did you mean 'seed'"), ("seed", "KEY=VALUE"), ("strategy=photon", "single keys")],
)
def test_changes_to_a_stored_configuration_are_checked(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(compose([]).text)
    with pytest.raises(PhotonError, match=message):
        with_overrides(tmp_path / "config.yaml", [override])


@pytest.mark.parametrize(
    "value", ["1e-3", "1.e5", "0x1F", "yes", "null", "2026-11-23", "${seed}", "a: 'é 一'"]
)
def test_a_string_comes_back_from_the_text_as_it_was(value: str) -> None:
    """Nothing in a text from elsewhere is a number that was none, and nothing is filled in."""
    assert parse(compose([]).model_copy(update={"run_dir": value}).text).run_dir == value


def test_numbers_in_a_text_may_be_written_as_in_an_override() -> None:
    text = compose(["optimizer.lr=0.25"]).text
    assert parse(text.replace("lr: 0.25", "lr: 25e-2")).optimizer.as_mapping()["lr"] == 0.25


def test_malformed_texts_are_refused() -> None:
    for text in ("", "rounds: [", "- 1", "rounds: 3", compose([]).text + "extra: 1\n"):
        with pytest.raises(PhotonError):
            parse(text)
    with pytest.raises(PhotonError, match="quotes"):
        split_overrides("run_dir='x")
    with pytest.raises(PhotonError, match="both set"):
        settings_from({"overrides": "rounds=1", "config": "rounds: 1"})


def test_a_stored_configuration_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(bytes(range(200, 256)))
    with pytest.raises(PhotonError, match=r"not a valid configuration \(byte 0xc8 at offset 0 is no"):
        with_overrides(tmp_path / "config.yaml", [])


UNREADABLE_FILES = {
    "deep list": (b"a: " + b"[" * 3000 + b"]" * 3000, "more than 64 deep"),
    "deep mapping": (b"".join(b" " * level + b"a:\n" for level in range(1500)), "more than 64 deep"),
    "bytes": (b"seed: \xff\xfe", "byte 0xff at offset 6 is no UTF-8"),
    "NUL": (b"seed: \x00", "control characters are not allowed"),
    "digits": (b"seed: " + b"9" * 5000, "4300"),
    "open": (b"a: [1,\nb: 2", "while parsing a flow sequence in line 1"),
}


@pytest.mark.parametrize("kind", UNREADABLE_FILES)
@pytest.mark.parametrize("what", ["run", "tree", "policy", "federation"])
def test_a_file_of_ones_own_that_cannot_be_read_is_one_line(tmp_path: Path, kind: str, what: str) -> None:
    data, reason = UNREADABLE_FILES[kind]
    (tmp_path / "own.yaml").write_bytes(data)
    read: dict[str, Callable[[Path], object]] = {
        "run": lambda path: with_overrides(path, []),
        "tree": lambda path: compose([f"federation.tree={path}"]),
        "policy": read_policy,
        "federation": read_gateway,
    }
    with pytest.raises(PhotonError, match=reason) as caught:
        read[what](tmp_path / "own.yaml")
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "9" * 5000, "\udcff"])
def test_a_changed_key_of_an_earlier_run_that_cannot_be_read_is_one_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "config.yaml").write_text(compose([]).text)
    with pytest.raises(PhotonError) as caught:
        with_overrides(tmp_path / "config.yaml", [f"seed={value}"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_changed_copy_has_a_text_of_its_own() -> None:
    config = compose([])
    assert config.text
    assert parse(config.model_copy(update={"rounds": 77}).text).rounds == 77


def test_simulated_silos_have_a_store_in_the_run_folder(tmp_path: Path) -> None:
    run = [f"run_dir={tmp_path}", "federation=simulation"]
    assert compose(run).link_in_use.store.url == str(tmp_path / "store")
    assert compose([*run, "link.store.url=/elsewhere"]).link_in_use.store.url == "/elsewhere"
    assert compose([f"run_dir={tmp_path}", "federation=deployment"]).link_in_use.store.url is None


def test_what_is_missing_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match=r"^model: missing; every key has a default in conf/"):
        compose(["~model"])
    file = tmp_path / "config.yaml"
    file.write_text("".join(compose().text.splitlines(keepends=True)[:40]))
    with pytest.raises(PhotonError, match=r" and \d+ more: missing; ") as refused:
        load(file)
    assert len(str(refused.value)) < 300
