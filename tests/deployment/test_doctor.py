"""Each check of the doctor finds what is wrong and says how to mend it; a sound silo passes all of them."""

import datetime
import http.server
import io
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from photon.commands.deployment import print_findings
from photon.data.prepared import PreparedData, file_sha256
from photon.data.separate import separate_silo
from photon.deployment import doctor, keys
from photon.deployment.doctor import Finding, Silo, examine
from tests.conftest import SMALL, SMALL_DEPLOYED, composed, write_corpus
from tests.deployment.harness import Deployment


class Answers(http.server.BaseHTTPRequestHandler):
    """What a SuperLink, or a proxy before it, answers by path."""

    codes: ClassVar[dict[str, int]]

    def do_GET(self) -> None:
        self.send_response(self.codes.get(self.path, 404))
        self.send_header("content-length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve(certificates: Path | None, codes: dict[str, int]) -> http.server.ThreadingHTTPServer:
    handler = type("Handler", (Answers,), {"codes": codes})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all") / "keys"
    keys.make_authority(folder)
    keys.make_server_certificate(folder, ["localhost", "127.0.0.1"])
    return folder


@pytest.fixture
def aggregator(certificates: Path) -> Iterator[Callable[..., str]]:
    """Start something that answers as an aggregator does; return its address."""
    servers = []

    def start(certificates: Path | None = certificates, health: int = 200, control: int = 403) -> str:
        servers.append(serve(certificates, {"/health": health, "/v1/control/list-runs": control}))
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def sound(
    aggregator: Callable[..., str],
    certificates: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Silo:
    """A silo with which all is well; the aggregator's word for its key is made up."""
    monkeypatch.setattr("photon.flower_compat.is_registered", lambda *_: True)
    data = tmp_path / "silo"
    separate_silo(PreparedData.open(corpus), "alpha", data)
    return Silo(
        superlink=aggregator(),
        authority=certificates / "authority.crt",
        key=keys.make_node_key(tmp_path / "keys", "alpha")[0],
        node_config={"data-dir": str(data), "state-dir": str(tmp_path / "state"), "threads": 1},
        config=composed(*SMALL_DEPLOYED),
        tokenizer=str(corpus),
        probe=False,
    )


def found(silo: Silo, check: str) -> Finding:
    """Return the finding of a check; there is exactly one."""
    (finding,) = [finding for finding in examine(silo) if finding.check == check]
    return finding


def bad(silo: Silo) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(silo) if finding.level != "ok"}


def test_a_sound_silo_passes_every_check(sound: Silo) -> None:
    findings = list(examine(replace(sound, probe=True)))
    assert [finding for finding in findings if finding.level != "ok"] == []
    assert [finding.check for finding in findings] == [
        *("versions", "connection", "certificate", "health", "control API", "registration", "key"),
        *("node config", "data", "tokenizer", "state", "device", "memory", "throughput"),
    ]
    assert list((Path(str(sound.node_config["state-dir"]))).iterdir()) == [], "nothing is left behind"


Break = Callable[[Silo, Path], Silo]


def with_node_config(**changes: Any) -> Break:
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda silo, _: replace(silo, node_config={**silo.node_config, **named})


def with_config(*overrides: str) -> Break:
    return lambda silo, _: replace(silo, config=composed(*SMALL_DEPLOYED, *overrides))


def another_authority(silo: Silo, folder: Path) -> Silo:
    return replace(silo, authority=keys.make_authority(folder / "other")[1])


def an_open_key(silo: Silo, _: Path) -> Silo:
    assert silo.key is not None
    silo.key.chmod(0o644)
    return silo


def the_public_half(silo: Silo, _: Path) -> Silo:
    return replace(silo, key=Path(f"{silo.key}.pub"))


def a_file(silo: Silo, folder: Path) -> Silo:
    (folder / "file").touch()
    return with_node_config(state_dir=str(folder / "file" / "state"))(silo, folder)


def another_tokenizer(silo: Silo, folder: Path) -> Silo:
    file = Path(str(silo.node_config["data-dir"])) / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    # As if the manifest had been copied after it: else the data itself is refused.
    (file.parents[1] / "manifest.json").touch()
    return replace(silo, tokenizer=file_sha256(file))


def a_short_file(silo: Silo, _: Path) -> Silo:
    file = Path(str(silo.node_config["data-dir"])) / "silos" / "alpha" / "train.npy"
    file.write_bytes(file.read_bytes()[:-64])
    return silo


#: 2·10^12 parameters, which are never made.
HUGE = with_config("model.architecture.n_layer=400", "model.architecture.n_embd=20480")


@pytest.mark.few(14)
@pytest.mark.parametrize(
    ("check", "level", "said", "spoil"),
    [
        ("connection", "fail", "firewalls", lambda silo, _: replace(silo, superlink="127.0.0.1:1")),
        ("connection", "fail", "no such host", lambda silo, _: replace(silo, superlink="none.invalid:8000")),
        ("connection", "fail", "expected HOST:PORT", lambda silo, _: replace(silo, superlink="https://x")),
        ("certificate", "fail", "not signed by this authority", another_authority),
        ("certificate", "warn", "no TLS", lambda silo, _: replace(silo, authority=None)),
        ("certificate", "fail", "not a certificate", lambda silo, _: replace(silo, authority=silo.key)),
        ("key", "fail", "others may use", an_open_key),
        ("key", "fail", "public half", the_public_half),
        ("key", "fail", "needs TLS", lambda silo, _: replace(silo, authority=None)),
        ("key", "warn", "cannot tell this silo", lambda silo, _: replace(silo, key=None)),
        ("node config", "fail", "data-dir", with_node_config(date_dir="x")),
        ("node config", "fail", "divide", with_node_config(processes=3)),
        ("node config", "fail", "policy", with_node_config(policy="/nowhere/policy.yaml")),
        (
            "node config",
            "fail",
            "does not divide local_steps=4",
            with_node_config(islands=2, island_rounds=3),
        ),
        ("data", "fail", "cannot be dealt to 999 islands", with_node_config(islands=999)),
        ("data", "fail", "not a folder", with_node_config(data_dir="/nowhere")),
        ("data", "fail", "damaged or cut short", a_short_file),
        ("data", "fail", "--sequence-length 8", with_config("model.sequence_length=8")),
        ("tokenizer", "warn", "compare it", lambda silo, _: replace(silo, tokenizer=None)),
        ("tokenizer", "fail", "photon data prepare --tokenizer", lambda s, _: replace(s, tokenizer="0" * 64)),
        ("tokenizer", "fail", "neither a tokenizer", lambda silo, _: replace(silo, tokenizer="nowhere")),
        ("tokenizer", "fail", "is not the tokenizer that the data", another_tokenizer),
        ("state", "fail", "cannot be written", a_file),
        ("state", "fail", "free some space", HUGE),
        ("memory", "fail", "smaller model", HUGE),
        ("device", "fail", "CUDA", with_node_config(device="cuda:99")),
    ],
)
def test_what_is_wrong_is_found(
    sound: Silo, tmp_path: Path, check: str, level: str, said: str, spoil: Break
) -> None:
    finding = bad(spoil(sound, tmp_path))[check]
    assert finding.level == level
    assert said in finding.said


def test_every_island_takes_its_share_of_the_text_and_memory_of_its_own(sound: Silo) -> None:
    islands = with_node_config(islands=2)(sound, Path())
    assert found(islands, "data").said.endswith("dealt to 2 islands")
    needed = [
        float(re.search(r"at least ([\d.]+) GB needed", found(silo, "memory").said)[1])  # type: ignore[index]
        for silo in (sound, islands)
    ]
    assert needed[1] == pytest.approx(2 * needed[0], rel=0.01)


def test_an_adapter_is_all_that_a_silo_keeps_and_takes_gradients_of(sound: Silo) -> None:
    wide = "model.architecture.n_embd=512", "model.architecture.n_head=8"
    whole, adapted = (
        with_config(*wide, *more)(sound, Path()) for more in ([], ["adapter=lora", "adapter.rank=1"])
    )

    def needed(silo: Silo, check: str) -> float:
        said = found(silo, check).said
        match = re.search(r"([\d.]+) ([kMG]?B) needed", said)
        assert match is not None, said
        return float(match[1]) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[match[2]]

    assert needed(adapted, "state") < needed(whole, "state") / 50
    # Of what is frozen there is one in training, and one in the message.
    assert needed(whole, "memory") > needed(adapted, "memory") > 2**30


def test_what_builds_on_a_failed_check_is_left_out(sound: Silo) -> None:
    assert set(bad(replace(sound, superlink="127.0.0.1:1"))) == {"connection"}
    assert set(bad(with_node_config(data_dir="/nowhere")(sound, Path()))) == {"data"}


def test_a_certificate_for_another_host_names_its_own(
    sound: Silo, tmp_path: Path, aggregator: Callable[..., str]
) -> None:
    keys.make_authority(tmp_path / "other")
    keys.make_server_certificate(tmp_path / "other", ["aggregator.example.org"])
    silo = replace(sound, superlink=aggregator(tmp_path / "other"))
    silo = replace(silo, authority=tmp_path / "other" / "authority.crt")
    finding = found(silo, "certificate")
    assert finding.level == "fail"
    assert "is for aggregator.example.org, not for 127.0.0.1" in finding.said


@pytest.mark.parametrize(("days", "level", "said"), [(20, "warn", "renew"), (1, "fail", "expired")])
def test_a_certificate_that_ends(
    sound: Silo,
    tmp_path: Path,
    aggregator: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    days: int,
    level: str,
    said: str,
) -> None:
    keys.make_authority(tmp_path / "other")
    if level == "fail":
        monkeypatch.setattr(keys, "_CLOCK_SKEW", datetime.timedelta(days=days, hours=1))
    keys.make_server_certificate(tmp_path / "other", ["127.0.0.1"], days=days)
    silo = replace(sound, superlink=aggregator(tmp_path / "other"))
    finding = found(replace(silo, authority=tmp_path / "other" / "authority.crt"), "certificate")
    assert (finding.level, said in finding.said) == (level, True)


def test_the_wrong_server_is_noticed(sound: Silo, aggregator: Callable[..., str]) -> None:
    plain = replace(sound, superlink=aggregator(None))
    assert "does not speak TLS" in found(plain, "certificate").said
    other = replace(sound, superlink=aggregator(health=404))
    assert found(other, "health").level == "fail"


@pytest.mark.parametrize("code", [200, 400, 500])
def test_an_open_control_api_is_a_warning_unless_it_is_of_this_machine(
    sound: Silo, code: int, aggregator: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silo = replace(sound, superlink=aggregator(control=code))
    assert found(silo, "control API").level == "ok"
    monkeypatch.setattr(doctor, "is_loopback", lambda _: False)
    finding = found(silo, "control API")
    assert finding.level == "warn"
    assert "/v1/fleet and /health alone" in finding.said


def test_slow_devices_are_a_warning(sound: Silo, monkeypatch: pytest.MonkeyPatch) -> None:
    silo = replace(sound, probe=True)
    monkeypatch.setattr(doctor, "_tokens_per_second", lambda _: 1.0)
    # 4 local steps of 4 windows of 16 tokens, at a token a second.
    assert "about 256 s" in found(silo, "throughput").said
    slow = with_config("federation.deadline=300")(silo, Path())
    finding = found(replace(slow, probe=True), "throughput")
    assert finding.level == "warn"
    assert "the round ends after 300 s" in finding.said


def test_another_version_of_flower_is_a_failure(sound: Silo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.42.0")
    finding = found(sound, "versions")
    assert finding.level == "fail"
    assert "pip install 'flwr==1.41.*'" in finding.said


@pytest.mark.deployment
@pytest.mark.timeout(600)
def test_a_real_superlink_is_asked_for_the_key(tmp_path: Path) -> None:
    """A key that is registered, and one that is not; asking does not disturb the node that uses the key."""
    data = write_corpus(tmp_path / "corpus", {"alpha": "abcdefgh", "beta": "ijklmnop"})
    with Deployment(tmp_path / "fed", data) as deployment:
        deployment.up()
        federation = deployment.federation
        silo = Silo(
            superlink=federation.address,
            authority=federation.authority,
            key=federation.node_key("alpha"),
            node_config={
                "data-dir": str(deployment.data_folder("alpha")),
                "state-dir": str(deployment.state_folder("alpha")),
            },
            config=composed(*SMALL, "data.path=x"),
            tokenizer=str(data),
            probe=False,
        )
        # It is on this machine alone, so that its open control API harms nobody.
        assert bad(silo) == {}
        stranger = replace(silo, key=keys.make_node_key(tmp_path / "keys", "stranger")[0])
        assert found(stranger, "registration").level == "fail"
        assert federation.nodes_online() == 2


def test_a_hash_is_printed_whole_on_a_narrow_terminal() -> None:
    out = io.StringIO()
    print_findings(Console(file=out, width=50), [Finding("tokenizer", "warn", "5beda5a9" * 8)])
    assert "5beda5a9" * 8 in "".join(out.getvalue().split())
