"""What a silo makes of the applications that come: fabricated ones, from forged names to bombs."""

import io
import json
import os
import random
import stat
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supernode.runtime import run_clientapp
from typer.testing import CliRunner

from photon import flower_compat
from photon.commands.app import app as command
from photon.deployment import approved, bundle, guard, joining
from photon.deployment.approved import ApprovedCode, Started, approval
from photon.deployment.bundle import Bundle, difference, digest
from photon.deployment.guard import become_supernode, load
from photon.errors import PhotonError, RefusedError
from photon.state.silo import SiloCounts

PYPROJECT = """
[project]
name = "demo"
version = "1.0"
[tool.flwr.app]
publisher = "acme"
[tool.flwr.app.components]
clientapp = "demo.client:app"
"""
#: What the SuperLink calls it.
NAMES = ("acme/demo", "1.0")


def packed(files: Mapping[str, str | bytes] | None = None, pyproject: str = PYPROJECT) -> bytes:
    """Return a bundle with these files."""
    inside = {"pyproject.toml": pyproject, "demo/client.py": "app = 'honest'\n", **(files or {})}
    return zipped([(zipfile.ZipInfo(name), content) for name, content in inside.items()])


def zipped(entries: list[tuple[zipfile.ZipInfo, str | bytes]]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return made.getvalue()


def with_entry(
    name: str, content: str | bytes = "", *, mode: int = 0, packing: int = zipfile.ZIP_STORED
) -> bytes:
    """Return a bundle that has one entry more."""
    more = zipfile.ZipInfo(name)
    more.external_attr = mode << 16
    more.compress_type = packing
    return zipped([(zipfile.ZipInfo("pyproject.toml"), PYPROJECT), (more, content)])


@pytest.fixture
def silo(tmp_path: Path) -> ApprovedCode:
    """A silo that was started with an application of its own, and has approved another."""
    made = ApprovedCode(tmp_path / "state")
    own = packed({"demo/client.py": "app = 'own'\n"})
    made.note_start(
        Started(date="", arguments=[], node_config="state-dir='x'", own=approval(Bundle.read(own)))
    )
    made.approve(packed(), "read by Ada")
    return made


def test_own_and_approved_code_answer(silo: ApprovedCode) -> None:
    own = packed({"demo/client.py": "app = 'own'\n"})
    assert silo.judge(own, *NAMES) == ("demo.client:app", None), "of it nothing is unpacked"
    _, folder = silo.judge(packed(), *NAMES)
    assert folder == silo.folder / "unpacked" / digest(packed())
    assert folder is not None
    assert (folder / "demo" / "client.py").read_text() == "app = 'honest'\n"
    assert not (folder / ".info").exists()


def test_one_changed_byte_is_refused_and_kept_to_be_looked_at(silo: ApprovedCode) -> None:
    changed = packed({"demo/client.py": "app = 'Honest'\n"})
    with pytest.raises(RefusedError, match=f"has not approved .* {digest(changed)} \\(acme/demo 1.0\\)"):
        silo.judge(changed, *NAMES)
    assert [file.stem for file in silo.refused()] == [digest(changed)]
    assert not (silo.folder / "unpacked").exists()


@pytest.mark.parametrize(
    ("app", "version"),
    [
        ("acme/demo", "1.0/../../../x"),
        ("acme/demo", "1.1"),
        ("acme/../../x", "1.0"),
        ("acme/demo\x1b[2J", "1.0"),
        ("", ""),
    ],
)
def test_a_forged_name_is_refused_though_the_bundle_is_approved(
    silo: ApprovedCode, app: str, version: str
) -> None:
    with pytest.raises(RefusedError, match=r"calls it '") as refused:
        silo.judge(packed(), app, version)
    assert str(refused.value).isprintable()
    with pytest.raises(RefusedError, match="has not approved") as refused:
        silo.judge(packed({"more.py": ""}), app, version)
    assert str(refused.value).isprintable()
    assert not (silo.folder / "unpacked").exists()


def test_the_whole_hash_counts(silo: ApprovedCode) -> None:
    """Flower reuses whatever lies in a folder of that name and eight digits of the hash."""
    known = digest(packed())
    file = silo.folder / "approved.json"
    other = known[:8] + known[8:][::-1]
    file.write_text(file.read_text().replace(known, other))
    assert [one.sha256 for one in silo.approvals()] == [other]
    with pytest.raises(RefusedError, match="has not approved"):
        silo.judge(packed(), *NAMES)


def tampered(folder: Path) -> None:
    (folder / "demo" / "client.py").write_text("app = 'stolen'\n")


def with_bytecode(folder: Path) -> None:
    (folder / "demo" / "__pycache__").mkdir()
    (folder / "demo" / "__pycache__" / "client.cpython-311.pyc").write_bytes(b"code")


def with_link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.py"
    elsewhere.write_text("app = 'honest'\n")
    (folder / "demo" / "client.py").unlink()
    (folder / "demo" / "client.py").symlink_to(elsewhere)


def as_link(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))


