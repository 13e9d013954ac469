"""A silo in a folder: ``photon silo init``, ``join``, ``status`` and ``leave``.

::

    DIR/silo.json           its name, what else its operator has decided (class Silo)
    DIR/aggregator.line     the line of the aggregator that it has joined; gone after leave
    DIR/flower.env          environment of terminals and services
    DIR/keys/               node, node.pub, authority.crt
    DIR/policy.yaml         what it accepts
    DIR/data/ DIR/state/ DIR/flower/ DIR/systemd/
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from photon.config.schema import RunConfig
from photon.config.tree import SILO_NAME
from photon.deployment import keys as key_files
from photon.deployment.lines import LONGEST, AggregatorLine, SiloLine
from photon.deployment.place import (
    AGGREGATOR_FILE,
    ENVIRONMENT,
    SILO_FILE,
    Place,
    check_as_noted,
    claim,
    environment_file,
    environment_of,
    place_of,
    read_settings_file,
    running,
    unit,
)
from photon.deployment.superlink import say_command
from photon.engine.processes import free_port, stop_tree
from photon.errors import PhotonError, printable
from photon.files.atomic import write_bytes, write_text

if TYPE_CHECKING:
    from photon.deployment.doctor import Finding

JOINED = "aggregator.line"
#: What Photon itself says in the node config of a silo in a folder.
_OWN = ("data-dir", "state-dir", "policy")
_LOCAL = "127.0.0.1"


class Silo(BaseModel):
    """What a silo's operator has decided when it was made.

    Attributes
    ----------
    name
        The silo's name, as its data has it.
    data
        Its prepared data; in the folder, or elsewhere.
    node_config
        What the node config says beside data, state and policy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=SILO_NAME)
    data: Path = Path("data")
    node_config: str = Field("", max_length=10_000)


