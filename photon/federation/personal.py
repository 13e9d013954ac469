"""What a silo goes on from alone after a federation: the model, and its own text.

A run of one machine has both, and what silos keep beside the global model, in its folder. A member of a
deployment has an export of the model, and prepared data.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from photon.components import nearest
from photon.config.compose import load
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.separate import separate_silo
from photon.errors import PhotonError, printable
from photon.evaluation.export import export_model, export_run
from photon.evaluation.load import check_tokenizer_of, open_run_checkpoint
from photon.files.atomic import write_text
from photon.objective.configured import plain_params
from photon.state.checkpoint import Checkpoint, LedgerEntry
from photon.state.silo import SiloStore
from photon.strategy.base import strategy_of
from photon.strategy.contract import LOCAL

Tensors = Mapping[str, torch.Tensor]
#: What lies in the folder of a run that tunes: the model to start from, the silo's text, and where from.
START, DATA, ORIGIN = "start", "data", "origin.json"
#: Folder of a run in which its silos' own runs lie.
TUNED = "tuned"


@dataclass(frozen=True)
class Origin:
    """What a silo goes on from.

    Attributes
    ----------
    path
        A run, one of its checkpoints, or an exported model.
    checkpoint, config
        Of a run: its checkpoint and its configuration; None: it is an export.
    """

    path: Path
    checkpoint: Checkpoint | None
    config: RunConfig | None

    @classmethod
    def open(cls, path: Path) -> "Origin":
        """Open a run, a checkpoint or an export.

        Raises
        ------
        PhotonError
            If it is none of them, damaged, or an export that only Photon opens.
        """
        if (path / "config.json").is_file():
            if not list(path.glob("*.safetensors")):
                raise PhotonError(
                    f"{path}: a sparse export has no weights to start from; export the run without --sparse"
                )
            return cls(path, None, None)
        checkpoint, config = open_run_checkpoint(path)
        return cls(path, checkpoint, config)

    @property
    def run_dir(self) -> Path | None:
        """The run's folder; None: it is an export."""
        return None if self.checkpoint is None else self.checkpoint.path.parent.parent

    def data(self, given: Path | None) -> PreparedData:
        """Return the prepared data that has the silo's text, after a look at its tokenizer.

        Parameters
        ----------
        given
            Where it is; None: where the run has it.

        Raises
        ------
        PhotonError
            If nobody says where it is, or it was prepared with another tokenizer than the model was.
        """
        named = None if self.config is None else self.config.data.path
        if given is None and named is None:
            raise PhotonError(f"{self.path}: does not say where the silo's text is; name it with --data")
        data = PreparedData.open(Path(given or str(named)))
        if self.checkpoint is not None:
            check_tokenizer_of(self.checkpoint.state.tokenizer_sha256, None, data)
        else:
            check_tokenizer_of(None, self.path / "tokenizer.json", data)
        return data

    def write(self, folder: Path, silo: str, data: PreparedData) -> tuple[Path, Path]:
        """Write what the silo starts from into the folder of its own run.

        Returns
        -------
        tuple
            The model, as a Hugging Face folder; and the silo's text alone, as prepared data.

        Raises
        ------
        PhotonError
            If the disk does not take it.
        """
        start, text = folder / START, data.path
        told: dict[str, object] = {"silo": silo, "source": str(self.path.absolute())}
        if self.checkpoint is not None and self.config is not None:
            state = self.checkpoint.state
            told |= {"run_id": state.run_id, "round": state.round, "model_id": state.model_id}
            params, is_own = model_of_silo(self.config, self.checkpoint, silo)
            told["own_layers"] = is_own
            if is_own or self.config.data.path is None:
                facts = {"Training": {"silo": silo, "goes on from": f"{self.path.name}, round {state.round}"}}
                section, tokenizer = self.config.model, data.tokenizer_path
                export_model(params, section, state.vocab_size, tokenizer, start, facts)
            else:
                export_run(self.checkpoint.path, start)
        else:
            start = self.path.absolute()
        if data.silo_names != [silo]:
            text = folder / DATA
            if text.exists():
                shutil.rmtree(text)
            separate_silo(data, silo, text, copy=_linked)
        write_text(folder / ORIGIN, json.dumps(told, indent=1) + "\n")
        return start, text.absolute()


def check_silo(data: PreparedData, silo: str) -> None:
    """Check that prepared data has the text of a silo.

    Raises
    ------
    PhotonError
        If not.
    """
    if silo not in data.silo_names:
        names = data.silo_names
        raise PhotonError(
            f"--silo {printable(silo)}: no such silo in {data.path}{nearest(silo, names)}; there are "
            f"{', '.join(names)}"
        )


def model_of_silo(config: RunConfig, checkpoint: Checkpoint, silo: str) -> tuple[Tensors, bool]:
    """Return the parameters that a silo has at the end of a run, as the plain model has them.

    That is the global model; or where the strategy leaves a silo layers of its own, those with the layers
    that all share. Within a tree the federations from the root down to the silo put in theirs.

    Returns
    -------
    tuple
        The parameters, and whether some are the silo's own.
    """
    vocab_size = checkpoint.state.vocab_size
    params, is_own = _of_silo(config, checkpoint, silo)
    return plain_params(config, vocab_size, params), is_own


def _of_silo(config: RunConfig, checkpoint: Checkpoint, silo: str) -> tuple[Tensors, bool]:
    """Return the same as the model of the run has them, with adapters beside what they are for."""
    strategy = strategy_of(config)
    run_dir, params, is_own = checkpoint.path.parent.parent, checkpoint.load_params(), False
    root, state = config.federation.root, checkpoint.state
    child = None if root is None else next((c for c in root.children if silo in c.silos()), None)
    while child is not None and not child.is_silo:
        run_dir = run_dir / "silos" / child.name
        if not (run_dir / "config.yaml").is_file():
            return strategy.exported(checkpoint), False
        inner, config = open_run_checkpoint(run_dir)[0], load(run_dir / "config.yaml")
        strategy, state = strategy_of(config), inner.state
        shapes = {name: tensor.shape for name, tensor in params.items()}
        kept = inner.load_params()
        own_names = strategy.contract(1, shapes, "federation").own
        params = {**params, **{name: kept[name] for name in own_names}}
        is_own = is_own or bool(own_names)
        child = next((c for c in child.children if silo in c.silos()), None)
    last = state.ledger.get(silo, LedgerEntry()).last_round
    store = SiloStore(run_dir / "silos" / silo, keep=config.checkpoint.keep + 1)
    found = store.load(state.run_id, last) if last else None
    if found is not None:
        local = {group: tensors for group, tensors in found.groups.items() if group.startswith(LOCAL)}
        own = strategy.local.own_model(params, local)
        if own is not None:
            return own, True
    return (params, True) if is_own else (strategy.exported(checkpoint), False)


def _linked(source: str, target: str) -> str:
    """Let a file have a second name in the place of a copy; prepared data is never changed in its place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
