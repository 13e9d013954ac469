"""``photon ui``."""

from pathlib import Path
from typing import Annotated

import typer


def ui(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUNS]...",
            help="Folders of runs, or folders that hold some; without any, `runs` here and in Photon's home.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")
    ] = 8765,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Watch runs in a browser, until Ctrl-C.

    The page lists the runs, follows those that are going on, and lays several side by side. It needs no
    account and no network, and only this machine can reach it.

    `photon ui` shows what is in `runs`; `photon ui runs/first` one run; `photon ui runs --port 9000` takes
    another port.

    From elsewhere: `ssh -L 8765:127.0.0.1:8765 MACHINE`, and then open http://127.0.0.1:8765 there.
    To keep or send a page, write it as a file: `photon report RUN --output report.html`.
    """
    from photon.config.folders import photon_home
    from photon.errors import PhotonError
    from photon.ui.server import HOST, listen

    where = runs or [folder for folder in (Path("runs"), photon_home() / "runs") if folder.is_dir()]
    if not where:
        raise PhotonError("no folder `runs` is here; name the folder of a run, or one that holds some")
    with listen(where, port) as server:
        address = f"http://{HOST}:{server.server_port}"
        typer.echo(f"photon ui: {address} (Ctrl-C ends it)")
        if open_:
            typer.launch(address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            typer.echo("")
