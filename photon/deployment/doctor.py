"""Check a silo before it joins: what its SuperNode would stumble over, and how to mend it.

Every check looks at one thing and reports lines; one that builds on another that failed is left out.
Nothing is changed on either side but an empty file that is written to the state folder and removed.
"""

import datetime
import importlib.metadata
import math
import shutil
import socket
import ssl
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData, file_sha256
from photon.deployment.keys import certificate_hosts, read_node_key
from photon.deployment.place import is_loopback
from photon.engine.app_folder import source_folder
from photon.engine.processes import is_healthy
from photon.errors import PhotonError
from photon.silo.site import NodeSettings, SiloSite, find_site, read_settings
from photon.subfederation.islands import config_of, silo_of

if TYPE_CHECKING:
    from cryptography import x509

Level = Literal["ok", "warn", "fail"]

#: A certificate is worth a warning when it ends within so many days.
EXPIRY_DAYS = 30
#: Local steps of the throughput probe, and those before them that do not count.
PROBE_STEPS, WARM_UP_STEPS = 4, 1
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes
    ----------
    check
        What was looked at.
    level
        ``ok``, ``warn`` (the silo can join, but read this) or ``fail`` (it cannot).
    said
        What was found, and unless it is ok, how to mend it.
    """

    check: str
    level: Level
    said: str


@dataclass(frozen=True)
class Silo:
    """The silo to check: what ``flower-supernode`` is started with, and the run it is to take part in.

    Attributes
    ----------
    superlink
        ``host:port`` of the aggregator.
    authority
        Certificate that the aggregator's is signed by; None for a connection without TLS.
    key
        The node's private key; None where nodes show none.
    node_config
        What ``--node-config`` says, as keys and values.
    config
        The run's configuration, as far as it is known.
    tokenizer
        SHA-256 of the run's ``tokenizer.json``, or the file or its folder; None: not known.
    probe
        Whether to take a few local steps.
    """

    superlink: str
    authority: Path | None
    key: Path | None
    node_config: Mapping[str, str | int | float | bool]
    config: RunConfig
    tokenizer: str | None
    probe: bool

    @cached_property
    def here(self) -> tuple[SiloSite, RunConfig]:
        """Where the silo's things lie, and the run's configuration as it would be carried out here."""
        return find_site(self.node_config, self.config)

    @cached_property
    def settings(self) -> NodeSettings:
        """What the node config says."""
        return read_settings(self.node_config)

    @property
    def islands(self) -> int:
        """Groups of the machine's devices that train side by side."""
        return self.settings.islands or 1

    @cached_property
    def data(self) -> PreparedData:
        """The silo's prepared data."""
        return PreparedData.open(self.here[0].data)

    @cached_property
    def address(self) -> tuple[str, int]:
        """Host and port of the aggregator."""
        host, colon, port = self.superlink.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536) or "/" in host:
            raise PhotonError(f"--superlink {self.superlink}: expected HOST:PORT, without https://")
        return host.strip("[]"), int(port)


Check = Callable[[Silo], Iterator[Finding]]


def examine(silo: Silo) -> Iterator[Finding]:
    """Yield what each check finds, one after the other."""
    yield from _all_of(silo, _GROUPS)


def examine_connection(silo: Silo) -> Iterator[Finding]:
    """Yield what the checks of the connection find; nothing of the silo's data or devices is looked at."""
    yield from _all_of(silo, [_CONNECTION])


def _all_of(silo: Silo, groups: "Sequence[Sequence[Check]]") -> Iterator[Finding]:
    for group in groups:
        for check in group:
            findings = list(_carefully(check, silo))
            yield from findings
            if check in _PREREQUISITES and any(finding.level == "fail" for finding in findings):
                break


def _carefully(check: Check, silo: Silo) -> Iterator[Finding]:
    try:
        yield from check(silo)
    except PhotonError as error:
        yield Finding(check.__name__.strip("_").replace("_", " "), "fail", str(error))


# --- this machine's programs ----------------------------------------------------------------------------


def _versions(_: Silo) -> Iterator[Finding]:
    yield versions("aggregator")


def versions(other: str) -> Finding:
    """Return whether Flower here is the one that Photon needs; the other side needs it as well."""
    import photon

    flower = importlib.metadata.version("flwr")
    wanted = _pinned_minor()
    said = f"photon {photon.__version__}, flwr {flower}"
    if flower.startswith(f"{wanted}."):
        return Finding("versions", "ok", f"{said}; the {other} needs flwr {wanted} as well")
    mend = f"pip install 'flwr=={wanted}.*'"
    return Finding("versions", "fail", f"{said}, but photon needs flwr {wanted}: {mend}")


