"""What ``photon aggregator`` and ``photon silo`` write: files, modes, twice, after a crash, on bad input."""

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.deployment import aggregator, joining, keys, place
from photon.deployment.aggregator import AggregatorPlace
from photon.deployment.joining import SiloPlace
from photon.deployment.lines import AggregatorLine, SiloLine
from photon.deployment.proxy import Proxy
from photon.engine.deployment import Connection
from photon.engine.processes import free_port
from photon.errors import PhotonError, RunError
from photon.federation.names import ADMITTED, Admitted
from photon.silo.policy import SiloPolicy, read_policy
from tests.conftest import SMALL_DEPLOYED, composed
from tests.deployment.harness import wait_until
from tests.deployment.sides import make_aggregator, make_silo

ROOT = Path(__file__).parents[2]

#: Commands set what their programs are to have.
pytestmark = pytest.mark.usefixtures("environment_stays")


def files(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return every file below a folder: content, mode, time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what is written ----------------------------------------------------------------------------------


def test_an_aggregators_folder(tmp_path: Path) -> None:
    made = make_aggregator(tmp_path / "a", proxy=True)
    secret = {name for name, (_, mode, _) in files(made.folder).items() if not mode & 0o077}
    assert {"keys/authority.key", "keys/server.key", "keys/superexec", "aggregator.json"} <= secret
    assert stat.S_IMODE(made.folder.stat().st_mode) == stat.S_IMODE(made.keys.stat().st_mode) == 0o700
    hosts = keys.certificate_hosts(keys.read_certificate(made.keys / "server.crt"))
    assert hosts == ["127.0.0.1", "localhost"]
    known = tomllib.loads((made.home / "config.toml").read_text())["superlink"]
    assert known["aggregator"] == {"address": "127.0.0.1:8001", "root-certificates": str(made.authority)}
    assert AggregatorLine.read(made.line().line()).address == "127.0.0.1:8000"
    assert "listen 8000 ssl" in (made.folder / "proxy" / "nginx.conf").read_text()


def test_a_silos_folder(tmp_path: Path) -> None:
    made = make_silo(tmp_path / "s")
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    keys.read_node_key(made.key)
    assert made.line().name == "hospital"
    assert made.node_config == (
        f'data-dir="{made.folder}/data" state-dir="{made.folder}/state" policy="{made.folder}/policy.yaml"'
    )


def test_the_environment_is_read_alike_by_a_shell(tmp_path: Path) -> None:
    made = make_aggregator(tmp_path / "a folder")
    script = 'set -a; . "$1"; set +a; printf "%s\\n" "$FLWR_HOME" "$PHOTON_HOME" "$FLWR_TELEMETRY_ENABLED"'
    done = subprocess.run(
        ["sh", "-c", script, "-", str(made.folder / "flower.env")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(made.home), str(made.folder / "photon"), "0"]


def test_a_policy_has_every_rule_and_changes_nothing(tmp_path: Path) -> None:
    file = make_silo(tmp_path / "s").folder / "policy.yaml"
    assert read_policy(file) == SiloPolicy()
    # Each rule that is a comment is there with its value.
    everything = tmp_path / "all.yaml"
    everything.write_text(re.sub(r"^#(?! )", "", file.read_text(), flags=re.MULTILINE))
    assert read_policy(everything) == SiloPolicy()
    assert read_policy(everything).model_fields_set == set(SiloPolicy.model_fields)


def test_a_unit_starts_the_same_command(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "a silo")
    text = (silo.folder / "systemd" / "photon-silo.service").read_text()
    photon = Path(sys.executable).parent / "photon"
    assert f'ExecStart={photon} silo join "{silo.folder}"\n' in text
    assert "RestartPreventExitStatus=2" in text
    assert f"EnvironmentFile={silo.folder}/flower.env" in text


def test_the_proxy_of_the_containers_is_the_same() -> None:
    secrets = Path("/run/secrets")
    written = Proxy(
        listen="8443",
        superlink="superlink:8000",
        name="superlink",
        certificate=secrets / "server-certificate",
        key=secrets / "server-key",
        authority=secrets / "authority-certificate",
        scratch=Path("/tmp"),
        resolver="127.0.0.11",
    )
    assert (ROOT / "docker" / "nginx.conf").read_text() == written.configuration()


@pytest.mark.parametrize(
    ("hosts", "proxy", "listens"),
    [
        (["127.0.0.1"], None, (False, False)),
        (["localhost", "::1"], None, (False, False)),
        (["aggregator.example.org"], None, (True, False)),
        (["127.0.0.1", "10.0.0.1"], None, (True, False)),
        (["10.0.0.1"], False, (False, True)),
    ],
)
def test_others_reach_a_proxy_unless_the_operator_says_otherwise(
    tmp_path: Path, hosts: list[str], proxy: bool | None, listens: tuple[bool, bool]
) -> None:
    made, _ = aggregator.init(tmp_path / "a", hosts, None, proxy)
    assert (made.settings.proxy, made.settings.open_to_all) == listens
    superlink = next(iter(made.programs())).command
    assert superlink[superlink.index("--host") + 1] == ("0.0.0.0" if listens[1] else "127.0.0.1")
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in superlink
    assert [program.name for program in made.programs()][2:] == ["proxy"] * listens[0]


# --- twice, and after a crash ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_aggregator, make_silo])
def test_a_second_init_changes_nothing_and_says_so(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    before = files(tmp_path)
    words = ["silo" if make is make_silo else "aggregator", "init", str(tmp_path / "x")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert "nothing was changed" in done.output
    assert files(tmp_path) == before


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("make", [make_aggregator, make_silo])
def test_init_goes_on_after_a_crash_at_any_file(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole")
    whole = set(files(tmp_path / "whole"))
    real = place.write_bytes

    def dying(at: int) -> Callable[..., None]:
        writes = iter(range(1, 100))

        def write(path: Path, data: bytes, *, mode: int = 0o666) -> None:
            if next(writes) == at:
                raise Killed
            real(path, data, mode=mode)

        return write

    for crash in range(1, 12):
        folder, crashed = tmp_path / f"crash-{crash}", False
        with monkeypatch.context() as patch:
            patched = dying(crash)
            for module in (place, keys, aggregator):
                patch.setattr(module, "write_bytes", patched)
            try:
                make(folder)
            except Killed:
                crashed = True
        kept = {name: found for name, found in files(folder).items() if not name.startswith(".")}
        make(folder)
        after = files(folder)
        assert set(after) == whole, "complete, and nothing of the crash is left"
        assert {name: after[name] for name in kept} == kept, "what was written whole is kept"
        if not crashed:
            return
    raise AssertionError("more writes than expected")


def test_init_keeps_what_an_operator_has_changed(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "s")
    policy = silo.folder / "policy.yaml"
    policy.write_text("max_local_steps: 3\n")
    (silo.folder / "flower.env").unlink()
    _, said = joining.init(silo.folder, None, None, None)
    assert "wrote flower.env; kept" in said
    assert policy.read_text() == "max_local_steps: 3\n"


def test_init_does_not_change_what_the_other_side_may_have_been_told(tmp_path: Path) -> None:
    make_aggregator(tmp_path / "a")
    before = files(tmp_path)
    for hosts, port, proxy in ((["10.0.0.1"], None, None), ([], 9000, None), ([], None, True)):
        with pytest.raises(PhotonError, match="silos may have been told"):
            aggregator.init(tmp_path / "a", hosts, port, proxy)
    make_silo(tmp_path / "s")
    with pytest.raises(PhotonError, match="--name was 'hospital'"):
        joining.init(tmp_path / "s", "clinic", None, None)
    assert {name: found for name, found in files(tmp_path).items() if name.startswith("a/")} == before


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["silo", "init", "x"], "--name: say what the silo is called"),
        (["silo", "init", "x", "--name", "../y"], "--name ../y: use letters"),
        (["silo", "init", "x", "--name", "a", "--node-config", 'policy="p"'], "policy is set by the folder"),
        (["silo", "init", "x", "--name", "a", "--node-config", "devise='cpu'"], "device"),
        (["silo", "init", "x;y", "--name", "a"], "goes into files of other programs"),
        (["silo", "init", "x\x1b[2J", "--name", "a"], "goes into files of other programs"),
        (["silo", "join", "nowhere", "LINE"], "begin with `photon silo init"),
        (["silo", "join", "photon-aggregator-1.AAAA.00000000"], "the folder comes before the line"),
        (["silo", "leave", "nowhere"], "begin with `photon silo init"),
        (["silo", "status", "nowhere"], "no such folder"),
        (["aggregator", "init", "x", "--host", "https://a/"], "leave out scheme, port and path"),
        (["aggregator", "init", "file/x"], "cannot be a folder"),
        (["aggregator", "up", "nowhere"], "begin with `photon aggregator init"),
        (["aggregator", "admit", "nowhere", "photon-silo-1.AAAA.00000000"], "damaged or cut off"),
        (["aggregator", "remove", "nowhere", "a"], "begin with `photon aggregator init"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, PhotonError), done.output
    assert said in str(done.exception)
    assert str(done.exception).isprintable()
    assert os.listdir(tmp_path) == ["file"]


def test_settings_that_were_damaged_are_told(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "s")
    for text, said in (
        ('{"name": "../x"}', "name"),
        ('{"nme": "x"}', "name"),
        ("{", "the file"),
    ):
        (silo.folder / "silo.json").write_text(text)
        with pytest.raises(PhotonError, match=rf"silo\.json: {said}: .*mend it by hand"):
            SiloPlace(silo.folder)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "state").write_text("")
    with pytest.raises(PhotonError, match=r"state: cannot be a folder \(File exists\)"):
        make_silo(tmp_path / "s")


def test_each_side_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    make_aggregator(tmp_path / "x")
    with pytest.raises(PhotonError, match="need folders of their own"):
        make_silo(tmp_path / "x")


def failed(made: AggregatorPlace) -> dict[str, str]:
    return {one.check: one.said for one in aggregator.check(made) if one.level == "fail"}


def test_up_checks_what_would_keep_it_from_coming_up(tmp_path: Path) -> None:
    made, _ = aggregator.init(tmp_path / "a", ["127.0.0.1"], free_port(), None)
    assert failed(made) == {}
    with socket.socket() as other:
        other.bind(("127.0.0.1", made.settings.port))
        other.listen()
        assert "Address already in use" in failed(made)["port"]
        done = CliRunner().invoke(app, ["aggregator", "up", str(made.folder)])
        assert isinstance(done.exception, RunError)
        assert "1 of 4 checks failed" in str(done.exception)
    (made.keys / "superexec").chmod(0o644)
    assert "chmod 600" in failed(made)["keys"]
    (made.keys / "superexec").unlink()
    assert "superexec: missing" in failed(made)["keys"]
    assert not (made.folder / "logs").exists(), "nothing was started"


def test_up_asks_for_nginx_and_for_a_certificate_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_aggregator(tmp_path / "a", host="aggregator.example.org")
    monkeypatch.setattr(aggregator.shutil, "which", lambda *_, **__: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it" in failed(made)["proxy"]
    keys.make_server_certificate(made.keys, ["other.example.org"], force=True)
    said = failed(made)["certificate"]
    assert said.startswith("not for aggregator.example.org: renew it with photon keys server")


# --- admitting ------------------------------------------------------------------------------------------


def test_a_silo_is_admitted_while_the_superlink_is_down(tmp_path: Path) -> None:
    made, silo = make_aggregator(tmp_path / "a"), make_silo(tmp_path / "s")
    line = SiloLine.read(silo.line().line())
    for _ in range(2):
        assert "it is registered when" in aggregator.admit(made, line)
    assert Admitted.read(made.photon_home / ADMITTED).names == {"hospital": line.fingerprint}
    assert made.public_key("hospital").read_bytes() == line.public_key()
    assert aggregator._unregistered(made) == ["hospital"]


def test_a_name_of_another_key_and_an_ejected_key_are_refused(tmp_path: Path) -> None:
    made, silo, other = make_aggregator(tmp_path / "a"), make_silo(tmp_path / "s"), make_silo(tmp_path / "o")
    aggregator.admit(made, silo.line())
    before = files(made.folder)
    with pytest.raises(
        PhotonError, match=r"hospital belongs to the key SHA256:\S+; `photon federation eject"
    ):
        aggregator.admit(made, other.line())
    assert files(made.folder) == before
    assert "stays out" in aggregator.remove(made, "hospital")
    assert aggregator._unregistered(made) == []
    with pytest.raises(PhotonError, match="was ejected"):
        aggregator.admit(made, silo.line())
    assert aggregator.admit(made, other.line()).startswith("hospital belongs to")
    with pytest.raises(PhotonError, match="clinic was not admitted"):
        aggregator.remove(made, "clinic")


def test_a_silo_is_removed_from_a_superlink_that_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, silo = make_aggregator(tmp_path / "a"), make_silo(tmp_path / "s")
    told: list[tuple[str, ...]] = []
    refuses = True

    def flwr(_: Connection, *words: str, check: bool = True) -> str:
        told.append(words)
        if words[1] == "unregister" and refuses:
            raise RunError("flwr supernode failed: no answer")
        return json.dumps({"node-id": 77})

    monkeypatch.setattr(Connection, "flwr", flwr)
    monkeypatch.setattr(AggregatorPlace, "is_up", lambda _: True)
    assert aggregator.admit(made, silo.line()).endswith("and is registered")
    assert made.node_file("hospital").read_text() == "77\n"
    # A SuperLink that does not let it go: nothing is forgotten, and the same command does it later.
    with pytest.raises(RunError, match="no answer"):
        aggregator.remove(made, "hospital")
    assert made.node_file("hospital").exists()
    assert "hospital" in Admitted.read(made.photon_home / ADMITTED).names
    refuses = False
    assert aggregator.remove(made, "hospital").endswith("its node is unregistered")
    assert told[1:] == [("supernode", "unregister", "77", "aggregator")] * 2
    assert capsys.readouterr().out.count("flwr supernode unregister 77 aggregator") == 2
    decided = Admitted.read(made.photon_home / ADMITTED)
    assert (decided.names, silo.line().fingerprint in decided.ejected) == ({}, True)
    assert not made.node_file("hospital").exists()
    assert not made.public_key("hospital").exists()


# --- joining and leaving --------------------------------------------------------------------------------


def test_a_silo_is_at_one_aggregator_at_a_time(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "s")
    lines = [make_aggregator(tmp_path / name).line() for name in ("a", "b")]
    with pytest.raises(PhotonError, match="no aggregator was joined"):
        joining.join(silo, None)
    assert joining.join(silo, lines[0].line()) == lines[0]
    assert joining.join(silo, None) == lines[0]
    assert joining.join(silo, lines[0].line()) == lines[0]
    with pytest.raises(PhotonError, match=r"has joined 127\.0\.0\.1:8000, authority SHA256 .* leave"):
        joining.join(silo, lines[1].line())
    assert silo.authority.read_bytes() == lines[0].certificate()
    said = list(joining.leave(silo))
    assert said[0] == "the silo was not running"
    assert "photon aggregator remove DIR hospital" in said[1]
    assert f"still in {silo.folder}: keys, policy.yaml, state" in said[2]
    assert silo.key.exists()
    with pytest.raises(PhotonError, match="no aggregator was joined"):
        joining.join(silo, None)
    assert joining.join(silo, lines[1].line()) == lines[1]
    assert silo.authority.read_bytes() == lines[1].certificate()


def test_a_damaged_note_of_the_aggregator_is_told(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "s")
    (silo.folder / "aggregator.line").write_bytes(b"\xff\x00" * 100_000)
    with pytest.raises(PhotonError, match="remove it and join with the aggregator's line"):
        joining.join(silo, None)


def test_join_without_an_aggregator_that_answers_says_what_to_mend(tmp_path: Path, corpus: Path) -> None:
    silo, made = make_silo(tmp_path / "s"), make_aggregator(tmp_path / "a")
    line = AggregatorLine(host="127.0.0.1", port=1, authority=made.line().authority)
    (silo.folder / "silo.json").write_text(json.dumps({"name": "hospital", "data": str(corpus)}))
    silo = SiloPlace(silo.folder)
    failed = {
        one.check: one.said
        for one in joining.check(
            silo, joining.join(silo, line.line()), composed(*SMALL_DEPLOYED), None, probe=False
        )
        if one.level == "fail"
    }
    assert set(failed) == {"name", "connection"}
    assert "--name alpha" in failed["name"]
    done = CliRunner().invoke(app, ["silo", "join", str(silo.folder)])
    assert done.exit_code == 1
    assert "2 of" in str(done.exception)
    assert not (silo.folder / ".running").exists(), "nothing was started"


def test_status_of_a_folder_tells_the_connection(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "s")
    (found,) = json.loads(CliRunner().invoke(app, ["silo", "status", "--json", str(silo.folder)]).output)
    assert found["connection"] == {
        "name": "hospital",
        "fingerprint": silo.line().fingerprint,
        "aggregator": None,
        "authority": None,
        "process": None,
        "checks": [],
    }
    done = CliRunner().invoke(app, ["silo", "status", str(silo.folder)])
    assert "none was joined" in done.output
    (found,) = json.loads(CliRunner().invoke(app, ["silo", "status", "--json", str(silo.state)]).output)
    assert found["connection"] is None


CLAIMS = """
import sys, time
from pathlib import Path
from photon.deployment.place import claim
claim(Path(sys.argv[1]), "the silo")
print("claimed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def claimed(tmp_path: Path) -> "subprocess.Popen[str]":
    make_silo(tmp_path / "s")
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def test_leave_ends_what_runs_and_a_second_one_is_refused(
    claimed: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    try:
        with pytest.raises(PhotonError, match=f"the silo is running already as process {claimed.pid}"):
            place.claim(folder, "the silo")
        with pytest.raises(PhotonError, match="is running already"):
            place.refuse_second(folder, "the silo")
        assert next(joining.leave(SiloPlace(folder))).startswith(f"stopped process {claimed.pid} ")
        claimed.wait(30)
    finally:
        claimed.kill()
    assert place.running(folder) is None
    os.close(place.claim(folder, "the silo"))


def test_leave_leaves_a_process_alone_that_has_taken_the_number(tmp_path: Path) -> None:
    silo = make_silo(tmp_path / "s")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        began = psutil.Process(other.pid).create_time()
        (silo.folder / ".running").write_text(f"{other.pid} {began - 10}\n")
        assert next(joining.leave(silo)) == "the silo was not running"
        assert other.poll() is None
        for damaged in ("", "x y", "1", f"{other.pid} nan\n"):
            (silo.folder / ".running").write_text(damaged)
            assert place.running(silo.folder) is None
    finally:
        other.kill()
        other.wait()


def test_what_runs_keeps_its_claim_when_it_becomes_another_program(tmp_path: Path) -> None:
    script = CLAIMS.replace(
        "time.sleep(600)", "import os; os.execv(sys.executable, [sys.executable, '-c', 'input()'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        wait_until(lambda: "input()" in psutil.Process(process.pid).cmdline(), "the other program", 30)
        with pytest.raises(PhotonError, match=f"already as process {process.pid}"):
            place.claim(tmp_path, "the silo")
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.communicate("\n", timeout=30)