class SiloPlace:
    """A silo's folder, after ``init``.

    Parameters
    ----------
    folder
        The folder.

    Raises
    ------
    PhotonError
        If it holds no silo.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = place_of(folder, AGGREGATOR_FILE)
        init = f"photon silo init {self.folder} --name NAME"
        self.settings = read_settings_file(self.folder, SILO_FILE, Silo, init)
        self.key = self.folder / "keys" / "node"
        self.authority = self.folder / "keys" / "authority.crt"
        self.state = self.folder / "state"
        self.data = self.folder / self.settings.data

    @property
    def node_config(self) -> str:
        """Return what the SuperNode gets as ``--node-config``."""
        policy = self.folder / "policy.yaml"
        own = f'data-dir="{self.data}" state-dir="{self.state}" policy="{policy}"'
        return f"{own} {self.settings.node_config}".strip()

    @property
    def aggregator(self) -> AggregatorLine | None:
        """Return the aggregator that was joined; None: none, or the silo has left it."""
        file = self.folder / JOINED
        try:
            return AggregatorLine.read(file.read_text(errors="replace")[: 2 * LONGEST])
        except FileNotFoundError:
            return None
        except PhotonError as error:
            raise PhotonError(f"{file}: {error}; remove it and join with the aggregator's line") from None

    def line(self) -> SiloLine:
        """Return the line for the aggregator."""
        public = self.folder / "keys" / "node.pub"
        try:
            kind, key = public.read_text().split()[:2]
            return SiloLine(name=self.settings.name, key=f"{kind} {key}")
        except (OSError, ValueError):
            raise PhotonError(
                f"{public}: no public key; put it back, or remove keys/ and init again"
            ) from None

    def options(self, aggregator: AggregatorLine, port: int) -> list[str]:
        """Return the options of ``flower-supernode`` but for the node config."""
        return [
            *("--superlink", aggregator.address, "--root-certificates", str(self.authority)),
            *("--auth-supernode-private-key", str(self.key), "--host", _LOCAL, "--port", str(port)),
        ]


def init(folder: Path, name: str | None, data: Path | None, node_config: str | None) -> tuple[SiloPlace, str]:
    """Write all that a silo needs, or what is missing of it.

    Parameters
    ----------
    name
        The silo's name; None: as noted.
    data
        Its prepared data; None: as noted, or ``data/`` in the folder.
    node_config
        What the node config says beside data, state and policy; None: as noted, or nothing.

    Returns
    -------
    tuple
        The folder, and what was done, in a line.

    Raises
    ------
    PhotonError
        If something that is given is wrong, or differs from what was noted.
    """
    folder = place_of(folder, AGGREGATOR_FILE)
    chosen = _chosen(folder, name, data, node_config)
    place = Place(folder)
    place.file(SILO_FILE, chosen.model_dump_json(indent=1) + "\n")
    place.directory("keys", lambda beside: key_files.make_node_key(beside, "node"))
    place.file("policy.yaml", policy_file())
    place.file(ENVIRONMENT, environment_file(environment_of(folder)))
    for empty in ("flower", "state"):
        place.empty(empty)
    photon = str(Path(sys.executable).parent / "photon")
    text = unit(f"Photon silo {chosen.name}", folder, [photon, "silo", "join", str(folder)])
    place.file("systemd/photon-silo.service", text)
    return SiloPlace(folder), place.report()


def _chosen(folder: Path, name: str | None, data: Path | None, node_config: str | None) -> Silo:
    if data is not None:
        data = place_of(data, AGGREGATOR_FILE)
    if (folder / SILO_FILE).exists():
        noted = read_settings_file(folder, SILO_FILE, Silo, "photon silo init")
        options = (
            ("--name", name, noted.name),
            ("--data", data, noted.data),
            ("--node-config", node_config, noted.node_config),
        )
        check_as_noted(folder, options, f"; change it in {SILO_FILE}, or choose another folder")
        return noted
    if name is None:
        raise PhotonError("--name: say what the silo is called; no other silo may be called so")
    if not re.fullmatch(SILO_NAME, name):
        raise PhotonError(f"--name {printable(name)[:80]}: use letters, digits, '-', '_', '+' and '.'")
    _check_node_config(node_config or "")
    return Silo(name=name, data=data or Path("data"), node_config=node_config or "")


def _check_node_config(text: str) -> None:
    from photon.flower_compat import parse_node_config
    from photon.silo.site import read_settings

    if not text:
        return
    settings = parse_node_config(text)
    for key in settings:
        if key in _OWN:
            raise PhotonError(f"--node-config: {key} is set by the folder; leave it out")
    if "federation" in settings:
        raise PhotonError("--node-config: a gateway is started with `photon silo run`; see docs/worldlm.md")
    read_settings(settings)


def policy_file() -> str:
    """Return a policy with every rule, each as it is without a line of its own, and what it means."""
    import textwrap

    import yaml

    from photon.silo.policy import SiloPolicy

    lines = [
        "# What this silo accepts. It is read for every message, so a change holds from the next one on.",
        "# A rule that stands here as a comment has the value shown. Take the # away to set it.",
        "# docs/silo.md says how each one is judged.",
        "",
    ]
    defaults = SiloPolicy()
    active = ("min_round_windows", "chosen_positions")
    for rule, field in SiloPolicy.model_fields.items():
        value = yaml.safe_dump({rule: getattr(defaults, rule)}).strip()
        lines += textwrap.wrap(str(field.description), 104, initial_indent="# ", subsequent_indent="# ")
        lines += [value if rule in active else f"#{value}", ""]
    return "\n".join(lines[:-1]) + "\n"


def join(place: SiloPlace, line: str | None) -> AggregatorLine:
    """Note which aggregator the silo takes part at, and return it.

    Parameters
    ----------
    line
        The aggregator's line; None: the one that was noted.

    Raises
    ------
    PhotonError
        If there is none, or the silo takes part at another one.
    """
    before = place.aggregator
    if line is None:
        if before is None:
            raise PhotonError(
                f"{place.folder}: no aggregator was joined; give the line that `photon aggregator init` "
                "printed"
            )
        aggregator = before
    else:
        aggregator = AggregatorLine.read(line)
        if before is not None and before != aggregator:
            raise PhotonError(
                f"{place.folder}: the silo has joined {before.address}, authority {before.fingerprint}; "
                f"photon silo leave {place.folder} first"
            )
    try:
        if not place.authority.exists() or place.authority.read_bytes() != aggregator.certificate():
            write_bytes(place.authority, aggregator.certificate(), mode=0o644)
        if before is None:
            write_text(place.folder / JOINED, aggregator.line() + "\n")
    except OSError as error:
        raise PhotonError(f"{place.folder}: cannot be written ({error.strerror})") from None
    return aggregator


def known_of(place: SiloPlace, overrides: Sequence[str]) -> list[str]:
    """Return overrides that describe the run; where nothing is known of it, windows of any length fit."""
    from photon.data.prepared import PreparedData, is_prepared

    if overrides or not is_prepared(place.data):
        return ["federation=deployment", *overrides]
    length = PreparedData.open(place.data).manifest.sequence_length
    return ["federation=deployment", f"model.sequence_length={length}"]


def check(
    place: SiloPlace, aggregator: AggregatorLine, config: RunConfig, tokenizer: str | None, *, probe: bool
) -> "Iterator[Finding]":
    """Yield what the doctor finds, and whether the data is of the silo that is to join.

    Parameters
    ----------
    config
        The run's configuration, as far as it is known.
    tokenizer
        SHA-256 of the run's tokenizer, or the file; None: not known.
    probe
        Whether to take a few local steps.
    """
    from photon.data.prepared import PreparedData, is_prepared
    from photon.deployment import doctor
    from photon.flower_compat import parse_node_config

    if is_prepared(place.data):
        names = PreparedData.open(place.data).silo_names
        if place.settings.name not in names:
            own = place.settings.name
            said = (
                f"{place.data} is of {', '.join(names)}, and the aggregator is told of {own}: init with "
                f"--name {names[0]}, or prepare the data with --silo {own}=TEXT"
            )
            yield doctor.Finding("name", "fail", said)
    yield from doctor.examine(
        doctor.Silo(
            superlink=aggregator.address,
            authority=place.authority,
            key=place.key,
            node_config=parse_node_config(place.node_config),
            config=config,
            tokenizer=tokenizer,
            probe=probe,
        )
    )


def become_silo(place: SiloPlace, aggregator: AggregatorLine) -> NoReturn:
    """Let this process become the silo's SuperNode, in the foreground, and note that it is.

    Raises
    ------
    PhotonError
        If the silo is running already.
    """
    from photon.deployment.guard import become_supernode

    claim(place.folder, "the silo")
    os.environ.update(environment_of(place.folder))
    os.umask(0o077)
    # For the programs that it starts; silos that start at the same moment must not take the same one.
    options = place.options(aggregator, free_port())
    say_command(
        place.folder / "flower",
        ["photon", "silo", "run", *options, "--node-config", place.node_config],
    )
    print("that is flower-supernode with these options, and approved code alone; Ctrl-C ends it", flush=True)
    become_supernode(options, place.node_config, place.state)


def connection(place: SiloPlace, config: RunConfig) -> dict[str, Any]:
    """Return how the silo stands with its aggregator.

    Parameters
    ----------
    config
        Of any run; nothing of it is looked at.

    Returns
    -------
    dict
        ``name``, ``fingerprint`` of its key, ``aggregator`` and ``authority`` (None: not joined),
        ``process`` (None: not running) and ``checks``: what was found, each with ``check``, ``level`` and
        ``said``.
    """
    aggregator, process = place.aggregator, running(place.folder)
    found: list[dict[str, str]] = []
    if aggregator is not None:
        from photon.deployment import doctor

        silo = doctor.Silo(
            superlink=aggregator.address,
            authority=place.authority,
            key=place.key,
            node_config={},
            config=config,
            tokenizer=None,
            probe=False,
        )
        found = [vars(one) for one in doctor.examine_connection(silo)]
    return {
        "name": place.settings.name,
        "fingerprint": place.line().fingerprint,
        "aggregator": None if aggregator is None else aggregator.address,
        "authority": None if aggregator is None else aggregator.fingerprint,
        "process": None if process is None else process.pid,
        "checks": found,
    }


def leave(place: SiloPlace) -> Iterator[str]:
    """Stop what ``join`` started, and forget the aggregator; yield lines that say what was done.

    Raises
    ------
    PhotonError
        If the process is another user's.
    """
    aggregator, process = place.aggregator, running(place.folder)
    # First: a service that starts it again is refused then.
    (place.folder / JOINED).unlink(missing_ok=True)
    if process is None:
        yield "the silo was not running"
    elif process.uids().real != os.getuid():
        raise PhotonError(
            f"{place.folder}: process {process.pid} is of another user; leave as "
            f"{printable(process.username())}"
        )
    else:
        stop_tree(process, at_once=False, patience=15.0)
        yield f"stopped process {process.pid} and what it had started"
    if aggregator is None:
        yield "no aggregator was joined"
    else:
        name = place.settings.name
        yield (
            f"left {aggregator.address}; only the aggregator can end the registration of a node key: ask its "
            f"operator for `photon aggregator remove DIR {name}`"
        )
    there = [name for name in ("keys", "policy.yaml", "data", "state") if (place.folder / name).exists()]
    yield f"still in {place.folder}: {', '.join(there)}; remove them yourself when nobody needs them any more"
    yield "what was learnt from the silo's text in earlier rounds is in the model and stays there"


def state_of(folder: Path) -> Path:
    """Return the state folder of a silo, given that or the folder of ``photon silo init``."""
    return SiloPlace(folder).state if is_silo(folder) else folder


def is_silo(folder: Path) -> bool:
    """Tell whether a folder is one of ``photon silo init``."""
    return (folder / SILO_FILE).is_file()