@pytest.mark.parametrize("tamper", [tampered, with_bytecode, with_link, as_link])
def test_an_unpacked_folder_is_not_believed(silo: ApprovedCode, tamper: Callable[[Path], None]) -> None:
    _, folder = silo.judge(packed(), *NAMES)
    assert folder is not None
    before = folder.stat().st_ino
    assert silo.judge(packed(), *NAMES)[1] == folder
    assert folder.stat().st_ino == before, "what is as it was is used again"
    tamper(folder)
    assert silo.judge(packed(), *NAMES)[1] == folder
    assert Bundle.read(packed()).is_at(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no zip at all", "not a Flower app bundle"),
        (packed()[:200], "not a Flower app bundle"),
        (with_entry("../x.py"), "name of a plain file"),
        (with_entry("/etc/x.py"), "name of a plain file"),
        (with_entry("a/../../x.py"), "name of a plain file"),
        (with_entry("a\\..\\x.py"), "name of a plain file"),
        (with_entry("a/"), "name of a plain file"),
        (with_entry("a\nb.py"), "name of a plain file"),
        (with_entry("link.py", "/etc/passwd", mode=stat.S_IFLNK | 0o777), "name of a plain file"),
        (with_entry("pipe", mode=stat.S_IFIFO | 0o600), "name of a plain file"),
        (with_entry("slow.py", "x", packing=zipfile.ZIP_LZMA), "packed in a way"),
        (
            with_entry("bomb.json", bytes(bundle.LARGEST), packing=zipfile.ZIP_DEFLATED),
            "unpacked it has more than",
        ),
        (bytes(bundle.LARGEST + 1), "bytes, more than"),
        (with_entry("pyproject.toml/x.py"), "a folder that is a file"),
        (packed(pyproject="[project]"), "names no Flower app"),
        (packed(pyproject=PYPROJECT.replace('"1.0"', '"1.0/../x"')), "no name of an app"),
        (
            packed(pyproject=PYPROJECT.replace('"demo.client:app"', '"demo.client:app()"')),
            "no name of an app",
        ),
        (packed(pyproject=PYPROJECT.replace('"1.0"', "1.0")), "no name of an app"),
        (
            zipped([(zipfile.ZipInfo(f"{n}.py"), "") for n in range(bundle.MOST_FILES + 1)]),
            "files, more than",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_bundle_can_be_neither_approved_nor_kept(
    silo: ApprovedCode, content: bytes, reason: str
) -> None:
    with pytest.raises(PhotonError, match=reason) as wrong:
        silo.approve(content)
    assert str(wrong.value).isprintable()
    with pytest.raises(RefusedError, match="has not approved"):
        silo.judge(content, *NAMES)
    assert silo.refused() == []


def test_a_damaged_bundle_is_a_bundle_or_said_to_be_none() -> None:
    chance, whole = random.Random(1), packed()
    errors = []
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        try:
            Bundle.read(bytes(damaged))
        except PhotonError as error:
            errors.append(error)
    assert all(str(error).isprintable() for error in errors)
    assert {zipfile.BadZipFile, ValueError} <= {type(error.__cause__) for error in errors}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_none() -> None:
    with pytest.raises(PhotonError, match="twice"):
        Bundle.read(with_entry("pyproject.toml", PYPROJECT))


def test_a_list_that_others_could_write_approves_nothing(silo: ApprovedCode) -> None:
    assert stat.S_IMODE((silo.folder / "approved.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(silo.folder.stat().st_mode) == 0o700
    (silo.folder / "approved.json").chmod(0o620)
    with pytest.raises(PhotonError, match="others than the silo's user"):
        silo.judge(packed(), *NAMES)
    (silo.folder / "approved.json").chmod(0o600)
    (silo.folder / "approved.json").write_text("{")
    with pytest.raises(PhotonError, match="damaged"):
        silo.judge(packed(), *NAMES)


def test_lists_are_bounded(silo: ApprovedCode, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(approved.MOST_REFUSED + 2):
        with pytest.raises(RefusedError):
            silo.judge(packed({"n.py": str(number)}), *NAMES)
        newest = silo.folder / "refused" / f"{digest(packed({'n.py': str(number)}))}.fab"
        os.utime(newest, (number, number))
    assert len(silo.refused()) == approved.MOST_REFUSED
    assert silo.refused()[0] == newest
    monkeypatch.setattr(approved, "MOST_APPROVALS", 1)
    with pytest.raises(PhotonError, match="revoke some"):
        silo.approve(packed({"n.py": ""}))


def test_the_operator_sees_what_changed_and_decides(silo: ApprovedCode) -> None:
    state, run = str(silo.state), CliRunner().invoke
    changed = packed({"demo/client.py": "app = 'other\x1b[2J'\n", "new.py": "a\nb\n"})
    with pytest.raises(RefusedError):
        silo.judge(changed, *NAMES)
    shown = run(command, ["silo", "approve", state, "--diff"], input="n\n")
    assert shown.exit_code == 1
    assert digest(changed) in shown.stdout
    assert "changed  demo/client.py  +1 -1" in shown.stdout
    assert "added    new.py  +2 -0" in shown.stdout
    assert "+app = 'other\\x1b[2J'" in shown.stdout
    assert "\x1b[2J" not in shown.stdout
    assert len(silo.approvals()) == 1
    assert run(command, ["silo", "approve", state, "--note", "seen"], input="y\n").exit_code == 0
    assert [one.note for one in silo.approvals()] == ["read by Ada", "seen"]
    assert silo.refused() == []
    assert silo.judge(changed, *NAMES)[1] is not None
    assert run(command, ["silo", "revoke", state, digest(changed)[:12]]).exit_code == 0
    with pytest.raises(RefusedError):
        silo.judge(changed, *NAMES)
    assert not (silo.folder / "unpacked" / digest(changed)).exists()


def test_a_silos_folder_stands_for_its_state(tmp_path: Path) -> None:
    """``photon silo init`` has made it; what is approved is kept in its state, wherever it is named from."""
    place, _ = joining.init(tmp_path / "hospital", "hospital", None, None)
    bundle, run = tmp_path / "demo.fab", CliRunner().invoke
    bundle.write_bytes(packed())
    done = run(command, ["silo", "approve", str(place.folder), str(bundle), "--yes", "--note", "seen"])
    assert done.exit_code == 0, done.output
    for folder in (place.folder, place.state):
        assert "is approved already" in run(command, ["silo", "approve", str(folder), str(bundle)]).stdout
    assert [one.note for one in ApprovedCode(place.state).approvals()] == ["seen"]
    assert not (place.folder / ApprovedCode(place.state).folder.name).exists()
    gone = run(command, ["silo", "revoke", str(place.folder), digest(packed())[:12]])
    assert f"revoked {digest(packed())}" in gone.stdout
    assert ApprovedCode(place.state).approvals() == []
    again = run(command, ["silo", "revoke", str(place.folder), digest(packed())[:12]])
    assert isinstance(again.exception, PhotonError)


def test_revoked_code_ends_while_it_answers(
    silo: ApprovedCode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(guard.os, "_exit", ended.append)
    (one,) = silo.approvals()
    watch = threading.Thread(target=guard.end_when_revoked, args=(silo, one.sha256, 0.02), daemon=True)
    watch.start()
    watch.join(0.2)
    assert watch.is_alive()
    silo.revoke(one.sha256)
    watch.join(5.0)
    assert ended == [1]
    assert f"{one.sha256} is no longer approved" in capsys.readouterr().err
    # A list that cannot be read approves nothing.
    (silo.folder / "approved.json").write_text("{")
    guard.end_when_revoked(silo, one.sha256)
    assert ended == [1, 1]


def test_lines_of_files_that_are_no_text_are_shown() -> None:
    assert list(difference({}, {"x": b"\xff\x00\n"}))[-2:] == ["+\\xff\\x00", " "]


def test_status_tells_what_was_given(silo: ApprovedCode) -> None:
    SiloCounts(silo.state, "alpha").add("first", 2_048, 1)
    SiloCounts(silo.state, "alpha").add("second\x1b[2J", 1_024, 1)
    run = CliRunner().invoke
    (told,) = json.loads(run(command, ["silo", "status", "--json", str(silo.state)]).stdout)
    assert told["silos"]["alpha"]["runs"]["first"] == {"tokens": 2_048, "releases": 1}
    assert told["silos"]["alpha"]["last_active"].startswith("20")
    assert told["policy"] == {"file": None, "rules": {}}
    assert [one["note"] for one in told["approved"]] == ["read by Ada"]
    shown = run(command, ["silo", "status", str(silo.state)]).stdout
    assert "3,072" in shown
    assert "everything is accepted" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "option", ["--isolation=process", "--isol", "--allow-runtime-dependency-installation"]
)
def test_no_option_leads_around_it(option: str, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="unseen"):
        become_supernode(["--insecure", option], "", tmp_path)


# --- what Flower is relied on for ---------------------------------------------------------------------


def test_every_kind_of_task_comes_to_the_check() -> None:
    """The SuperLink names the kind; where one finds no program, the SuperExec ends."""
    assert sorted(TASK_TYPE_TO_COMMAND.values()) == sorted(flower_compat.TASK_PROGRAMS)


def test_approved_code_goes_before_installed_code_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, folder = ModuleType("demo"), tmp_path / "demo"
    monkeypatch.setitem(sys.modules, "demo", installed)
    monkeypatch.setitem(sys.modules, "demo.client", installed)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "client.py").write_text("app = 'approved'\n")
    assert load("demo.client:app", tmp_path) == "approved"
    assert list(tmp_path.rglob("*.pyc")) == []
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1", "a worker has to do as much"
    assert load("os:path.join", None) is os.path.join
    with pytest.raises(PhotonError, match="is not in it"):
        load("os:path.join", tmp_path)


@pytest.mark.parametrize("refused", [True, False])
def test_a_refusal_is_a_reply(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of Flower's own program are called as it calls them."""
    message = Message(  # type: ignore[call-overload]
        content=RecordDict(), metadata=Metadata(1, "m", 1, 2, "", "", 0.0, 60.0, "query")
    )
    flower_compat.ensure_task_identity()
    sent, outcome = [], []
    run, sent_bundle = SimpleNamespace(fab_id="a/b", fab_version="1"), SimpleNamespace(content=b"x")
    monkeypatch.setattr(run_clientapp, "pull_task_input", lambda _: (message, "context", run, sent_bundle))
    monkeypatch.setattr(run_clientapp, "push_message", lambda _, reply, context: sent.append(reply))
    monkeypatch.setattr(run_clientapp, "push_task_output", lambda *said: outcome.append(said[1:]))

    def choose(content: bytes, app: str, version: str) -> Callable[..., Message]:
        assert (content, app, version) == (b"x", "a/b", "1")
        if refused:
            raise RefusedError("not this")
        return lambda message, context: Message(RecordDict(), reply_to=message)

    monkeypatch.setattr("flwr.supercore.heartbeat.HeartbeatSender.start", lambda _: None)
    monkeypatch.setattr("flwr.supercore.app_utils.start_parent_process_monitor", lambda _: None)
    arguments = ["--runtime-api-address", "127.0.0.1:1", "--token", "t", "--insecure", "--parent-pid", "1"]
    flower_compat.answer_task(arguments, choose)
    assert outcome == [("context", "completed", "")]
    assert [reply.has_error() for reply in sent] == [refused]
    if refused:
        assert (sent[0].error.code, sent[0].error.reason) == (7, "not this")
    with pytest.raises(SystemExit):
        flower_compat.answer_task([*arguments, "--allow-runtime-dependency-installation"], choose)


def test_a_program_whose_supernode_is_gone_waits_for_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat asks a SuperNode that is gone for ever; who waits for it stays for ever, too."""
    monkeypatch.setattr("flwr.supercore.heartbeat.HeartbeatSender.start", lambda _: None)
    monkeypatch.setattr("flwr.supercore.heartbeat.HeartbeatSender.is_running", True)
    monkeypatch.setattr("flwr.supercore.heartbeat.HeartbeatSender.stop", lambda _: pytest.fail("it waits"))
    monkeypatch.setattr("flwr.supercore.app_utils.start_parent_process_monitor", lambda _: None)
    said: list[str] = []
    monkeypatch.setattr(run_clientapp, "push_task_output", lambda *told: said.append(told[2]))

    def gone(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_clientapp, "pull_task_input", gone)
    arguments = ["--runtime-api-address", "127.0.0.1:1", "--token", "t", "--insecure", "--parent-pid", "1"]
    with pytest.raises(KeyboardInterrupt):
        flower_compat.answer_task(arguments, lambda *_: pytest.fail("nothing came"))
    assert said == ["failed"]


def test_flowers_own_program_is_built_as_ours_expects() -> None:
    """Ours leaves out what unpacks and loads; a change of the original asks for another look at it."""
    used = set(run_clientapp.run_clientapp.__code__.co_names)
    assert {
        "pull_task_input",
        "install_from_fab",
        "get_load_client_app_fn",
        "install_app_dependencies",
        "push_message",
        "HeartbeatSender",
        "start_parent_process_monitor",
    } <= used
    assert Error(7, "x").code == 7
