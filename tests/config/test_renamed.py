"""Old names: an error with the present one, where someone writes them; read, where a run has left them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from photon.cli import main
from photon.config import renamed as module
from photon.config.compose import compose, load, parse, with_overrides
from photon.config.explain import group_options
from photon.config.renamed import check_names, renamed, translated
from photon.errors import PhotonError
from photon.preflight import preflight
from photon.state.checkpoint import EARLIER, CheckpointStore, ServerState
from photon.subfederation.gateway import read_gateway
from photon.telemetry.events import EVENT_TYPES, Notice, event_name, from_json

ROOT = Path(__file__).parents[2]
#: Pages of results say what was run, in the words of then.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Names that nobody has had.
SAMPLE = {
    "keys": {
        "federation.enough": "federation.quorum",
        "link.lanes": "link.states",
        "strategy.scales": "strategy.weighting",
        "meter": "schedule",
    },
    "values": {"link=eight": "link=int8", "strategy.weighting=equal": "strategy.weighting=uniform"},
    "events": {"remark": "notice"},
    "fields": {"words": "message", "steps_so_far": "global_step"},
    "figures": {"lane_width": "noise"},
    "groups": {"lane-*": "shared/lane-*", "attic": "local/attic"},
    "kept": {"params": "local/params"},
    "options": {"--lag": "--latency"},
    "words": {},
}


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "renamed.yaml").write_text(yaml.safe_dump(SAMPLE))
    monkeypatch.setattr(module, "FILE", tmp_path / "renamed.yaml")
    renamed.cache_clear()
    parse.cache_clear()
    yield
    renamed.cache_clear()
    parse.cache_clear()


@pytest.mark.usefixtures("sample")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federation.enough=2", "federation.enough: it is called federation.quorum now"),
        ("+federation.enough=2", "federation.enough: it is called federation.quorum now"),
        ("~federation.enough", "federation.enough: it is called federation.quorum now"),
        ("meter=constant", "meter: it is called schedule now"),
        ("meter.steps=5", "meter.steps: it is called schedule.steps now"),
        ("link=eight", "link=eight: it is called link=int8 now"),
        ("strategy.weighting=equal", "strategy.weighting=equal: it is called strategy.weighting=uniform now"),
        ("+strategy.scales=1", "strategy.scales: it is called strategy.weighting now"),
        ("link.states=${link.lanes}", "link.lanes: it is called link.states now"),
        (
            "federation.tree={north: {children: [a, b], link: eight}}",
            "federation.tree.north: link=eight: it is called link=int8 now",
        ),
        (
            "federation.tree={north: {children: [a, b], strategy: {scales: 1}}}",
            "federation.tree.north: strategy.scales: it is called strategy.weighting now",
        ),
    ],
)
def test_an_old_name_in_an_override_is_told_the_present_one(override: str, message: str) -> None:
    with pytest.raises(PhotonError) as caught:
        preflight(compose([override]))
    assert str(caught.value) == message


@pytest.mark.usefixtures("sample")
def test_an_old_name_in_a_text_from_elsewhere_or_a_gateways_file_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(compose([]).text)
    values["federation"]["enough"] = values["federation"].pop("quorum")
    with pytest.raises(PhotonError, match=r"^federation\.enough: it is called federation\.quorum now$"):
        parse(yaml.safe_dump(values))
    (tmp_path / "north.yaml").write_text("name: north\nlink: {lanes: []}\n")
    with pytest.raises(PhotonError, match=r"link\.lanes: it is called link\.states now$"):
        read_gateway(tmp_path / "north.yaml")


@pytest.mark.usefixtures("sample")
def test_an_old_option_of_a_command_is_told_the_present_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["photon", "walltime", "compare", "--lag", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "photon: --lag: it is called --latency now\n"


@pytest.mark.usefixtures("sample")
def test_the_configuration_of_an_old_run_is_read(tmp_path: Path) -> None:
    tree = "federation.tree={north: {children: [a, b], link: {states: []}}, south: [c]}"
    config = compose([tree, "strategy.weighting=uniform"])
    values = yaml.safe_load(config.text)
    values["federation"]["enough"] = values["federation"].pop("quorum")
    values["meter"] = values.pop("schedule")
    values["strategy"]["weighting"] = "equal"
    inner = values["federation"]["tree"]["north"]["link"]
    inner["lanes"] = inner.pop("states")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load(tmp_path / "config.yaml") == config
    with pytest.raises(PhotonError, match=r"^federation\.enough: it is called"):
        with_overrides(tmp_path / "config.yaml", ["federation.enough=1"])


@pytest.mark.usefixtures("sample")
def test_a_silo_may_have_any_name() -> None:
    tree = {"meter": None, "link": ["meter"], "strategy": {"children": ["eight"], "strategy": {"scales": 1}}}
    made = translated({"federation": {"tree": tree}})["federation"]["tree"]
    assert made == tree | {"strategy": {"children": ["eight"], "strategy": {"weighting": 1}}}
    check_names({"federation": {"tree": {"meter": None}}})


@pytest.mark.usefixtures("sample")
def test_events_of_old_names_are_read() -> None:
    line = json.dumps({"event": "remark", "time": 1.0, "level": "info", "words": "so"})
    assert from_json(line) == Notice(time=1.0, level="info", message="so")
    line = json.dumps({"event": "diagnostics", "time": 1.0, "round": 1, "values": {"lane_width/a": 2.0}})
    assert json.loads(from_json(line).to_json())["values"] == {"noise/a": 2.0}


@pytest.mark.usefixtures("sample")
def test_checkpoints_of_the_old_form_are_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    state = ServerState(
        run_id="run", round=1, global_step=4, tokens=9, vocab_size=8, sequence_length=2, tokenizer_sha256=""
    )
    groups = {"lane-1": {"w": torch.ones(2)}, "attic": {"w": torch.zeros(2)}}
    with store.writing(state, {"w": torch.ones(2)}, {}, {}, kept=groups):
        pass
    assert set(store.load(1).load_kept()) == {"lane-1", "attic"}, "a checkpoint of today is taken at its word"
    file = tmp_path / "round-000001" / "checkpoint.json"
    content = json.loads(file.read_text())
    content["steps_so_far"] = content.pop("global_step")
    file.write_text(json.dumps(content | {"format": EARLIER}))
    old = store.load(1)
    assert old.state.global_step == 4
    assert set(old.load_kept()) == {"shared/lane-1", "local/attic"}
    file.write_text(json.dumps(content | {"format": "photon-checkpoint/9"}))
    with pytest.raises(
        PhotonError, match=r"format photon-checkpoint/9, this photon reads photon-checkpoint/2$"
    ):
        store.load(1)


# --- the table itself ---------------------------------------------------------------------------------------


def rows(part: str) -> list[tuple[str, str]]:
    return list(getattr(renamed(), part).items())


def composed_keys() -> set[str]:
    """Return every dotted key that some preset has."""
    found: set[str] = set()

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            found.add(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    for preset in ("photon", "worldlm"):
        walk(yaml.safe_load(compose([f"strategy={preset}"]).text), "")
    return found


def test_what_the_table_names_is_there_and_nothing_else() -> None:
    keys = composed_keys()
    for old, new in rows("keys"):
        assert new in keys
        assert old not in keys
    for old, new in rows("values"):
        key, _, value = new.partition("=")
        assert "." in key or value in group_options(key)
        assert old.partition("=")[2] not in group_options(key)
    names = {event_name(kind) for kind in EVENT_TYPES}
    assert {new for _, new in rows("events")} <= names
    assert not {old for old, _ in rows("events")} & names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_present_names(page: Path) -> None:
    text = page.read_text()
    for part in ("keys", "values", "events"):
        for old, new in rows(part):
            # A word alone may be English.
            after = r"(?![\w=-])" if re.search(r"\W|_", old) else r"(?=[=`]|\.\w)"
            found = re.search(rf"(?<![\w./]){re.escape(old)}{after}", text)
            assert found is None, f"{old} is called {new} now"
    for old, new in rows("words"):
        found = re.search(old, text)
        assert found is None, f"{found[0]!r}: {new}" if found else ""
