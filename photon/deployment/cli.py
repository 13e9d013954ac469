"""``photon keys``: the keys and certificates of a federation."""

from pathlib import Path
from typing import Annotated

import typer

from photon.deployment import keys as key_files

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
