"""``photon aggregator``: set up the aggregator of a federation, run it, and let silos take part."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon.errors import RunError

if TYPE_CHECKING:
    from photon.deployment.standing import AggregatorStanding

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
def status(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show whether the aggregator runs, which silos were admitted and are online, and its runs.

    Ends with 1 if the aggregator does not answer or a silo is not online.
    """
    from photon.deployment.aggregator import AggregatorPlace
    from photon.deployment.standing import standing_of

    found = standing_of(AggregatorPlace(folder))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        _print_standing(found)
    if not found.is_well:
        raise typer.Exit(1)


def _print_standing(found: "AggregatorStanding") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from photon.commands.tables import print_whole

    console = Console(soft_wrap=True, highlight=False)
    up = f"running, process {found.process}" if found.process is not None else "not running"
    console.print(f"Aggregator  {found.address}, authority {found.authority}", markup=False)
    console.print(f"Process     {up}; the SuperLink {'answers' if found.answers else 'does not answer'}")
    silos = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("Silo", "Key", "Its node", "Since"):
        silos.add_column(title, no_wrap=True)
    for silo in found.silos:
        silos.add_row(silo.name, silo.fingerprint, silo.standing, silo.since)
    if found.silos:
        print_whole(console, silos)
    else:
        console.print("No silo was admitted yet: photon aggregator admit DIR LINE")
    if found.ejected:
        console.print(f"Kept out    {', '.join(found.ejected)}", markup=False)
    for run in found.runs:
        console.print(f"Run {run.run_id}  {escape(run.status)}, {timedelta(seconds=round(run.seconds))}")


@aggregator.command()
def admit(
    folder: Folder,
    line: Annotated[str, typer.Argument(metavar="LINE", help="What `photon silo init` printed.")],
) -> None:
    """Let a silo take part: its name belongs to the key in its line, and the SuperLink knows that key."""
    from photon.commands.deployment import compared
    from photon.deployment.aggregator import AggregatorPlace
    from photon.deployment.aggregator import admit as let_in
    from photon.deployment.lines import SiloLine

    found = SiloLine.read(line)
    place = AggregatorPlace(folder)
    typer.echo(f"{found.name}, key {found.fingerprint}")
    if not place.public_key(found.name).exists():
        compared(f"Is that the fingerprint that {found.name}'s operator reads to you?")
    typer.echo(let_in(place, found))


@aggregator.command()
def remove(
    folder: Folder, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the silo.")]
) -> None:
    """Turn a silo away from the next round on: its node is unregistered, its key ejected, its name free."""
    from photon.deployment.aggregator import AggregatorPlace
    from photon.deployment.aggregator import remove as turn_away

    typer.echo(turn_away(AggregatorPlace(folder), name))
