"""``photon aggregator``: set up the aggregator of a federation, run it, and let silos take part."""

from pathlib import Path
from typing import Annotated

import typer

from photon.errors import RunError

aggregator = typer.Typer(
    name="aggregator",
    help="Set up an aggregator in a folder, run it, and let silos take part.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The aggregator's folder.")]


@aggregator.command()
def init(
    folder: Folder,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name or IP address by which silos reach this machine; the first is the one that they "
            "are told. Default: the machine's own name."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65534, help="Where silos connect. Default: 8000.")
    ] = None,
    proxy: Annotated[
        bool | None,
        typer.Option(
            "--proxy/--no-proxy",
            help="Put nginx before the SuperLink, for what silos may reach. Default: if other machines can "
            "connect.",
        ),
    ] = None,
) -> None:
    """Write keys, certificate, connection, proxy and unit, and print the line for silos.

    What is there already stays as it is.

    photon aggregator init /srv/photon/aggregator --host aggregator.example.org
    """
    from photon.deployment.aggregator import init as write

    place, said = write(folder, host or [], port, proxy)
    line = place.line()
    typer.echo(said)
    typer.echo(f"silos connect to {line.address}; authority {line.fingerprint}")
    typer.echo("Read that fingerprint to each silo's operator over another channel, and send this line:\n")
    typer.echo(line.line())
    typer.echo("\nNext: give each silo the tokenizer.json that its text is prepared with, and type")
    typer.echo(f"photon aggregator admit {place.folder} LINE    for the line of each silo")
    typer.echo(f"photon aggregator up {place.folder}")


@aggregator.command()
def up(folder: Folder) -> None:
    """Check and run the aggregator, until Ctrl-C; every command of Flower is shown before it runs."""
    from rich.console import Console

    from photon.commands.deployment import print_findings
    from photon.deployment.aggregator import AggregatorPlace, check
    from photon.deployment.aggregator import up as run
    from photon.deployment.place import refuse_second

    place = AggregatorPlace(folder)
    refuse_second(place.folder, "the aggregator")
    findings = list(check(place))
    print_findings(Console(), findings)
    if failed := sum(finding.level == "fail" for finding in findings):
        raise RunError(f"{failed} of {len(findings)} checks failed; mend them and start it again")
    run(place)


@aggregator.command()
def admit(
    folder: Folder,
    line: Annotated[str, typer.Argument(metavar="LINE", help="What `photon silo init` printed.")],
) -> None:
    """Let a silo take part: its name belongs to the key in its line, and the SuperLink knows that key."""
    from photon.deployment.aggregator import AggregatorPlace
    from photon.deployment.aggregator import admit as let_in
    from photon.deployment.lines import SiloLine

    found = SiloLine.read(line)
    typer.echo(f"{found.name}, key {found.fingerprint}: compare it with what its operator reads to you")
    typer.echo(let_in(AggregatorPlace(folder), found))


@aggregator.command()
def remove(
    folder: Folder, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the silo.")]
) -> None:
    """Turn a silo away from the next round on: its node is unregistered, its key ejected, its name free."""
    from photon.deployment.aggregator import AggregatorPlace
    from photon.deployment.aggregator import remove as turn_away

    typer.echo(turn_away(AggregatorPlace(folder), name))
