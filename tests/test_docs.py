"""The documents say what is so: links lead somewhere, commands exist, examples run."""

import csv
import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import typer.main
from flwr.common.config import parse_config_args

from photon import DISTRIBUTION
from photon.cli import main
from photon.commands.app import app
from photon.commands.orchestrate import RunsByDefault
from photon.commands.ranking import DEFAULT_METRIC
from photon.commands.search import read_search
from photon.config.compose import compose, load, split_overrides
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.files.hashing import hash_of
from photon.link.codecs import CODECS
from photon.link.encoding import Codec, Packed, pack, unpack
from photon.preflight import preflight
from photon.silo.policy import SiloPolicy, read_policy
from photon.silo.site import NodeSettings
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from tests.conftest import composed, write_corpus

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)
#: What stands for a folder or a name of the reader's own.
PLACEHOLDER = re.compile(r"…|\.\.\.")


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- configuration reference --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_module("configuration_reference", ROOT / "scripts" / "configuration_reference.py")


def test_configuration_reference_is_up_to_date(generator: ModuleType) -> None:
    text = generator.page()
    assert text == generator.PAGE.read_text(), "run: python scripts/configuration_reference.py"
    # What it must hold, read from the files by other means.
    for key in ("`training.batch_size`", "`link=bf16`", "`federation.quorum`", "| `weighting` | `tokens` |"):
        assert key in text
    for file in (ROOT / "conf").glob("*/*.yaml"):
        assert f"{file.parent.name}={file.stem}" in text


def test_check_refuses_a_page_that_is_out_of_date(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "page", lambda: "new")
    monkeypatch.setattr(generator, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["configuration_reference.py", "--check"])
    with pytest.raises(SystemExit, match="1"):
        generator.main()
    (tmp_path / "page.md").write_text("old")
    with pytest.raises(SystemExit, match="1"):
        generator.main()
    (tmp_path / "page.md").write_text("new")
    generator.main()


# --- what a silo's operator writes ---------------------------------------------------------------------


def table_keys(text: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE))))


def test_the_silo_page_names_every_setting_and_every_rule(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "silo.md").read_text()
    settings, policy = page.split("## Policy")[0], page.split("## Policy")[1].split("### ")[0]
    keys = {field.alias for field in NodeSettings.model_fields.values()}
    assert table_keys(settings) == keys - {"partition-id", "num-partitions", "island"}
    example = tmp_path / "policy.yaml"
    example.write_text(dict(worked_examples())["policy.yaml"])
    assert read_policy(example).model_fields_set == set(SiloPolicy.model_fields)
    assert table_keys(policy) == set(SiloPolicy.model_fields) - {"share_validation"}


# --- links --------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target:
                yield page, target


@pytest.mark.parametrize(("page", "target"), [pytest.param(*link, id=link[1]) for link in links()])
def test_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    assert file.exists()
    if anchor:
        assert anchor in anchors(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page: Path) -> None:
    examples = {name for name, _ in worked_examples()}
    for name in re.findall(r"`((?:photon|conf|scripts|tests|docs)/[\w./-]+)[:`]", page.read_text()):
        assert (ROOT / name).exists() or name in examples, f"{page.name} names {name}"


#: Words that promise that something comes out the same again.
SAME = re.compile(
    r"bit for bit|same bits|to the bit|(very|with the) same weights|byte for byte|repeatable|reproduc"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_who_says_that_something_is_the_same_names_the_test(page: Path) -> None:
    unproven = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\* |\| )", page.read_text()):
        text = " ".join(paragraph.split())
        if SAME.search(text) and not re.search(r"\btest_\w+\.py|deployment/docker\.sh", text):
            unproven.append(text)
    assert unproven == [], "name the test that shows it, or leave it out"


# --- architecture -------------------------------------------------------------------------------------


def test_functions_named_in_the_architecture_page_exist() -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "photon").rglob("*.py"))
    page = (ROOT / "docs" / "architecture.md").read_text()
    # `Class`, `Class.method`, `_function` and `some_function`; keys of the configuration have a group.
    names = re.findall(r"`([A-Z]\w+(?:\.\w+)?|_?[a-z]+(?:_[a-z]+)+|_[a-z]+)`", page)
    assert len(names) > 25
    events = re.findall(r"^class (\w+)\(Event\)", source, re.MULTILINE)
    events = [re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in events]
    known = {*RunConfig.model_fields, *events, "exp_avg"}
    flower = {"ArrayRecord"}
    modules = {file.stem for file in (ROOT / "photon").rglob("*.py")}
    for name in set(names) - known - flower - modules:
        last = name.rpartition(".")[2]
        assert re.search(rf"^\s*(?:def|class) {last}\b", source, re.MULTILINE), name


