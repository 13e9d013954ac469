"""``photon silo machine``: be another machine of a silo that trains on several.

It adds itself to the group of ``silo``, which the command line takes from here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon.commands.silo import silo
from photon.errors import PhotonError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


@silo.command()
def machine(
    rendezvous: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Where the silo's first machine waits for the others.")
    ],
    number: Annotated[int, typer.Option("--machine", min=1, help="Which machine this is; the first is 0.")],
    below: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder that all jobs are in: the silo's state, on a shared disk."),
    ],
) -> None:
    """Be another machine of a silo, until you stop it: train together with the one that runs the SuperNode.

    The silo's node config has `processes` of all machines together, `machines`, and the same `rendezvous`.
    The machines share the folders of the silo's state and of its data. Nothing that meets there is
    authenticated: it belongs into the silo's own network.

    photon silo machine 10.0.0.1:29500 --machine 1 --below /srv/photon/hospital/state
    """
    from photon.code import command
    from photon.training.devices import machine_group
    from photon.training.machines import Machines, serve_machine

    if not below.is_dir():
        raise PhotonError(f"--below {below}: no such folder")

    def work(machines: Machines) -> "AbstractContextManager[Callable[[Path], None]]":
        return machine_group(machines, number, below, command("photon.silo.group_process"))

    serve_machine(rendezvous, number, below, work, typer.echo)
