"""What only the configured code knows to be wrong is refused at every entrance, before anything starts."""

import ast
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from flwr.app import Context, RecordDict
from omegaconf import OmegaConf

from photon import node, preflight, server_app, worker
from photon.cli import main
from photon.commands.jobs import JOB, Job, Plan
from photon.commands.train import train_one
from photon.config.compose import compose, parse
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.separate import separate_silo
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run
from photon.link.frames import Frame
from photon.link.messages import BODY, Describe, EvaluateRequest, TrainRequest, pack
from photon.subfederation import gateway
from tests.conftest import SMALL, composed, small_run

ROOT = Path(__file__).parent.parent
#: With an engine that would start processes.
RUN = [o for o in SMALL if not o.startswith("federation=")] + ["federation=simulation", "cohort=2"]
TREE = {"children": ["alpha", "gamma"]}

#: Keys and values that fit the schema, and what is said of them.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too few values": ({"optimizer.betas": [0.9]}, "optimizer.betas=[0.9]: too few values"),
    "no codec": (
        {"link.states": [{"_target_": "photon.link.pipelines.check_names", "link": "id"}]},
        "link.states._target_=photon.link.pipelines.check_names is not a codec; see "
        "docs/contributing.md for what fits",
    ),
    "no listener": (
        {"telemetry.listeners": [{"_target_": "photon.telemetry.log.read_events", "path": "id"}]},
        "telemetry.listeners.0._target_=photon.telemetry.log.read_events is not a listener, whose first "
        "argument is a ListenerRun; see docs/contributing.md for what fits",
    ),
    "unknown argument": (
        {"strategy.weightin": "uniform"},
        "strategy.weightin: unknown key; did you mean 'weighting'?",
    ),
    "refused value": (
        {"optimizer.lr": -1.0},
        "optimizer: torch.optim.AdamW refused its settings (Invalid learning rate: -1.0)",
    ),
    "steps that do not fit": (
        {"schedule.warmup_steps": 100000},
        "schedule.warmup_steps=100000: a warm-up of 100000 local steps does not fit into the 12 of the run "
        "(rounds × local_steps); set schedule.warmup_steps=12 or less, or train more rounds",
    ),
    "combination": (
        {"privacy.clip_norm": 1.0, "strategy.local_state": "sync"},
        "strategy.local_state=sync: states of the local optimizer would leave without noise; with "
        "privacy.clip_norm set strategy.local_state=keep or reset",
    ),
    "node of the tree": (
        {"federation.tree": {"north": TREE | {"outer": "dilco"}, "south": ["beta"]}},
        "federation.tree: north: outer=dilco: no such option; did you mean 'diloco'? "
        "(there are: diloco, fedadam, fedavg, fedmom, muloco)",
    ),
    "rule of a node": (
        {"federation.tree": {"north": TREE | {"strategy": {"weightin": "uniform"}}, "south": ["beta"]}},
        "federation.tree: north: strategy.weightin: unknown key; did you mean 'weighting'?",
    ),
}

#: What a node of a tree sets beside what holds for the run, and cannot.
OF_NODES = [
    (
        "worldlm",
        {"key_fraction": 1.0},
        "strategy.key_fraction=1.0: the federation above has 0.3; set it alike at every node",
    ),
    ("worldlm", {"embeddings": "restricted"}, "strategy.embeddings=restricted: the federation above has"),
    ("sparsyfed", {"beta": 2.0}, "strategy: what comes from above is the weights of beta=1.25 and"),
    ("hierfavg", {"_target_": "photon.strategy.photon.Photon"}, "strategy._target_: it is the run's"),
]


@dataclass(frozen=True)
class Bad:
    """A configuration with a wrong value, in the ways in which it may come.

    Attributes
    ----------
    words
        What is to be said.
    overrides
        For ``conf/``.
    text
        Resolved.
    file
        The config.yaml of a finished run, edited by hand.
    """

    words: str
    overrides: list[str]
    text: str
    file: Path

    @property
    def config(self) -> RunConfig:
        return parse(self.text)