def _pinned_minor() -> str:
    """Return the minor version of flwr that this photon depends on, such as ``1.41``."""
    project = tomllib.loads((source_folder() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (flower,) = (requirement for requirement in project["dependencies"] if requirement.startswith("flwr"))
    return ".".join(flower.partition(">=")[2].split(".")[:2])


# --- the connection -------------------------------------------------------------------------------------


def _connection(silo: Silo) -> Iterator[Finding]:
    host, port = silo.address
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except socket.gaierror:
        yield Finding("connection", "fail", f"{host}: no such host; check the name and this machine's DNS")
    except OSError as error:
        reason = error.strerror or "no answer"
        mend = "check address and port, the firewalls on the way, and that the SuperLink runs"
        yield Finding("connection", "fail", f"{silo.superlink}: {reason}; {mend}")
    else:
        yield Finding("connection", "ok", f"{silo.superlink} is reachable")


def _certificate(silo: Silo) -> Iterator[Finding]:
    if silo.authority is None:
        said = "no TLS: everybody on the way can read and change the model; ask for a certificate"
        yield Finding("certificate", "warn", said)
        return
    from photon.deployment.keys import read_certificate

    read_certificate(silo.authority)
    host, port = silo.address
    context = ssl.create_default_context(cafile=str(silo.authority))
    try:
        with (
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            der = secured.getpeercert(binary_form=True) or b""
            yield expiry(der, "ask the aggregator to renew it")
    except ssl.SSLCertVerificationError as error:
        yield Finding("certificate", "fail", _why_refused(error, host, port))
    except (ssl.SSLError, OSError):
        said = f"{silo.superlink} does not speak TLS; is it the right port, and was the SuperLink started so?"
        yield Finding("certificate", "fail", said)


def expiry(der: bytes, mend: str) -> Finding:
    """Return for what a certificate is, and for how long; ``mend`` is what to do when that is short."""
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    left = (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    said = f"for {', '.join(certificate_hosts(certificate))}; {left} days left"
    if left < EXPIRY_DAYS:
        return Finding("certificate", "warn", f"{said}: {mend}")
    return Finding("certificate", "ok", said)


def _why_refused(error: ssl.SSLCertVerificationError, host: str, port: int) -> str:
    # OpenSSL's numbers: 10 has expired, 9 is not yet valid, 62 and 64 are for another host or address.
    if error.verify_code == 10:
        return "the aggregator's certificate has expired: ask for a new one, or check this machine's clock"
    if error.verify_code == 9:
        return "the aggregator's certificate is not valid yet: check this machine's clock"
    if error.verify_code in (62, 64):
        hosts = certificate_hosts(_unverified_certificate(host, port))
        return (
            f"the aggregator's certificate is for {', '.join(hosts) or 'no host'}, not for {host}: connect "
            "to one of these, or ask for a certificate with this name"
        )
    return (
        f"the aggregator's certificate is not signed by this authority ({error.verify_message}): ask for its "
        "authority.crt and compare fingerprints (`photon keys show`); if they agree, somebody is in between"
    )


def _unverified_certificate(host: str, port: int) -> "x509.Certificate":
    from cryptography import x509

    # Only to tell what it is for; nothing is sent over this connection.
    return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, port)).encode())


def _health(silo: Silo) -> Iterator[Finding]:
    if is_healthy(silo.superlink, silo.authority, timeout=_CONNECT_SECONDS):
        yield Finding("health", "ok", "a SuperLink answers")
    else:
        said = f"{silo.superlink} answers, but not as a SuperLink does (GET /health): is it the right port?"
        yield Finding("health", "fail", said)


def _control(silo: Silo) -> Iterator[Finding]:
    """Ask for the control API in vain: with a proxy in front, a silo cannot reach it."""
    scheme = "http" if silo.authority is None else "https"
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if silo.authority is not None:
        context = ssl.create_default_context(cafile=str(silo.authority))
        handlers.append(urllib.request.HTTPSHandler(context=context))
    url = f"{scheme}://{silo.superlink}/v1/control/list-runs"
    try:
        opened = urllib.request.build_opener(*handlers).open(url, b"", timeout=_CONNECT_SECONDS)
        code = opened.status
        opened.close()
    except urllib.error.HTTPError as error:
        code = error.code
    except (urllib.error.URLError, OSError):
        code = 404
    if code in (401, 403, 404):
        yield Finding("control API", "ok", "out of a silo's reach")
    elif is_loopback(silo.superlink.rpartition(":")[0]):
        yield Finding("control API", "ok", "within reach of this machine alone")
    else:
        said = (
            "the aggregator's control API answers here, so whoever gets this far can run code on every silo: "
            "ask for a proxy that lets silos reach /v1/fleet and /health alone"
        )
        yield Finding("control API", "warn", said)


def _registration(silo: Silo) -> Iterator[Finding]:
    import httpx

    from photon.flower_compat import is_registered

    if silo.key is None or silo.authority is None:
        return
    try:
        key = read_node_key(silo.key)
    except PhotonError:
        return  # The check of the key itself says so.
    try:
        registered = is_registered(silo.superlink, silo.authority, key)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 401:
            said = "the aggregator does not take this key's signature: check this machine's clock"
            yield Finding("registration", "fail", said)
            return
        said = f"could not be asked for (HTTP {error.response.status_code})"
        yield Finding("registration", "warn", said)
    except httpx.HTTPError as error:
        yield Finding("registration", "warn", f"could not be asked for ({type(error).__name__})")
    else:
        if registered:
            yield Finding("registration", "ok", "the aggregator knows the key")
        else:
            said = (
                f"the aggregator does not know {silo.key}.pub: its operator lets it in with `photon "
                "aggregator admit`, or `flwr supernode register`; once removed, a silo needs a new key"
            )
            yield Finding("registration", "fail", said)


# --- the node -------------------------------------------------------------------------------------------


def _key(silo: Silo) -> Iterator[Finding]:
    if silo.key is None:
        yield Finding("key", "warn", "none: the aggregator cannot tell this silo from any other")
        return
    read_node_key(silo.key)
    if silo.authority is None:
        yield Finding("key", "fail", "a node key needs TLS: give --root-certificates, or leave the key out")
    else:
        yield Finding("key", "ok", str(silo.key))


def _node_config(silo: Silo) -> Iterator[Finding]:
    _, config = silo.here
    if silo.islands > 1:
        config_of(silo.settings, config, config.local_steps)
    bound = silo.settings.policy is not None
    yield Finding("node config", "ok", "with a policy" if bound else "no policy: every request is accepted")


def _data(silo: Silo) -> Iterator[Finding]:
    data = silo.data
    manifest, model = data.manifest, silo.config.model
    if manifest.sequence_length > model.sequence_length:
        said = (
            f"windows of {manifest.sequence_length} tokens are longer than the model's "
            f"{model.sequence_length}: prepare the data with --sequence-length {model.sequence_length}"
        )
        yield Finding("data", "fail", said)
        return
    tokens = sum(entry.train.tokens for entry in manifest.silos.values())
    names = ", ".join(data.silo_names)
    said = f"{names}: {tokens:,} tokens in windows of {manifest.sequence_length}"
    if silo.islands > 1:
        silo_of(silo.here[0])
        data.dealt(1, silo.islands)
        said += f", dealt to {silo.islands} islands"
    yield Finding("data", "ok", said)


def _tokenizer(silo: Silo) -> Iterator[Finding]:
    wanted = _tokenizer_hash(silo.tokenizer)
    recorded = silo.data.manifest.tokenizer_sha256
    file = silo.data.tokenizer_path / "tokenizer.json"
    if file_sha256(file) != recorded:
        said = f"{file} is not the tokenizer that the data was prepared with: prepare the data again"
        yield Finding("tokenizer", "fail", said)
    elif wanted is None:
        said = f"{recorded}: compare it with the run's, or give that as --run-tokenizer"
        yield Finding("tokenizer", "warn", said)
    elif wanted != recorded:
        said = (
            f"the data was prepared with {recorded[:12]}…, the run uses {wanted[:12]}…: prepare it again "
            "with `photon data prepare --tokenizer` and the run's tokenizer.json"
        )
        yield Finding("tokenizer", "fail", said)
    else:
        yield Finding("tokenizer", "ok", "the run's own")


def _tokenizer_hash(given: str | None) -> str | None:
    if given is None:
        return None
    path = Path(given).expanduser()
    for file in (path, path / "tokenizer.json", path / "tokenizer" / "tokenizer.json"):
        if file.is_file():
            return file_sha256(file)
    digits = given.lower()
    if len(digits) == 64 and set(digits) <= set("0123456789abcdef"):
        return digits
    raise PhotonError(f"--run-tokenizer {given}: neither a tokenizer.json nor 64 hexadecimal digits")


def _state(silo: Silo) -> Iterator[Finding]:
    folder = silo.here[0].state
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        said = f"{folder}: cannot be written ({error.strerror}): give it to the SuperNode's user"
        yield Finding("state", "fail", said)
        return
    need, free = _state_bytes(silo), shutil.disk_usage(folder).free
    said = f"{folder}: {_size(free)} free, about {_size(need)} needed"
    yield (
        Finding("state", "ok", said) if free > need else Finding("state", "fail", f"{said}: free some space")
    )


def _state_bytes(silo: Silo) -> int:
    """Estimate what a silo keeps: per round a reply and two moments in float32, one round being written."""
    rounds = silo.config.checkpoint.keep + 2
    return _parameters(silo)[1] * 4 * 3 * rounds * len(silo.data.silo_names)


def _device(silo: Silo) -> Iterator[Finding]:
    import torch

    from photon.files.processes import usable_cores
    from photon.training.hardware import resolve_device

    training = silo.here[1].training
    device = resolve_device(training.device)
    if device.type == "cpu":
        yield Finding("device", "ok", f"CPU, {usable_cores()} cores")
        return
    count = torch.cuda.device_count()
    wanted = max(training.processes // training.machines, (device.index or 0) + 1)
    if wanted > count:
        yield Finding(
            "device", "fail", f"{count} GPUs are here, {wanted} are asked for: change device or processes"
        )
    else:
        yield Finding("device", "ok", f"{torch.cuda.get_device_name(device)}, one of {count}")


def _memory(silo: Silo) -> Iterator[Finding]:
    import psutil
    import torch

    from photon.training.hardware import resolve_device

    training = silo.here[1].training
    device = resolve_device(training.device)
    model, trained = (4 * count for count in _parameters(silo))
    # Parameters, gradients and two moments where it trains; message, reply and torch in the host's memory.
    training_bytes, other = model + 3 * trained, model + 2 * trained + 2**30
    if device.type == "cuda":
        # Without a device of their own choice, islands have the GPUs in turn.
        sharing = torch.cuda.device_count() if training.device in ("auto", "cuda") else 1
        on_one = math.ceil(silo.islands / sharing)
        yield _enough("GPU", torch.cuda.mem_get_info(device)[0], training_bytes * on_one)
    else:
        other += training_bytes * (training.processes // training.machines)
    yield _enough("host", psutil.virtual_memory().available, other * silo.islands)


def _enough(name: str, free: int, need: int) -> Finding:
    said = f"{name}: {_size(free)} free, at least {_size(need)} needed before activations"
    if free > need:
        return Finding("memory", "ok", said)
    return Finding(
        "memory", "fail", f"{said}: free some, or take part with a smaller model, or fewer islands"
    )


def _parameters(silo: Silo) -> tuple[int, int]:
    """Return how many parameters the model has, and how many of them are trained."""
    from photon.objective.configured import model_of

    parameters = list(model_of(silo.config, silo.data.manifest.vocab_size, device="meta").parameters())
    trained = (parameter for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters), sum(one.numel() for one in trained)


def _throughput(silo: Silo) -> Iterator[Finding]:
    if not silo.probe:
        return
    config = silo.here[1]
    speed = _tokens_per_second(silo)
    tokens = config.local_steps * config.training.batch_size * silo.data.manifest.sequence_length
    seconds = tokens / speed
    said = (
        f"{speed:,.0f} tokens/s with {config.model.name}; a round's local steps take about {seconds:,.0f} s"
    )
    deadline = config.federation.deadline
    if deadline is not None and seconds > 0.8 * deadline:
        mend = "use a faster device or more of them, or ask for fewer local steps"
        yield Finding("throughput", "warn", f"{said}, and the round ends after {deadline:,.0f} s: {mend}")
    else:
        yield Finding("throughput", "ok", said)


def _tokens_per_second(silo: Silo) -> float:
    """Take a few local steps on the silo's own text, as a round would."""
    from photon.data.loader import BatchStream
    from photon.silo.runtime import runtime_of, trainer

    data, config = silo.data, silo.here[1]
    runtime = runtime_of(config, data.manifest.vocab_size)
    stream = BatchStream(
        {name: [array] for name, array in data.arrays(data.silo_names[0], "train").items()},
        0,
        tokens=data.manifest.sequence_length,
    )
    local = trainer(runtime, config, config.training.batch_size)
    local.train(stream, global_step=0, steps=WARM_UP_STEPS)
    result = local.train(stream, global_step=WARM_UP_STEPS, steps=PROBE_STEPS)
    processes = config.training.processes
    # A group of processes shares the batch; this is one of them.
    return processes * result.tokens / max(result.seconds, 1e-9)


def _size(count: float) -> str:
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


_CONNECTION: Sequence[Check] = (_connection, _certificate, _health, _control, _registration)
_GROUPS: Sequence[Sequence[Check]] = (
    (_versions,),
    _CONNECTION,
    (_key,),
    (_node_config, _data, _tokenizer, _state, _device, _memory, _throughput),
)
#: Where these fail, the rest of their group has nothing to look at.
_PREREQUISITES = {_connection, _certificate, _health, _node_config, _data, _device}
