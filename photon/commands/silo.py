"""``photon silo``: join a federation with approved code alone, see what was given to whom, and leave."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon.errors import PhotonError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from photon.deployment.approved import ApprovedCode
    from photon.deployment.joining import SiloPlace

silo = typer.Typer(
    name="silo",
    help="Set up a silo, join a federation, approve what runs, see what was given, and leave.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The silo's folder.")]
State = Annotated[
    Path,
    typer.Argument(metavar="STATE_DIR", help="The `state-dir` of the node config, or the silo's folder."),
]


@silo.command()
def init(
    folder: Folder,
    name: Annotated[str | None, typer.Option(help="What the silo is called, in its data and by all.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Its prepared data. Default: `data` in the folder.")
    ] = None,
    node_config: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the node config says beside data, state and policy."),
    ] = None,
) -> None:
    """Write key pair, policy, environment and unit, and print the line for the aggregator.

    What is there already stays as it is.

    photon silo init /srv/photon/hospital --name hospital
    """
    from photon.deployment.joining import init as write

    place, said = write(folder, name, data, node_config)
    typer.echo(said)
    _tell_line(place)
    typer.echo(
        "\nNext: prepare the text with the aggregator's tokenizer; when it has admitted this line, join:"
    )
    typer.echo(
        f"photon data prepare --output {place.data} --silo {place.settings.name}=TEXT "
        "--tokenizer tokenizer.json"
    )
    typer.echo(f"photon silo join {place.folder} LINE    with the line of the aggregator")


@silo.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def join(
    context: typer.Context,
    folder: Folder,
    line: Annotated[
        str | None,
        typer.Argument(metavar="[LINE]", help="What `photon aggregator init` printed. Default: as before."),
    ] = None,
    run_tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE_OR_HASH", help="The run's tokenizer.json, or its SHA-256."),
    ] = None,
    probe: Annotated[bool, typer.Option(help="Take a few local steps to see how fast they are.")] = False,
    start: Annotated[bool, typer.Option(help="Start the silo when the checks have passed.")] = True,
) -> None:
    """Check a silo as `photon doctor` does, and take part in the foreground, until Ctrl-C.

    Further arguments are Hydra overrides that say what is known of the run:

    photon silo join /srv/photon/hospital photon-aggregator-1.… model=photon-125m
    """
    from rich.console import Console

    from photon.commands.deployment import compared, print_findings
    from photon.config.compose import compose
    from photon.deployment import joining
    from photon.deployment.lines import AggregatorLine
    from photon.deployment.place import refuse_second
    from photon.preflight import preflight

    if str(folder).startswith("photon-"):
        raise PhotonError("the folder comes before the line: photon silo join DIR LINE")
    overrides = list(context.args)
    if line is not None and "=" in line:
        overrides.insert(0, line)
        line = None
    place = joining.SiloPlace(folder)
    refuse_second(place.folder, "the silo")
    known = place.aggregator
    told = AggregatorLine.read(line) if line is not None else known
    if told is not None:
        typer.echo(f"aggregator {told.address}, authority {told.fingerprint}")
    if known is None and told is not None:
        compared("Is that the fingerprint that the aggregator's operator reads to you?")
    aggregator = joining.join(place, line)
    config = preflight(compose(joining.known_of(place, overrides)))
    findings = list(joining.check(place, aggregator, config, run_tokenizer, probe=probe))
    print_findings(Console(), findings)
    failed = [finding.check for finding in findings if finding.level == "fail"]
    if "registration" in failed:
        _tell_line(place)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(findings)} checks failed ({', '.join(failed)}); mend them and join again"
        )
    if start:
        joining.become_silo(place, aggregator)


@silo.command()
def leave(folder: Folder) -> None:
    """Stop what `join` has started, forget the aggregator, and say what is left on the disk."""
    from photon.deployment import joining

    for said in joining.leave(joining.SiloPlace(folder)):
        typer.echo(said)


def _connection(folder: Path) -> dict[str, Any] | None:
    """Return how a silo stands with its aggregator; None of a state folder alone."""
    from photon.config.compose import compose
    from photon.deployment.joining import SiloPlace, connection, is_silo

    return connection(SiloPlace(folder), compose(["federation=deployment"])) if is_silo(folder) else None


def _tell_line(place: "SiloPlace") -> None:
    line = place.line()
    typer.echo(f"{line.name}, key {line.fingerprint}")
    typer.echo(
        "Send this line to the aggregator's operator, and read the fingerprint over another channel:\n"
    )
    typer.echo(line.line())


@silo.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    node_config: Annotated[
        str, typer.Option(metavar="TEXT", help="What the operator sets; needs a `state-dir`.")
    ],
) -> None:
    """Start a SuperNode that runs this very Photon, and of what runs bring only what you have approved.

    All options of `flower-supernode` are passed on:

    photon silo run --superlink aggregator.example.org:8000 --root-certificates authority.crt
    --auth-supernode-private-key keys/hospital --node-config 'data-dir="/srv/data" state-dir="/srv/state"'
    """
    from photon.deployment.guard import become_supernode
    from photon.flower_compat import parse_node_config

    # The rest of it is judged by `photon doctor`, and by whoever answers a message.
    state = parse_node_config(node_config).get("state-dir")
    if not isinstance(state, str):
        raise PhotonError("--node-config: state-dir is not set; what the silo approves is kept there")
    become_supernode(list(context.args), node_config, Path(state))


@silo.command()
def approve(
    state_dir: State,
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE",
            help="A .fab that the aggregator gave, or an app's folder. Default: what was refused last.",
        ),
    ] = None,
    note: Annotated[str, typer.Option(help="A word to keep with it.")] = "",
    diff: Annotated[bool, typer.Option("--diff", help="Show every changed line.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show what an application would change, and let the silo run it from now on.

    It is compared with the application of that name that was approved last, or with this Photon.
    """
    from rich.console import Console

    from photon.deployment.approved import ApprovedCode
    from photon.deployment.bundle import Bundle, changes, difference
    from photon.deployment.guard import own_bundle
    from photon.deployment.joining import state_of

    console = Console(soft_wrap=True, markup=False, highlight=False)
    approved = ApprovedCode(state_of(state_dir))
    content = _content(approved, bundle)
    new = Bundle.read(content)
    own = own_bundle(approved)
    if new.sha256 == own.sha256:
        console.print(f"{new.sha256} is this very Photon, which needs no approval")
        return
    if any(one.sha256 == new.sha256 for one in approved.approvals()):
        console.print(f"{new.sha256} is approved already")
        return
    before = approved.baseline(new.app)
    than, files = f"this Photon {own.version}", dict(own.files)
    if before is not None:
        than, files = f"{before[0].app} {before[0].version}, approved {before[0].date}", before[1]
    console.print(f"{new.app} {new.version}, SHA-256 {new.sha256}\nagainst {than}:")
    for change in changes(files, dict(new.files)):
        console.print(f"  {change.kind:<8} {change.path}  +{change.more} -{change.less}")
    for line in difference(files, new.files) if diff else ():
        console.print(line)
    if not yes:
        typer.confirm("Let this silo run it?", abort=True)
    approved.approve(content, note)
    console.print(f"approved {new.sha256}")