# --- commands -----------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """Yield every command shown in a block of shell, or in running text between backticks."""
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", prose):
            yield page.name, " ".join(span.split())


def words_of(line: str) -> list[str]:
    # What runs beside the shell is the same command.
    return shlex.split(line.removesuffix(" &"), comments=True)


def shown(pattern: str) -> list[tuple[str, str]]:
    """Return each command that matches once, with a page that shows it."""
    return sorted(
        (page, line)
        for line, page in {line: page for page, line in commands()}.items()
        if re.match(pattern, line)
    )


PHOTON = shown(r"photon [a-z-]")
SCRIPTS = shown(r"(python )?scripts/\w")
FLWR = shown(r"flwr run")


def test_the_documents_show_commands() -> None:
    # The tests below would pass on an empty list.
    assert len(PHOTON) > 20
    assert SCRIPTS
    assert FLWR


def overrides_compose(overrides: list[str]) -> None:
    """Compose overrides as the documents show them; a sweep's values one by one."""
    if any(PLACEHOLDER.search(override) for override in overrides):
        return
    if "hydra/sweeper=optuna" in overrides:
        read_search(overrides, DEFAULT_METRIC, maximize=False)
        return
    plain = [override for override in overrides if not override.startswith("hydra")]
    first = [re.sub(r"=([^,\[{]+),.*", r"=\1", override) for override in plain]
    # What the tests compose with is what users get: tests/config/test_config.py compares.
    assert isinstance(composed(*first), RunConfig)
    for place, override in enumerate(plain):
        key, _, values = override.partition("=")
        if "," in values and not values.startswith(("[", "{")):
            for value in values.split(","):
                composed(*first[:place], f"{key}={value}", *first[place + 1 :])


@pytest.mark.parametrize(("page", "line"), PHOTON)
def test_photon_commands_exist_and_take_their_options(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, words = COMMAND, words_of(line)[1:]
    context = click.Context(command)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None and isinstance(command, RunsByDefault):
            found, words = command.commands["run"], ["run", *words]
        assert found is not None, f"{page}: no command {words[0]!r}"
        command, words = found, words[1:]
    if command is COMMAND.commands["train"]:
        overrides = [word for word in words if "=" in word]
        if "--config" in words:
            assert all(override.partition("=")[0] in RunConfig.model_fields for override in overrides)
        else:
            overrides_compose(overrides)
        # Words that are no overrides would reach Hydra; typer lets them pass.
        options = [word for word in words if word.startswith("-")]
        assert set(options) <= {"-m", "--show", "--config", "--help", "--metric", "--maximize"}, (
            f"{page}: {line}"
        )
        words = [word for word in words if word not in overrides and word != "-m"]
    if isinstance(command, click.Group) or not words:
        return
    if any(PLACEHOLDER.search(word) for word in words):
        words = [word for word in words if word.startswith("--")]
        known = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in words} <= known
        return
    # Parsing alone: unknown options and missing arguments are errors. What a page names, its reader makes.
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    command.make_context(command.name, list(words), resilient_parsing=False)


@pytest.mark.parametrize(("page", "line"), SCRIPTS)
def test_scripts_exist_and_take_their_options(page: str, line: str) -> None:
    words = [word for word in words_of(line) if word != "python"]
    script = ROOT / words[0]
    assert script.exists(), f"{page}: {words[0]}"
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in script.read_text(), f"{page}: {line}"
    if script.name == "quickstart.sh":
        overrides_compose([word for word in words[1:] if "=" in word])


@pytest.mark.parametrize(("page", "line"), FLWR)
def test_flwr_run_takes_the_overrides_shown(page: str, line: str) -> None:
    words = words_of(line)
    if "--run-config" in words:
        settings = parse_config_args([words[words.index("--run-config") + 1]])
        assert set(settings) <= {"overrides", "resume"}, page
        overrides_compose(split_overrides(settings["overrides"]))


# --- worked examples ----------------------------------------------------------------------------------


