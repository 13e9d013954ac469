"""``photon silo``: take part in a federation with approved code alone, and see what was given to whom."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon.errors import PhotonError

if TYPE_CHECKING:
    from rich.console import Console

    from photon.deployment.approved import ApprovedCode

silo = typer.Typer(
    name="silo",
    help="Run a silo, approve what it runs, and see what it has given.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

State = Annotated[Path, typer.Argument(metavar="STATE_DIR", help="The `state-dir` of the node config.")]


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

    console, approved = Console(soft_wrap=True, markup=False, highlight=False), ApprovedCode(state_dir)
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

    gone = ApprovedCode(state_dir).revoke(sha256)
    typer.echo(f"revoked {gone.sha256} ({gone.app} {gone.version})")


@silo.command()
def status(
    state_dirs: Annotated[
        list[Path], typer.Argument(metavar="STATE_DIR", help="The `state-dir` of one node config or more.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a silo has given to whom, which code it runs, and which policy is in force."""
    import json

    from rich.console import Console

    from photon.deployment.given import silo_status

    found = [silo_status(state) for state in state_dirs]
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


def _print_status(console: "Console", found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"\n{found['state_dir']}")
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
    console.print(table if table.row_count else "nothing was given yet")
    policy, started = found["policy"], found["started"]
    if started is None:
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