@pytest.fixture(scope="module")
def good(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the text of a configuration in which nothing is wrong."""
    run_dir = tmp_path_factory.mktemp("nowhere") / "run"
    return compose([*RUN, f"data.path={corpus}", f"run_dir={run_dir}"]).text


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = prepare_run(small_run("cohort=2", data=corpus, run_dir=folder))
    run_inprocess(config, node.answer, resume=False)
    return folder


@pytest.fixture(params=BAD)
def bad(
    request: pytest.FixtureRequest, good: str, corpus: Path, finished: Path, folder: Path, place: None
) -> Bad:
    keys, words = BAD[request.param]
    edited = folder / "edited"
    edited.mkdir()
    (edited / "checkpoints").symlink_to(finished / "checkpoints")
    (edited / "config.yaml").write_text(spoilt((finished / "config.yaml").read_text(), keys))
    overrides = [*RUN, f"data.path={corpus}", *(f"++{key}={flow(value)}" for key, value in keys.items())]
    return Bad(words, overrides, spoilt(good, keys), edited / "config.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return where a test puts what it needs; nothing may come to be beside it."""
    (tmp_path / "given").mkdir()
    return tmp_path / "given"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no process start and nothing train; relative folders lie in the test's own."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.setattr("photon.federation.federation.Federation.__init__", started)
    monkeypatch.setattr("photon.training.loop.LocalTrainer.__init__", started)
    monkeypatch.setattr("photon.link.transport.SiloLink.receive", started)
    monkeypatch.setattr("photon.engine.start.start", started)
    monkeypatch.setattr("photon.deployment.doctor.examine", started)


def spoilt(text: str, keys: dict[str, Any]) -> str:
    """Edit the text of a configuration."""
    values = yaml.safe_load(text)
    for key, value in keys.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return yaml.safe_dump(values, sort_keys=False)


def flow(value: Any) -> str:
    """Write a value as Hydra reads it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(flow, value)) + "]" if isinstance(value, list) else str(value)


def left_in(folder: Path) -> dict[str, int]:
    """Return the files below a folder, and when they were last written."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def nothing_came_of_it(tmp_path: Path) -> bool:
    return [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what calls ``photon``, which refuses its input, and returns what it says."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["photon", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        return capsys.readouterr().err

    return call


# --- the entrances ----------------------------------------------------------------------------------------

DOCTOR = ("doctor", "--superlink", "localhost:1", "--insecure")
#: Arguments, and whether they name the file that was edited.
COMMANDS: dict[str, Callable[[Bad], tuple[list[Any], bool]]] = {
    "train": lambda bad: (["train", *bad.overrides, "run_dir=run"], False),
    "train --config": lambda bad: (["train", "--config", bad.file, "run_dir=run"], True),
    "resume": lambda bad: (["resume", bad.file.parent], True),
    "sweep": lambda bad: (["train", "-m", *bad.overrides, "seed=0,1"], False),
    "doctor": lambda bad: ([*DOCTOR, *bad.overrides], False),
    "doctor --config": lambda bad: ([*DOCTOR, "--config", bad.file], True),
    "federation show": lambda bad: (["federation", "show", *bad.overrides], False),
}


@pytest.mark.parametrize("entrance", COMMANDS)
def test_a_command_refuses_it(entrance: str, bad: Bad, tmp_path: Path, said: Callable[..., str]) -> None:
    before = left_in(tmp_path)
    arguments, names_file = COMMANDS[entrance](bad)
    where = f"{bad.file}: " if names_file else ""
    assert said(*arguments) == f"photon: {where}{bad.words}\n"
    assert left_in(tmp_path) == before
    assert nothing_came_of_it(tmp_path)


@pytest.mark.parametrize("key", ["config", "overrides"])
def test_flwr_run_refuses_it(key: str, bad: Bad, tmp_path: Path) -> None:
    given = {"config": bad.text, "overrides": shlex.join([*bad.overrides, "run_dir=run"])}
    run_config = {"config": "", "overrides": "", "resume": False, key: given[key]}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    with pytest.raises(PhotonError) as refused:
        server_app.main(SimpleNamespace(), context)  # type: ignore[arg-type]
    assert str(refused.value) == bad.words
    assert nothing_came_of_it(tmp_path)


def test_each_run_of_a_sweep_refuses_it(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong only together is in no value of its own; the other runs of the sweep go on."""
    chosen = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(tmp_path / "run")),
        sweep=SimpleNamespace(dir=str(tmp_path / "sweep")),
        overrides=SimpleNamespace(task=["seed=0"]),
    )
    Plan(["seed=0,1"], ["seed"], "perplexity.final", False, "").write(tmp_path / "sweep")
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: chosen)
    (tmp_path / "run").mkdir()  # as Hydra does
    train_one(OmegaConf.create(bad.text))
    assert capsys.readouterr().err == f"photon: {tmp_path / 'run'}: {bad.words}\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [JOB]
    assert Job.read(tmp_path / "run") == Job(tmp_path / "run", ["seed=0"], bad.words)
    shutil.rmtree(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "run")
    assert nothing_came_of_it(tmp_path)


def data_dir(folder: Path, corpus: Path) -> dict[str, Any]:
    """Lay out the data of a deployed silo; return its node config."""
    separate_silo(PreparedData.open(corpus), "alpha", folder / "data")
    return {"data-dir": str(folder / "data"), "state-dir": str(folder.parent / "state")}


def north(folder: Path, rules: str = "") -> dict[str, Any]:
    """Write the file of a gateway; return its node config."""
    (folder / "north.yaml").write_text(f"name: north\n{rules}\n")
    return {"federation": str(folder / "north.yaml"), "state-dir": str(folder.parent / "state")}


def by_worker(message_type: Any, content: RecordDict, node_config: dict[str, Any]) -> RecordDict:
    """Answer as a silo's worker does."""
    fields = {"message_type": message_type, "node_config": node_config}
    reply, sound = worker._answer(Frame(fields, content), Path("unused"))
    assert sound
    if "error" in reply.fields:
        raise PhotonError(reply.fields["error"])
    return reply.records


NODES: dict[str, Callable[[Path, Path], tuple[Any, dict[str, Any]]]] = {
    "alpha, a silo": lambda folder, corpus: (node.answer, data_dir(folder, corpus)),
    "alpha, a silo's worker": lambda folder, corpus: (by_worker, data_dir(folder, corpus)),
    # Where the run's configuration has a tree, `north` is a federation of it.
    "north, simulated": lambda folder, corpus: (node.answer, {"partition-id": 0, "num-partitions": 1}),
    "north, a gateway": lambda folder, corpus: (node.answer, north(folder)),
    "alpha, of islands": lambda folder, corpus: (node.answer, {**data_dir(folder, corpus), "islands": 2}),
}


def messages(silo: str, config: RunConfig) -> dict[Any, RecordDict]:
    """Return a message of each type to a node of this name."""
    train = TrainRequest(
        run_id="r",
        model_id="m",
        round=1,
        silo=silo,
        members=[silo],
        global_step=0,
        steps=4,
        batch_size=4,
        last_round=0,
        position=0,
        cohort=2,
    )
    bodies = {"query": Describe(), "train": train, "evaluate": EvaluateRequest(round=1, silo=silo)}
    return {message_type: RecordDict({BODY: pack(body, config)}) for message_type, body in bodies.items()}


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no gateway call flwr."""

    class Untouched:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name}: flwr was called")

    monkeypatch.setattr(gateway, "deployed_connection", lambda *_: Untouched())


@pytest.mark.usefixtures("superlink")
@pytest.mark.parametrize("entrance", NODES)
def test_a_node_refuses_it(entrance: str, bad: Bad, folder: Path, corpus: Path, tmp_path: Path) -> None:
    answer, node_config = NODES[entrance](folder, corpus)
    name = entrance.partition(",")[0]
    if name == "north" and "gateway" not in entrance and bad.config.federation.tree is None:
        name = "alpha"
    for message_type, content in messages(name, bad.config).items():
        with pytest.raises(PhotonError) as refused:
            answer(message_type, content, node_config)
        assert str(refused.value) == bad.words, message_type
    assert nothing_came_of_it(tmp_path)


@pytest.mark.usefixtures("superlink", "place")
@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("outer: {lr: 0.5}", "outer: has no _target_; write the whole section, or the name of a file"),
        ("outer: dilco", "outer=dilco: no such option; did you mean 'diloco'? "),
        ("strategy: {key_fracton: 0.5}", "strategy.key_fracton: unknown key; Photon takes fold, "),
        ("strategy: {weightin: uniform}", "strategy.weightin: unknown key; did you mean 'weighting'?"),
        ("outer: {_target_: torch.optim.SGD, momentun: 0.9}", "outer.momentun: unknown key; did you mean "),
        ("link: {states: [{_target_: os.system}]}", "link.states._target_=os.system is not a codec; "),
        ("link: {inline_limit_mb: -1}", "inline_limit_mb=-1: input should be greater than 0"),
        ("privacy: {noise_multiplier: 1.0}", "privacy.noise_multiplier=1 is in units of privacy.clip_norm"),
        ("privacy: {seed: 1}", "privacy.clip_norm: not set; nothing else bounds an update"),
        ("privacy: {clip_nrm: 1.0}", "clip_nrm: unknown key; did you mean 'clip_norm'?"),
        ("cohort: 1\nquorum: 2", "federation.quorum=2 is larger than cohort=1; a round could never count"),
    ],
)
def test_a_gateway_refuses_rules_of_its_own(
    rules: str, words: str, good: str, folder: Path, tmp_path: Path
) -> None:
    node_config = north(folder, rules)
    for message_type, content in messages("north", parse(good)).items():
        with pytest.raises(PhotonError) as refused:
            node.answer(message_type, content, node_config)
        assert str(refused.value).startswith(words), message_type
        assert "\n" not in str(refused.value)
    assert nothing_came_of_it(tmp_path)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"island-rounds": 3},
            "island-rounds=3 does not divide local_steps=4; set another in the node config",
        ),
        (
            {"processes": 2},
            "islands=2: an island trains in one process, and training.processes=2; set processes=1 in the "
            "node config",
        ),
    ],
)
def test_a_silo_refuses_islands_that_cannot_be(
    own: dict[str, Any], words: str, good: str, folder: Path, corpus: Path, tmp_path: Path
) -> None:
    node_config = {**data_dir(folder, corpus), "islands": 2, **own}
    for message_type, content in messages("alpha", parse(good)).items():
        with pytest.raises(PhotonError) as refused:
            node.answer(message_type, content, node_config)
        assert str(refused.value) == words, message_type
    assert nothing_came_of_it(tmp_path)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("swept", ["schedule.warmup_steps=2,100000", "schedule.warmup_steps=100000,2"])
def test_a_value_of_a_sweep_is_refused_before_the_first_run(
    swept: str, corpus: Path, tmp_path: Path, folder: Path, said: Callable[..., str]
) -> None:
    words = BAD["steps that do not fit"][1]
    assert said("train", "-m", *RUN, f"data.path={corpus}", swept) == f"photon: {words}\n"
    assert nothing_came_of_it(tmp_path)


@pytest.mark.usefixtures("place")
def test_an_override_of_an_earlier_configuration_is_refused(
    finished: Path, tmp_path: Path, folder: Path, said: Callable[..., str]
) -> None:
    before = left_in(finished)
    words = BAD["steps that do not fit"][1]
    arguments = ("train", "--config", finished / "config.yaml", "run_dir=run", "schedule.warmup_steps=100000")
    assert said(*arguments) == f"photon: {words}\n"
    assert nothing_came_of_it(tmp_path)
    assert left_in(finished) == before


def test_these_are_all_entrances() -> None:
    callers = set()
    for file in (ROOT / "photon").rglob("*.py"):
        for statement in ast.walk(ast.parse(file.read_text())):
            if isinstance(statement, ast.ImportFrom) and statement.module == "photon.preflight":
                callers.add(str(file.relative_to(ROOT / "photon")))
    assert callers == {
        "api/run.py",
        "api/train.py",
        "commands/silo.py",
        "commands/train.py",
        "commands/tune.py",
        "commands/jobs.py",
        "commands/search.py",
        "commands/deployment.py",
        "commands/federation.py",
        "server_app.py",
        "node.py",
    }


# --- once for a text --------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that are looked at from now on."""
    texts: list[str] = []
    original = preflight._try_components

    def counting(config: RunConfig) -> None:
        texts.append(config.text)
        original(config)

    monkeypatch.setattr(preflight, "_try_components", counting)
    return texts


def test_a_text_that_has_passed_is_not_checked_again(
    small_config: Callable[..., RunConfig], checked: list[str]
) -> None:
    config = small_config("cohort=2")
    describe = messages("alpha", config)["query"]
    for _ in range(3):
        node.answer("query", describe, {"partition-id": 0, "num-partitions": 1})
    assert preflight.preflight(config) is config
    assert checked == [config.text]


def test_a_text_that_was_refused_is_refused_again(checked: list[str], good: str) -> None:
    keys, words = BAD["combination"]
    for _ in range(2):
        with pytest.raises(PhotonError, match=words.partition(":")[0]):
            preflight.preflight(parse(spoilt(good, keys)))
    assert len(checked) == 2


def test_a_gateways_rules_are_checked_once(folder: Path, good: str, checked: list[str]) -> None:
    config = parse(spoilt(good, {"seed": 4711}))
    settings = gateway.read_gateway(Path(north(folder, "outer: diloco")["federation"]))
    for _ in range(2):
        preflight.preflight_gateway(config, settings.node)
    assert len(checked) == 1


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.filter=[spam]"], "data.filter and data.mixture choose windows in one process"),
        (["data.mixture={law: 2}"], "data.filter and data.mixture choose windows in one process"),
        (
            ["objective=anchor", "objective.classes=[a,b]", "strategy=anchor", "federation.server_silo=ours"],
            "the objective chooses its windows in one process",
        ),
        (["strategy=sparsyfed"], "a sparse strategy trains in one process"),
    ],
)
def test_a_group_that_cannot_be_is_refused_before_anything_starts(overrides: list[str], reason: str) -> None:
    alone = compose(["data=prepared", "data.path=/nowhere", *overrides, "training.micro_batch_size=null"])
    preflight.preflight(alone)
    training = alone.training.model_copy(update={"processes": 2})
    with pytest.raises(PhotonError) as refused:
        preflight.preflight(alone.model_copy(update={"training": training}))
    assert str(refused.value) == f"training.processes: {reason}; set it to 1"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model.recipe.warmup_steps=100000"],
            "; schedule.warmup_steps is taken from model.recipe.warmup_steps",
        ),
        (["schedule.warmup_steps=100000"], "or train more rounds"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_the_key_that_was_set(overrides: list[str], told: str) -> None:
    with pytest.raises(PhotonError) as caught:
        preflight.preflight(compose(overrides))
    assert "schedule.warmup_steps=100000: a warm-up of 100000 local steps" in str(caught.value)
    assert str(caught.value).endswith(told)


ANCHOR = ["objective=anchor", "objective.classes=[a,b]", "federation.server_silo=alpha"]
LUNAR = ["objective=lunar", "objective.asked_by='A. B.'", "cohort=null"]


@pytest.mark.parametrize(
    ("overrides", "told", "mend"),
    [
        (
            ["strategy=desloc", "privacy.clip_norm=1"],
            "set strategy.local_state=keep or reset, and strategy.sync=null",
            ["strategy.local_state=keep", "strategy.sync=null"],
        ),
        (
            ["strategy=muloco-averaged", "privacy.clip_norm=1"],
            "set strategy.local_state=keep or reset",
            ["strategy.local_state=reset"],
        ),
        (["strategy=desloc", "strategy.local_state=keep"], "set strategy.sync=null", ["strategy.sync=null"]),
        (["strategy=sums"], "use strategy=photon", ["strategy=photon"]),
        (["strategy=sums", *ANCHOR], "use strategy=anchor", ["strategy=anchor"]),
        (["strategy=anchor", *LUNAR], "use strategy=sums", ["strategy=sums"]),
        (["strategy=anchor"], "use strategy=photon", ["strategy=photon"]),
        (["strategy=photon", *LUNAR], "use strategy=sums", ["strategy=sums"]),
        (["strategy=fedprox", *ANCHOR], "use strategy=anchor", ["strategy=anchor"]),
        (["strategy=flash", "link=int8"], "use link=sparse or link=dense", ["link=sparse"]),
        (["strategy=topk", "link=int8"], "use link=sparse or link=dense", ["link=dense"]),
        (
            ["strategy=fedprox", "link.uplink_payload=update", "privacy.secure_aggregation=true"],
            "strategy.weighting=uniform",
            ["strategy.weighting=uniform"],
        ),
        (["strategy=worldlm", "optimizer=lordo"], "use strategy=photon", ["strategy=photon"]),
        *(
            (
                [f"strategy={strategy}", "link.uplink_payload=update", "link.downlink_payload=update"],
                "the strategy sends parameters in parts; set link.downlink_payload=parameters",
                ["link.downlink_payload=parameters"],
            )
            for strategy in ("streaming-diloco", "fedper")
        ),
    ],
)
def test_who_does_what_a_hint_says_is_through(overrides: list[str], told: str, mend: list[str]) -> None:
    """The hint fits the strategy, so that it does not lead to the next refusal."""
    with pytest.raises(PhotonError) as refused:
        composed(*SMALL, "data.path=elsewhere", *overrides)
    assert told in str(refused.value)
    keys = [override.partition("=")[0] for override in mend]
    kept = [override for override in overrides if override.partition("=")[0] not in keys]
    composed(*SMALL, "data.path=elsewhere", *kept, *mend)


@pytest.mark.parametrize(("strategy", "own", "told"), OF_NODES)
def test_a_node_takes_the_model_for_what_the_others_do(strategy: str, own: dict[str, Any], told: str) -> None:
    config = composed(*SMALL, "data.path=elsewhere", f"strategy={strategy}", "cohort=null")
    tree = {"north": {"children": ["alpha"], "strategy": own}, "south": ["beta"]}
    federation = config.federation.model_copy(update={"tree": tree})
    with pytest.raises(PhotonError) as refused:
        preflight.preflight(config.model_copy(update={"federation": federation}))
    assert str(refused.value).startswith(f"federation.tree: north: {told}")
