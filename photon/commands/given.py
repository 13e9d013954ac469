"""Arguments that several commands have, looked at before a command imports for seconds."""

from pathlib import Path
from typing import Annotated

import typer

from photon.config import schema
from photon.evaluation.folder import check_folder

#: Largest seed that random numbers are drawn from.
LARGEST_SEED = schema.LARGEST_SEED


def _model(path: Path) -> Path:
    return check_folder(path)


def _export(path: Path) -> Path:
    return check_folder(path, "an exported model")


Model = Annotated[
    Path, typer.Argument(help="A run, one of its checkpoints, or an exported model.", callback=_model)
]
RunFolder = Annotated[Path, typer.Argument(help="Folder of the run.", callback=_model)]
Export = Annotated[Path, typer.Argument(help="Folder of an exported model.", callback=_export)]
