"""The server answers this machine alone, and serves runs alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.errors import PhotonError
from photon.files.owner import owned
from photon.telemetry.events import RoundFinished, RunStarted, SiloFailed, SiloFinished
from photon.ui.server import is_loopback_name, listen
from tests.report.test_report import Page
from tests.telemetry.synthetic import synthetic_events
from tests.ui.conftest import Serve, begin_run, tell


def news(address: str, version: str, name: str = "live") -> Any:
    return httpx.get(f"{address}/run/news", params={"id": name, "version": version}).json()


def data_of(text: str) -> Any:
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_runs_are_listed_and_compared(runs: Path, serve: Serve) -> None:
    address = serve(runs)
    listed = Page(httpx.get(address).text)
    rows = {row[1]: row[2:] for row in listed.table("Runs")}
    assert rows.keys() == {"first", "second"}
    assert rows["first"][:3] == ["finished", "10 of 10", "–"]
    summary = json.loads((runs / "first" / "summary.json").read_text())
    assert rows["first"][3] == f"{summary['perplexity']['final']:,.1f}"
    answer = httpx.get(f"{address}/compare", params={"id": ["first", "second"]})
    page = Page(answer.text)
    assert [row[0] for row in page.table("Results")] == ["first", "second"]
    assert len(data_of(answer.text)["charts"]["training-loss"]["series"]) == 2


def test_a_comparison_follows_its_runs(runs: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.ui.live._SPARING", 0.0)
    events = list(synthetic_events())
    ends = [place for place, event in enumerate(events) if isinstance(event, RoundFinished)]
    begin_run(runs / "live", events, ends[2] + 1)
    address = serve(runs)
    first = data_of(httpx.get(f"{address}/compare", params={"id": ["first", "live"]}).text)
    assert first["news"] == "/compare/news?id=first&id=live&"

    def ask(version: str) -> Any:
        return httpx.get(f"{address}{first['news']}version={version}").json()

    nothing = ask(first["version"])
    assert (nothing["version"], nothing["html"], nothing["charts"]) == (first["version"], {}, None)
    tell(runs / "live", events[ends[2] + 1 : ends[6] + 1])
    told = ask(first["version"])
    assert told["version"] != first["version"]
    longer = [len(series["x"]) for series in told["charts"][1]["training-loss"]["series"]]
    before = [len(series["x"]) for series in first["charts"]["training-loss"]["series"]]
    assert [new - old for new, old in zip(longer, before, strict=True)] == [0, 4]
    assert "Results" in told["html"]["comparison"]
    # A run that is gone is no page, and the next one is there again.
    shutil.move(runs / "live", runs.parent / "away")
    assert httpx.get(f"{address}{first['news']}version=x").status_code == 404
    shutil.move(runs.parent / "away", runs / "live")
    assert ask("x")["version"] == told["version"]


def test_the_page_of_a_run_is_that_of_the_report(runs: Path, serve: Serve) -> None:
    address = serve(runs)
    text = httpx.get(f"{address}/run", params={"id": "first"}).text
    page = Page(text)
    report = Page(httpx.get(f"{address}/report.html", params={"id": "first"}).text)
    assert data_of(text)["charts"] == report.charts
    assert page.pairs["Validation perplexity, all silos"] == report.pairs["Validation perplexity, all silos"]
    silos = {row[0]: row[1:] for row in page.table("Silos")}
    assert silos.keys() == {"cpp", "legal", "prose", "python"}
    assert {row[2] for row in silos.values()} == {"0", "1"}
    told = httpx.get(f"{address}/figures", params={"id": "first", "panel": "training-loss"}).text
    assert Page(f"<h2>x</h2>{told}").table("x") == report.table("Training loss")
    assert "round 10 done" in page.words


def test_what_is_new_travels_alone(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.ui.live._SPARING", 0.0)
    events = list(synthetic_events())
    ends = [place for place, event in enumerate(events) if isinstance(event, RoundFinished)]
    run = tmp_path / "live"
    begin_run(run, events, ends[4] + 1)
    address = serve(run)
    first = data_of(httpx.get(f"{address}/run", params={"id": "live"}).text)
    nothing = news(address, first["version"])
    assert (nothing["version"], nothing["html"], nothing["charts"]) == (first["version"], {}, None)
    tell(run, events[ends[4] + 1 : ends[5] + 1])
    told = news(address, first["version"])
    loss = told["charts"][1]["training-loss"][1]["series"][1]
    closed = events[ends[5]]
    assert isinstance(closed, RoundFinished)
    cohort = str(len(first["charts"]["training-loss"]["series"]) - 1)
    assert loss[cohort] == ["{", {"x": ["+", [6]], "y": ["+", [pytest.approx(closed.train_loss, rel=1e-5)]]}]
    assert "sections" not in told["html"], "the charts stay where they are"
    assert len(json.dumps(told["charts"])) < len(json.dumps(first["charts"])) / 2
    # Who has seen nothing, or what another server told, is told everything.
    for version in ("", "gone-7"):
        assert news(address, version)["charts"][0] == "="


def test_a_run_that_begins_anew_is_shown_anew(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("photon.ui.live._SPARING", 0.0)
    events = list(synthetic_events())
    run = tmp_path / "live"
    begin_run(run, events, len(events))
    address = serve(run)
    first = data_of(httpx.get(f"{address}/run", params={"id": "live"}).text)
    os.truncate(run / "events.jsonl", 0)
    tell(run, [replace(events[0], name="again"), *events[1:12]])  # type: ignore[call-arg]
    told = news(address, first["version"])
    assert "again" in told["html"]["head"]
    shutil.rmtree(run)
    told = news(address, told["version"])
    assert "the folder is gone" in told["html"]["head"]
    assert told["html"]["sections"] == ""
    begin_run(run, events, 12)
    assert "quickstart" in news(address, told["version"])["html"]["head"], "it is back"


def test_how_a_run_stands(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.ui.live._SPARING", 0.0)
    events = list(synthetic_events())
    ends = [place for place, event in enumerate(events) if isinstance(event, RoundFinished)]
    run = tmp_path / "live"
    begin_run(run, events, ends[3] + 3)
    address = serve(run)
    told = news(address, "")
    assert "no process at work here, 4 of 10 rounds" in told["html"]["head"]
    assert "go on with photon resume" in told["html"]["attention"]
    with owned(run):
        told = news(address, "")
        assert "training, 4 of 10 rounds" in told["html"]["head"]
        assert "left" in told["html"]["head"]
        rows = Page(httpx.get(address).text).table("Runs")
        assert rows[0][2] == "running"
        assert rows[0][4] != ""


def test_silos_that_need_attention_come_first(tmp_path: Path, serve: Serve) -> None:
    events = list(synthetic_events())
    replies = [event for event in events if isinstance(event, SiloFinished)]
    told = []
    for event in events:
        if isinstance(event, SiloFinished) and event.silo == "python":
            told.append(
                SiloFailed(time=event.time, round=event.round, silo="python", kind="error", reason="boom")
            )
        elif isinstance(event, SiloFinished) and event.silo == "prose":
            told.append(replace(event, tokens_per_second=1.0))
        else:
            told.append(event)
    begin_run(tmp_path / "live", told, len(told))
    text = news(serve(tmp_path), "")["html"]
    page = Page(f"<h2>x</h2>{text['silos']}")
    first = page.table("Silos")[0]
    assert first[0] == "python"
    assert first[1].startswith("failed in round")
    number = sum(reply.silo == "python" for reply in replies)
    assert f"python failed in {number} of {number} rounds" in text["attention"]
    assert "prose trains" in text["attention"]


def test_nothing_but_runs_is_served(runs: Path, serve: Serve) -> None:
    (runs / "secret.txt").write_text("secret")
    address = serve(runs)
    for path in (
        "/../secret.txt",
        "/secret.txt",
        "/%2e%2e/secret.txt",
        "/run?id=../first",
        f"/run?id={runs}/first",
        "/run?id=",
        "/run?id=first%00",
        "/compare?id=first&id=../../etc",
        "/report.html?id=/etc",
        "/figures?id=first&panel=../head",
        "//etc/passwd",
    ):
        told = httpx.get(address + path)
        assert told.status_code == 404, path
        assert "secret" not in told.text
    assert httpx.post(address).status_code == 501


def test_other_names_are_refused(runs: Path, serve: Serve) -> None:
    address = serve(runs)
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "",
        "192.168.1.2:8765",
    ):
        told = httpx.get(address, headers={"Host": host})
        assert told.status_code == 403, host
        assert "first" not in told.text
        assert not is_loopback_name(host)
    for host in ("localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:80"):
        assert httpx.get(address, headers={"Host": host}).status_code == 200
    policy = httpx.get(address).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy


def test_it_listens_on_loopback_alone(runs: Path) -> None:
    with listen([runs], 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(PhotonError, match=rf"--port {server.server_port}: already in use"):
            listen([runs], server.server_port)
    with pytest.raises(PhotonError, match="nowhere: no such folder"):
        listen([runs / "nowhere"], 0)


def test_what_silos_wrote_is_text(tmp_path: Path, serve: Serve) -> None:
    evil = '<img src=x onerror="alert(1)"><script>alert(1)</script>'
    run = tmp_path / "live"
    run.mkdir()
    (run / "config.yaml").write_text(f"note: '{evil}'\n")
    lines = []
    for event in synthetic_events():
        content = json.loads(event.to_json())
        text = json.dumps(content).replace('"cpp"', json.dumps(evil))
        lines.append(
            text.replace("is not finite", json.dumps(evil)[1:-1]).replace("quickstart", "</script><b>")
        )
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    address = serve(tmp_path)
    text = httpx.get(f"{address}/run", params={"id": "live"}).text
    page = Page(text)
    assert {"img", "b"}.isdisjoint(tag for tag, _, _ in page.attributes)
    assert text.count("<script") == 3
    assert "alert(1)</script>" not in text
    told = news(address, "")
    assert "<img" not in json.dumps(told["html"])
    assert "&lt;img" in json.dumps(told["html"])


def test_a_name_that_is_odd_can_be_opened(tmp_path: Path, serve: Serve) -> None:
    begin_run(tmp_path / 'a "b" & <c>#1', list(synthetic_events()), 12)
    address = serve(tmp_path)
    page = Page(httpx.get(address).text)
    (link,) = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert "quickstart" in httpx.get(address + link).text


def test_broken_runs_are_named_and_the_others_are_served(runs: Path, serve: Serve) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "events.jsonl").write_text("nonsense\n")
    (runs / "broken" / "config.yaml").write_text("rounds: 1\n")
    (runs / "empty").mkdir()
    (runs / "empty" / "events.jsonl").write_text("")
    address = serve(runs)
    rows = {row[1]: row[2] for row in Page(httpx.get(address).text).table("Runs")}
    assert rows == {
        "broken": "cannot be read",
        "empty": "cannot be read",
        "first": "finished",
        "second": "finished",
    }
    assert "no run_started" in httpx.get(f"{address}/run", params={"id": "broken"}).text
    told = httpx.get(f"{address}/compare", params={"id": ["broken", "first"]})
    assert told.status_code == 409
    assert "line 1: not an event" in told.text
    assert "config.yaml: cannot be read" in httpx.get(f"{address}/run", params={"id": "empty"}).text


@pytest.mark.parametrize("thing", ["port", "folder", "nothing"])
def test_bad_input_is_one_line(runs: Path, tmp_path: Path, thing: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = {
            "port": [str(runs), "--port", str(taken.getsockname()[1])],
            "folder": [str(tmp_path / "nowhere")],
            "nothing": [],
        }
        done = subprocess.run(
            [sys.executable, "-m", "photon.cli", "ui", *given[thing]],
            capture_output=True,
            text=True,
            cwd=tmp_path / "runs",
            env={**os.environ, "PHOTON_HOME": str(tmp_path / "home")},
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    expected = {"port": "already in use", "folder": "no such folder", "nothing": "no folder `runs`"}
    assert expected[thing] in done.stderr


def test_help_teaches() -> None:
    told = CliRunner().invoke(app, ["ui", "--help"]).output
    assert "ssh -L" in told
    assert "photon report" in told


def test_runs_of_one_name_are_told_apart(tmp_path: Path, serve: Serve) -> None:
    events = list(synthetic_events())
    for place in ("one", "other"):
        begin_run(tmp_path / place / "same", events, 12)
    rows = Page(httpx.get(serve(tmp_path)).text).table("Runs")
    assert {row[1] for row in rows} == {"one/same", "other/same"}
    assert isinstance(events[0], RunStarted)
