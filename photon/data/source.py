"""Where the prepared data of a run lies; it is prepared on first use."""

from pathlib import Path

from photon.config.folders import photon_home
from photon.config.schema import DataSection, ModelSection
from photon.config.training import TrainingSection
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.files.memory import check_batch


def check_path(data: DataSection, *, has_text: bool) -> None:
    """Check that the folder which a run names holds what is read of it, before anything is started or made.

    Silos, or a ServerApp, would say the same one by one, minutes later.

    Parameters
    ----------
    data
        The run's ``data``; one that names no folder passes.
    has_text
        Whether silos of this machine train on it; if not, the aggregator takes its tokenizer alone.

    Raises
    ------
    PhotonError
        If it does not.
    """
    if not data.path:
        return
    path = Path(data.path).absolute()
    if has_text:
        try:
            PreparedData.open(path)
        except PhotonError as error:
            raise PhotonError(f"data.path: {error}") from error
    elif not (path / "tokenizer" / "tokenizer.json").is_file():
        raise PhotonError(
            f"data.path: {path / 'tokenizer' / 'tokenizer.json'} is missing; name prepared data that has the "
            "silos' tokenizer, or leave data.path out: then nothing is exported here"
        )


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
        check_path(data, has_text=True)
        return Path(data.path).absolute()
    if data.source == "hub":
        from photon.data.hub import ensure_hub

        return ensure_hub(photon_home(), data, sequence_length, seed)
    from photon.data.embedded import ensure_embedded

    return ensure_embedded(photon_home(), sequence_length=sequence_length, vocab_size=data.vocab_size)


def check_steps(path: Path, training: TrainingSection, model: ModelSection) -> None:
    """Check that a step on prepared data fits this machine's memory, before each silo says so in a round.

    Raises
    ------
    PhotonError
        If it does not.
    """
    prepared = PreparedData.reopen(path).manifest
    check_batch(
        training.batch_size,
        training.micro_batch_size,
        length=prepared.sequence_length,
        vocabulary=model.vocab_size or prepared.vocab_size,
    )
