"""Arguments that several commands have, looked at before a command imports for seconds."""

from pathlib import Path
from typing import Annotated

import typer

from photon.errors import PhotonError


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise PhotonError(f"{path}: no such folder; give a run, a checkpoint or an exported model")
    return path


Model = Annotated[
    Path, typer.Argument(help="A run, one of its checkpoints, or an exported model.", callback=_folder)
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of the run.", callback=_folder)]
Export = Annotated[Path, typer.Argument(help="Folder of an exported model.", callback=_folder)]
