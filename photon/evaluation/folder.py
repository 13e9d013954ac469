"""The folder that a model is in; nothing heavy is imported, so that a command can look at once."""

from pathlib import Path

from photon.errors import PhotonError

#: What most commands take.
ANY = "a run, a checkpoint or an exported model"


def check_folder(path: Path, what: str = ANY) -> Path:
    """Return the folder that was given for ``what``.

    Raises
    ------
    PhotonError
        If it is not there.
    """
    if not path.is_dir():
        raise PhotonError(f"{path}: no such folder; give {what}")
    return path
