"""Label the windows of prepared text with the classifier that a run has learnt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from photon.data.given import write_given
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.load import check_tokenizer_of, open_run_checkpoint
from photon.objective.anchor import AnchorLabels
from photon.objective.configured import model_of, objective_of
from photon.training.groups import write_params

#: Windows of a forward pass.
_PASS = 64


@dataclass(frozen=True)
class LabelledSilo:
    """The labels of a silo: how many windows have each, by name."""

    silo: str
    counts: dict[str, int]


def label_data(
    folder: Path, run: Path, advance: Callable[[str, int, int], None] = lambda *_: None
) -> list[LabelledSilo]:
    """Write the labels of all training windows beside each silo's, as `photon.data.given` reads them.

    A window that is longer than the model's is read in parts, whose log-probabilities are averaged.

    Parameters
    ----------
    folder
        Prepared running text, of the tokenizer that the run had.
    run
        A run that has learnt labels, or one of its checkpoints.
    advance
        Called with a silo, the windows that are done, and all of them.

    Raises
    ------
    PhotonError
        If the text or the run is of another kind, or they have different tokenizers.
    """
    data = PreparedData.open(folder)
    if data.manifest.kind != "text":
        raise PhotonError(f"{folder}: holds {data.manifest.kind}; labels are given to running text")
    checkpoint, config = open_run_checkpoint(run)
    objective, state = objective_of(config), checkpoint.state
    if not isinstance(objective, AnchorLabels):
        name = type(objective).__name__
        raise PhotonError(
            f"{run}: was trained with {name}, which learns no labels; give one of objective=anchor"
        )
    check_tokenizer_of(state.tokenizer_sha256, None, data)
    model = model_of(config, state.vocab_size)
    write_params(model, checkpoint.load_params())
    model.eval()
    found = []
    for silo in data.silo_names:
        windows = data.windows(silo, "train")
        labels = np.empty(len(windows), dtype=np.int32)
        with torch.no_grad():
            for start in range(0, len(windows), _PASS):
                # Without the token that is the next window's.
                of_pass = windows[start : start + _PASS, : data.manifest.sequence_length]
                tokens = torch.from_numpy(of_pass.astype(np.int64))
                parts = tokens.split(state.sequence_length, dim=1)
                scores = sum(objective.classify(model, part).log_softmax(1) * part.shape[1] for part in parts)
                labels[start : start + _PASS] = torch.as_tensor(scores).argmax(1).numpy()
                advance(silo, min(start + _PASS, len(windows)), len(windows))
        write_given(data, silo, labels, objective.classes, f"{run.name}, round {state.round}")
        counts = np.bincount(labels, minlength=len(objective.classes)).tolist()
        found.append(LabelledSilo(silo, dict(zip(objective.classes, counts, strict=True))))
    return found
