"""Where the prepared data of a run lies; it is prepared on first use."""

from pathlib import Path

from photon.config.folders import photon_home
from photon.config.schema import DataSection
from photon.data.prepared import PreparedData
from photon.errors import PhotonError


def prepared_path(data: DataSection, sequence_length: int, seed: int) -> Path:
    """Return the folder of prepared data that a run names, or make that of the embedded or hub text.

    Parameters
    ----------
    data
        The run's ``data``.
    sequence_length
        Tokens of a window.
    seed
        Of the run; it splits text of the hub.

    Raises
    ------
    PhotonError
        If the folder holds no prepared data, or text cannot be prepared.
    """
    if data.path:
        path = Path(data.path).absolute()
        # Before a process is started for the run: silos would say the same one by one, minutes later.
        try:
            PreparedData.open(path)
        except PhotonError as error:
            raise PhotonError(f"data.path: {error}") from error
        return path
    if data.source == "hub":
        from photon.data.hub import ensure_hub

        return ensure_hub(photon_home(), data, sequence_length, seed)
    from photon.data.embedded import ensure_embedded

    return ensure_embedded(photon_home(), sequence_length=sequence_length, vocab_size=data.vocab_size)
