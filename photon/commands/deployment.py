"""``photon keys`` and ``photon doctor``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon.deployment import keys as key_files
from photon.errors import PhotonError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from photon.deployment.doctor import Finding

keys = typer.Typer(
    name="keys",
    help="Make and show the keys and certificates of a federation.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the keys; made if it is not there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]


@keys.command()
def authority(
    folder: Folder,
    days: Annotated[int, typer.Option(metavar="N", help="Days it is valid.")] = key_files.AUTHORITY_DAYS,
    force: Force = False,
) -> None:
    """Make the authority that signs the aggregator's certificate; silos are given `authority.crt`."""
    _tell(key_files.make_authority(folder, days=days, force=force))


@keys.command()
def server(
    folder: Folder,
    host: Annotated[
        list[str],
        typer.Option(help="Host name or IP address by which silos reach the aggregator; repeat it for more."),
    ],
    days: Annotated[int, typer.Option(metavar="N", help="Days it is valid.")] = key_files.SERVER_DAYS,
    force: Force = False,
) -> None:
    """Make the aggregator's certificate, signed by the authority in DIR.

    photon keys server keys --host aggregator.example.org --host 192.0.2.7
    """
    _tell(key_files.make_server_certificate(folder, host, days=days, force=force))


@keys.command()
def node(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the node.")],
    force: Force = False,
) -> None:
    """Make a node's key pair: NAME stays with the silo, NAME.pub goes to the aggregator."""
    _tell(key_files.make_node_key(folder, name, force=force))


@keys.command()
def show(file: Annotated[Path, typer.Argument(metavar="FILE", help="A certificate or key.")]) -> None:
    """Show subject, hosts, validity and fingerprint of a file; nothing secret."""
    for key, value in key_files.show_key_file(file).items():
        typer.echo(f"{key + ':':<13}{value}")


def _tell(files: list[Path]) -> None:
    for file in files:
        typer.echo(str(file))


def doctor(
    context: typer.Context,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The aggregator.")],
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its authority.crt; none with --insecure.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Connect without TLS.")] = False,
    key: Annotated[
        Path | None,
        typer.Option("--auth-supernode-private-key", metavar="FILE", help="The node's private key."),
    ] = None,
    node_config: Annotated[
        str, typer.Option(metavar="TEXT", help="What the SuperNode gets as --node-config.")
    ] = "",
    run_tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE_OR_HASH", help="The run's tokenizer.json, or its SHA-256."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The run's config.yaml, if you have it.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Take a few local steps to see how fast they are.")] = True,
) -> None:
    """Check a silo before it joins, and say what to mend; exits with 1 when something fails.

    The options are those of `flower-supernode`; arguments are Hydra overrides that describe the run:

        photon doctor --superlink aggregator.example.org:8000 --root-certificates authority.crt
        --auth-supernode-private-key keys/site-a --node-config 'data-dir="/srv/data" state-dir="/srv/state"'
        model=photon-125m local_steps=500
    """
    from rich.console import Console

    from photon.config.compose import compose
    from photon.deployment.doctor import Silo, examine
    from photon.flower_compat import parse_node_config
    from photon.preflight import preflight, preflight_file

    if insecure == (root_certificates is not None):
        raise PhotonError("give either --root-certificates FILE or --insecure")
    overrides = list(context.args)
    silo = Silo(
        superlink=superlink,
        authority=root_certificates,
        key=key,
        node_config=parse_node_config(node_config),
        config=preflight_file(base, overrides)
        if base
        else preflight(compose(["federation=deployment", *overrides])),
        tokenizer=run_tokenizer,
        probe=probe,
    )
    findings = list(examine(silo))
    levels = [finding.level for finding in findings]
    print_findings(Console(), findings)
    if "fail" in levels:
        raise RunError(f"{levels.count('fail')} of {len(levels)} checks failed; mend them and ask again")


def compared(question: str) -> None:
    """Ask whoever sits at a terminal whether two fingerprints are alike; a script has compared them before.

    Raises
    ------
    typer.Abort
        If they are not, or nobody knows.
    """
    if sys.stdin.isatty():
        typer.confirm(question, abort=True)


def print_findings(console: "Console", findings: Sequence["Finding"]) -> None:
    """Print what the doctor found, a row for each check."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    # A hash is of use only as a whole.
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.check, _LEVELS[finding.level], escape(finding.said))
    console.print(table)


_LEVELS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}