@silo.command()
def revoke(
    state_dir: State,
    sha256: Annotated[str, typer.Argument(metavar="SHA256", help="The SHA-256, or its beginning.")],
) -> None:
    """Take an approval back; it holds from the next message on."""
    from photon.deployment.approved import ApprovedCode
    from photon.deployment.joining import state_of

    gone = ApprovedCode(state_of(state_dir)).revoke(sha256)
    typer.echo(f"revoked {gone.sha256} ({gone.app} {gone.version})")


@silo.command()
def status(
    state_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="STATE_DIR", help="The `state-dir` of one node config or more, or the silo's folder."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a silo has given to whom, which code it runs, and which policy is in force.

    Of a silo's folder also whether it runs, and how it stands with its aggregator.
    """
    import json

    from rich.console import Console

    from photon.deployment.given import silo_status
    from photon.deployment.joining import state_of

    found = [silo_status(state_of(folder)) | {"connection": _connection(folder)} for folder in state_dirs]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for one in found:
        _print_status(console, one)


def _content(approved: "ApprovedCode", bundle: Path | None) -> bytes:
    """Return the bundle to approve, read once."""
    from photon.deployment.bundle import LARGEST
    from photon.flower_compat import build_bundle

    if bundle is None:
        bundle = next(iter(approved.refused()), None)
        if bundle is None:
            raise PhotonError(f"{approved.folder}: nothing was refused there; name a .fab or an app's folder")
    if bundle.is_dir():
        return build_bundle(bundle)
    try:
        with open(bundle, "rb") as file:
            return file.read(LARGEST + 1)
    except OSError as error:
        raise PhotonError(f"{bundle}: it cannot be read ({error.strerror})") from error


def _print_connection(console: "Console", found: dict[str, Any]) -> None:
    process = found["process"]
    console.print(f"Silo        {found['name']}, key {found['fingerprint']}")
    console.print(f"Process     {'not running' if process is None else f'running, {process}'}")
    if found["aggregator"] is None:
        console.print("Aggregator  none was joined")
        return
    console.print(f"Aggregator  {found['aggregator']}, authority {found['authority']}")
    for one in found["checks"]:
        console.print(f"            {one['check']}: {one['level']}, {one['said']}")


def _print_status(console: "Console", found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from photon.commands.tables import print_whole

    console.print(f"\n{found['state_dir']}")
    if found["connection"] is not None:
        _print_connection(console, found["connection"])
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("Silo", "Run", "Tokens", "Updates", "Last active"):
        table.add_column(title, justify="right" if title in {"Tokens", "Updates"} else "left", no_wrap=True)
    for name, silo_found in found["silos"].items():
        uses = silo_found["runs"]
        total = [sum(use[key] for use in uses.values()) for key in ("tokens", "releases")]
        rows = [(run, use["tokens"], use["releases"], "") for run, use in uses.items()]
        for run_name, tokens, releases, last in [*rows, ("all", *total, silo_found["last_active"])]:
            # A run's name is the aggregator's word.
            table.add_row(name, Text(ascii(run_name)[1:-1]), f"{tokens:,}", f"{releases:,}", last)
    if table.row_count:
        print_whole(console, table)
    else:
        console.print("nothing was given yet")
    policy, started = found["policy"], found["started"]
    if started is None and found["connection"] is not None and found["connection"]["process"] is None:
        console.print("Code    not started yet; the policy is read at each start")
    elif started is None:
        console.print("Code    not started with photon silo run: policy unknown, and any code may run")
    else:
        rules = ", ".join(f"{rule}={value}" for rule, value in policy["rules"].items())
        console.print(f"Policy  {policy['file'] or 'none'}: {rules or 'everything is accepted'}")
        console.print(f"Code    this Photon {started['own']['version']}, {started['own']['sha256']}")
    for one in found["approved"]:
        console.print(
            f"        {one['app']} {one['version']}, {one['sha256']}, approved {one['date']} {one['note']}"
        )
    for sha256, when in found["refused"].items():
        console.print(f"Refused {sha256}, last {when}")