def worked_examples() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        pattern = r"<!-- example: (\S+) -->\n```\w+\n(.*?)^```"
        yield from re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def with_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the files that the documents show where the documents say they go."""
    monkeypatch.setattr("photon.config.folders.conf_dir", lambda: tmp_path / "conf")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name, text in worked_examples():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        if file.suffix == ".py":
            module = ".".join(Path(name).with_suffix("").parts)
            monkeypatch.setitem(sys.modules, module, load_module(module, file))


@pytest.mark.usefixtures("with_examples")
def test_the_strategy_of_the_contributing_page_trains(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    summary = run_small("strategy=loss-weighted", "cohort=3", "rounds=1")
    assert summary["strategy"] == "LossWeighted"
    run_dir = tmp_path / "run"
    assert load(run_dir / "config.yaml").strategy.as_mapping()["power"] == 2.0
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    losses = {event["silo"]: event["loss"] for event in events if event["event"] == "silo_finished"}
    replies = {
        silo: load_groups(run_dir / "silos" / silo / "round-000001" / "reply.safetensors")["params"]
        for silo in losses
    }
    total = sum(loss**-2 for loss in losses.values())
    checkpoint, _ = CheckpointStore(run_dir / "checkpoints").latest()
    for name, trained in checkpoint.load_params().items():
        expected = sum(losses[silo] ** -2 / total * replies[silo][name].double() for silo in losses)
        torch.testing.assert_close(trained.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    # The silo's half: nine tenths of the way that it goes without.
    run_small("strategy=loss-weighted", "strategy.share=1.0", "cohort=3", "rounds=1", name="whole")
    first = CheckpointStore(tmp_path / "whole" / "checkpoints").load(0).load_params()
    whole = load_groups(tmp_path / "whole" / "silos" / "alpha" / "round-000001" / "reply.safetensors")
    for name, tensor in whole["params"].items():
        part = first[name] + 0.9 * (tensor - first[name])
        torch.testing.assert_close(replies["alpha"][name], part, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.usefixtures("with_examples")
def test_the_setting_of_the_tutorial_is_one_and_zero_of_it_is_the_plain_mean(
    run_small: Callable[..., dict[str, Any]],
) -> None:
    own = ["strategy._target_=powered.LossWeighted", "cohort=3", "rounds=2"]
    plain = run_small("strategy.weighting=uniform", "cohort=3", "rounds=2", name="plain")
    zero = run_small(*own, "+strategy.power=0", name="zero")
    assert zero["weights_sha256"] == plain["weights_sha256"]
    assert run_small(*own, name="two")["weights_sha256"] != plain["weights_sha256"]
    # What it hands on is a setting of the base, and what nobody takes is none.
    assert run_small(*own, "+strategy.power=0", "strategy.local_state=reset", name="others")
    with pytest.raises(PhotonError, match=r"strategy\.powr: unknown key; did you mean 'power'"):
        run_small(*own, "+strategy.powr=0", name="typo")
    with pytest.raises(PhotonError, match=r"write \+strategy\.power=… if strategy\._target_ takes it"):
        run_small(*own, "strategy.power=0", name="plus")


@pytest.mark.usefixtures("with_examples")
def test_the_method_of_the_tutorial_trains(run_small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_small("strategy._target_=mine.LossWeighted", "cohort=3", "rounds=1")
    run_dir = tmp_path / "run"
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    losses = {event["silo"]: event["loss"] for event in events if event["event"] == "silo_finished"}
    total = sum(loss**-2 for loss in losses.values())
    replies = {
        silo: load_groups(run_dir / "silos" / silo / "round-000001" / "reply.safetensors")["params"]
        for silo in losses
    }
    checkpoint, _ = CheckpointStore(run_dir / "checkpoints").latest()
    for name, trained in checkpoint.load_params().items():
        expected = sum(losses[silo] ** -2 / total * replies[silo][name].double() for silo in losses)
        torch.testing.assert_close(trained.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.usefixtures("with_examples")
def test_the_objective_of_the_contributing_page_trains(run_small: Callable[..., dict[str, Any]]) -> None:
    plain = run_small("cohort=2", "rounds=2", name="plain")
    smoothed = run_small("objective=smoothed", "cohort=2", "rounds=2", name="smoothed")
    unsmoothed = run_small("objective=smoothed", "objective.share=0", "cohort=2", "rounds=2", name="none")
    assert unsmoothed["perplexity"]["final"] == pytest.approx(plain["perplexity"]["final"], rel=1e-6)
    assert smoothed["perplexity"]["final"] != pytest.approx(plain["perplexity"]["final"], rel=1e-5)
    assert smoothed["perplexity"]["final"] < smoothed["perplexity"]["initial"]


@pytest.mark.usefixtures("with_examples")
def test_the_codec_of_the_contributing_page_trains(
    run_small: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ternary: type[Codec] = sys.modules["photon.link.ternary"].Ternary
    monkeypatch.setitem(CODECS, "ternary", ternary)
    dense = run_small("cohort=3", "rounds=2", name="dense")
    summary = run_small("link=ternary", "cohort=3", "rounds=2", name="ternary")
    assert summary["perplexity"]["final"] < summary["perplexity"]["initial"]
    assert summary["bytes"]["per_group"]["params"]["up"] < dense["bytes"]["per_group"]["params"]["up"] / 4

    packed, _ = pack(torch.tensor([[3.0, -4.0, 1.0], [0.0, -2.0, 0.5]]), [ternary()])
    decoded = unpack(packed, "values")
    assert torch.equal(decoded, torch.tensor([[3.0, -3.0, 0.0], [0.0, -3.0, 0.0]]))
    assert packed.encoding is not None
    for wrong, message in (([0] * 9 + [2], "none of -1, 0 and 1"), ([0] * 9, "9 bytes")):
        data = torch.tensor(wrong, dtype=torch.uint8)
        encoding = packed.encoding.model_copy(update={"blake3": hash_of(data.numpy().data)})
        with pytest.raises(PhotonError, match=message):
            unpack(Packed(data, encoding), "values")


@pytest.mark.usefixtures("with_examples")
def test_the_listener_of_the_contributing_page_hears_a_run(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    # Groups are chosen before single keys, wherever they stand.
    summary = run_small("telemetry=table", "telemetry.listeners.2.name=mine.csv", "cohort=2", "rounds=2")
    with (tmp_path / "run" / "mine.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round_finished"]
    assert rows == [[str(event[key]) for key in ("round", "tokens", "train_loss")] for event in rounds]
    assert int(rows[-1][1]) == summary["tokens"]
    with pytest.raises(PhotonError, match=r"listeners\.2\.nam: unknown key; did you mean 'name'"):
        preflight(compose(["telemetry=table", "+telemetry.listeners.2.nam=x"]))


@pytest.mark.usefixtures("with_examples")
def test_the_optimizer_of_the_contributing_page_trains(run_small: Callable[..., dict[str, Any]]) -> None:
    summary = run_small("optimizer=radam", "cohort=2", "rounds=2")
    assert summary["perplexity"]["final"] < summary["perplexity"]["initial"]


# --- questions ----------------------------------------------------------------------------------------


def messages() -> list[tuple[str, str]]:
    """Return the commands of the FAQ with what it says that they answer."""
    page = (ROOT / "docs" / "faq.md").read_text()
    return re.findall(r"^```console\n\$ (photon .*)\n(.*)\n```$", page, re.MULTILINE)


def test_the_faq_has_the_messages_that_a_newcomer_meets() -> None:
    assert len(messages()) >= 20


@pytest.fixture(scope="module")
def newcomers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the FAQ find: text, prepared data, and a run."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("texts", "empty", "alike", "runs/first/checkpoints/round-000001"):
        (folder / name).mkdir(parents=True)
    (folder / "texts" / "one.txt").write_text("a text")
    for number in range(20):
        (folder / "alike" / f"{number}.txt").write_text(f"{'the same words in each file ' * 8}{number}")
    words = {"books": "abcdefgh", "code": "ijklmnop", "news": "qrstuvwxyz"}
    (folder / "data").mkdir()
    write_corpus(folder / "made", words).rename(folder / "data" / "three")
    return folder


@pytest.mark.parametrize(("command", "message"), messages())
def test_a_message_of_the_faq_is_what_the_command_says(
    command: str,
    message: str,
    newcomers_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(newcomers_folder)
    monkeypatch.setenv("FLWR_HOME", str(newcomers_folder / "flower"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capfd.readouterr().err.replace(str(newcomers_folder), "…").strip() == message


def test_what_to_install_is_said_by_the_name_of_this_distribution() -> None:
    """Package indexes have another project under the name of the import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    told = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("conf/**/*.yaml")]
    told += [*ROOT.glob("photon/**/*.py"), *ROOT.glob("scripts/*.sh"), ROOT / "docker" / "Dockerfile"]
    for file in told:
        for name in re.findall(
            r"pip install [^\n]*?([a-zA-Z-]+)\[(?:s3|wandb|sweep|tensorboard|mlflow|prometheus|dev)\]",
            file.read_text(),
        ):
            assert name == DISTRIBUTION, file
