"""``photon federation``: look at a federation before it trains, and decide who belongs to it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from photon.config.folders import photon_home
from photon.config.tree import TreeNode
from photon.errors import PhotonError, printable

federation = typer.Typer(
    name="federation",
    help="Look at federations of federations, and decide whose name a silo's name is.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@federation.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def show(context: typer.Context) -> None:
    """Draw the tree of a configuration, with what each node decides for itself.

    Arguments are Hydra overrides, as for `photon train`:

    photon federation show 'federation.tree={north:[silo_a,silo_b],south:[silo_c]}'
    """
    from photon.config.compose import compose
    from photon.errors import PhotonError
    from photon.preflight import preflight
    from photon.telemetry.summary import counted

    config = preflight(compose(context.args))
    root = config.federation.root
    if root is None:
        raise PhotonError("federation.tree: not set, so there are silos alone; give it a tree or a YAML file")
    console = Console(soft_wrap=True)
    tree = Tree(f"[bold]{root.name}[/]  {counted(config.rounds, 'round')}, {_steps(config.total_steps)}")
    _draw(root, tree)
    console.print(tree)
    silos = [node for node in root.walk() if node.is_silo]
    federations = sum(not node.is_silo for node in root.walk())
    console.print(f"{counted(len(silos), 'silo')}, {counted(federations, 'federation')}")


def _draw(node: TreeNode, branch: Tree) -> None:
    for child in node.children:
        _draw(child, branch.add(f"{'' if child.is_silo else '[bold]'}{child.name}{_rules(child)}"))
    if node.data is not None:
        branch.add(f"{escape(printable(node.data))}  [dim]text of {node.name} itself[/]")


def _rules(node: TreeNode) -> str:
    settings = node.model_dump(exclude={"name", "children", "data"}, exclude_none=True)
    rules = ", ".join(f"{key} {_plain(value)}" for key, value in settings.items())
    return f"[/]  [dim]{rules}[/]" if rules else "[/]" if not node.is_silo else ""


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(inner)}" for key, inner in value.items())
    return str(value)


def _steps(steps: int) -> str:
    return f"{steps:,} local steps of its busiest silo"


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the silo, as its data has it.")]


@federation.command()
def admit(
    name: Name,
    key: Annotated[
        Path, typer.Argument(metavar="KEY", help="Its public key, NAME.pub of `photon keys node`.")
    ],
) -> None:
    """Let a silo's name belong to a node key: no other node is given that silo's requests.

    Run it on the aggregator's machine, before or after `flwr supernode register`. A name that was not
    admitted belongs to the key with which it is first seen in a run.
    """
    from photon.federation.names import ADMITTED, fingerprint_of
    from photon.federation.names import admit as let_in

    try:
        fingerprint = fingerprint_of(key.read_bytes())
    except (OSError, PhotonError) as error:
        raise PhotonError(f"{key}: {error}") from error
    let_in(photon_home() / ADMITTED, name, fingerprint)
    typer.echo(f"{name} belongs to {fingerprint}")


@federation.command()
def eject(name: Name) -> None:
    """Keep the node key of a silo out of all runs from the next round on; its name is free again."""
    from photon.federation.names import ADMITTED
    from photon.federation.names import eject as keep_out

    fingerprint = keep_out(photon_home() / ADMITTED, name)
    typer.echo(f"{fingerprint} stays out; `flwr supernode unregister` also closes the SuperLink to it")
