"""Find and open trained models: a run, one of its checkpoints, or a Hugging Face folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from photon.config.compose import load
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.errors import PhotonError, printable
from photon.evaluation.folder import check_folder
from photon.state.checkpoint import Checkpoint, CheckpointStore, check_seal, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainedModel:
    """A model on the CPU, in float32, and what it was trained with.

    Attributes
    ----------
    model
        The model.
    name
        Where it comes from, in words.
    tokenizer_sha256
        SHA-256 of the ``tokenizer.json`` it was trained with.
    tokenizer_file
        That file, where the folder holds it.
    """

    model: "PreTrainedModel"
    name: str
    tokenizer_sha256: str
    tokenizer_file: Path | None


def open_trained(path: Path) -> TrainedModel:
    """Open a checkpoint folder, a run (its newest checkpoint) or a Hugging Face folder.

    Raises
    ------
    PhotonError
        If ``path`` is none of them, or is damaged.
    """
    if (path / "config.json").is_file():
        return _open_folder(path)
    checkpoint, config = open_run_checkpoint(path)
    from photon.models.build import build_model
    from photon.objective.configured import plain_params
    from photon.strategy.base import strategy_of
    from photon.training.groups import write_params

    state = checkpoint.state
    model = build_model(config.model, state.vocab_size, seed=config.seed)
    write_params(model, plain_params(config, state.vocab_size, strategy_of(config).exported(checkpoint)))
    return TrainedModel(model, f"{config.model.name}, round {state.round}", state.tokenizer_sha256, None)


def open_run_checkpoint(path: Path) -> tuple[Checkpoint, RunConfig]:
    """Open the checkpoint that ``path`` is, or the newest one of the run that it is, with the run's settings.

    Raises
    ------
    PhotonError
        If there is no checkpoint, or it or the run's ``config.yaml`` is damaged.
    """
    check_folder(path)
    if (path / "checkpoint.json").is_file():
        folder = path.resolve()
        return _whole(open_checkpoint(folder)), _settings(folder.parent.parent)
    store = CheckpointStore(path / "checkpoints")
    rounds = store.rounds()
    if not rounds:
        raise PhotonError(
            f"{path}: neither a run with checkpoints, nor a checkpoint, nor an exported model (config.json)"
        )
    return _whole(store.load(rounds[-1])), _settings(path)


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that is what was written: one with a changed weight would be another model."""
    checkpoint.load_params()  # It says best what is wrong with a file that cannot be read.
    check_seal(checkpoint)
    return checkpoint


def _settings(run_dir: Path) -> RunConfig:
    try:
        return load(run_dir / "config.yaml")
    except PhotonError as error:
        raise PhotonError(f"{run_dir}: cannot read the run's settings ({error})") from error


def check_export(path: Path) -> None:
    """Check that a folder is an exported model.

    Raises
    ------
    PhotonError
        If it is not, with what makes one of a run.
    """
    if not (path / "config.json").is_file():
        raise PhotonError(
            f"{path}: not an exported model (config.json); `photon export RUN FOLDER` makes one"
        )


def check_tokenizer(trained: TrainedModel, data: PreparedData) -> None:
    """Check that token ids mean the same to the model and in the data.

    Raises
    ------
    PhotonError
        If the data was prepared with another tokenizer than the model was trained with.
    """
    check_tokenizer_of(trained.tokenizer_sha256, trained.tokenizer_file, data)


def check_tokenizer_of(sha256: str | None, file: Path | None, data: PreparedData) -> None:
    """Check that a model's tokenizer, by its hash or its file, is that of prepared data.

    Raises
    ------
    PhotonError
        If it is another one, or neither tells which it is.
    """
    wanted = data.manifest.tokenizer_sha256
    if file is not None and not file.is_file():
        raise PhotonError(f"{file}: missing, so the model's token ids cannot be told from others")
    if sha256 is None and file is not None:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 == wanted:
        return
    if file is not None and _canonical(file) == _canonical(data.tokenizer_path / "tokenizer.json"):
        return
    own = "the model's own" if file is None else printable(file.parent)
    raise PhotonError(
        f"{data.path}: prepared with another tokenizer ({wanted[:12]}…) than the model's "
        f"({str(sha256)[:12]}…); prepare the text with {own}, by --tokenizer"
    )


def check_tokenizer_beside(model: Path, data: Path) -> None:
    """Check that prepared data is of the tokenizer in a model's folder, if one is there.

    Raises
    ------
    PhotonError
        If the data was prepared with another one, or cannot be opened.
    """
    if (model / "tokenizer.json").is_file():
        check_tokenizer_of(None, model / "tokenizer.json", PreparedData.open(data))


def _canonical(file: Path) -> str:
    """Return a tokenizer as prepared data has it: the same one may be written down in several ways."""
    from photon.data.tokenizer import load_tokenizer

    text: str = load_tokenizer(file).tokenizer.to_str()
    return text


def _open_folder(path: Path) -> TrainedModel:
    from photon.evaluation.sparse_file import NAME as SPARSE
    from photon.evaluation.sparse_file import load_sparse
    from photon.models.pretrained import build_pretrained, load_pretrained

    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        raise PhotonError(
            f"{path}: no tokenizer.json in it, so its token ids cannot be told from others; export the model "
            "again"
        )
    if (path / SPARSE).is_file():
        from photon.training.groups import write_params

        model = build_pretrained(path)
        write_params(model, load_sparse(path / SPARSE))
    else:
        model = load_pretrained(path)
    digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    return TrainedModel(model, path.name, digest, tokenizer)
