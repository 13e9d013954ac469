"""What operators are asked, and what they are told of how their federation stands."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from click import Abort
from typer.testing import CliRunner

from photon.commands.app import app
from photon.deployment import aggregator, joining, standing
from photon.deployment.aggregator import AggregatorPlace
from photon.engine.deployment import Connection
from photon.errors import RunError
from photon.federation.names import ADMITTED
from tests.deployment.sides import make_aggregator, make_silo

#: Commands set what their programs are to have.
pytestmark = pytest.mark.usefixtures("environment_stays")


class Terminal(io.StringIO):
    """What an operator types."""

    def isatty(self) -> bool:
        return True


def test_who_sits_at_a_terminal_is_asked_for_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silo, made = make_silo(tmp_path / "s"), make_aggregator(tmp_path / "a")
    admits = ["aggregator", "admit", str(made.folder), silo.line().line()]
    joins = ["silo", "join", str(silo.folder), made.line().line(), "--no-start"]

    def types(words: list[str], answer: str) -> str:
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        with contextlib.suppress(RunError, Abort):
            app(words, standalone_mode=False)
        return capsys.readouterr().out

    for words, fingerprint, kept in (
        (admits, silo.line().fingerprint, made.photon_home / ADMITTED),
        (joins, made.line().fingerprint, silo.folder / joining.JOINED),
    ):
        for answer in ("n\n", ""):
            asked = types(words, answer)
            assert fingerprint in asked, "it is shown before it is asked for"
            assert "Is that the fingerprint" in asked
            assert not kept.exists()
        types(words, "y\n")
        assert kept.exists()
        assert "Is that the fingerprint" not in types(words, ""), "once"


def test_an_aggregator_tells_how_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_aggregator(tmp_path / "a")
    silos = {name: make_silo(tmp_path / name, name) for name in ("away", "late", "long" * 10)}
    arguments = ["aggregator", "status", str(made.folder)]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, "not running" in done.output, "No silo" in done.output) == (1, True, True)
    for silo in silos.values():
        aggregator.admit(made, silo.line())
    done = CliRunner().invoke(app, arguments)
    assert done.output.count(standing.WAITING) == 3
    long = silos["long" * 10].line()
    assert f"{long.name}  {long.fingerprint}" in done.output, "a narrow terminal cuts nothing"

    def flwr(_: Connection, *words: str, check: bool = True) -> str:
        if words[0] == "list":
            return json.dumps({"runs": [{"run-id": "8", "status": "running", "elapsed": 61.2}]})
        nodes = [
            {"node-id": "1", "status": "online", "online-at": "2026-01-01 10:00:00Z"},
            {"node-id": "2", "status": "offline", "offline-at": "2026-01-02 10:00:00Z"},
        ]
        return json.dumps({"nodes": nodes})

    monkeypatch.setattr(Connection, "flwr", flwr)
    monkeypatch.setattr(AggregatorPlace, "is_up", lambda _: True)
    made.node_file("long" * 10).write_text("1\n")
    made.node_file("away").write_text("2\n")
    made.public_key("late").unlink()
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [(silo["standing"], silo["since"]) for silo in found["silos"]] == [
        ("offline", "2026-01-02 10:00:00"),
        (standing.UNKNOWN, ""),
        ("online", "2026-01-01 10:00:00"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, "Run 8  running, 0:01:01" in done.output) == (1, True)
    for name in ("away", "late"):
        aggregator.remove(made, name)
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, "Kept out" in done.output) == (0, True), "every silo that was admitted is online"
