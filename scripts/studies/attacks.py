"""Validation perplexity with silos that lie, over attacks and folds, at equal tokens.

    python scripts/studies/attacks.py run --minutes 30         # go on with what is missing
    python scripts/studies/attacks.py run --splits different --attacks none "reversed × 10"
    python scripts/studies/attacks.py table                    # what there is, as a page of docs/results

Every run is a whole federation in this process, on text that the installation brings. The liars answer in
the node's place: their replies are changed on the way, or their text was before the run. They lie in every
round, and they are evaluated on honest text as all others. Rate, steps and seeds are the same for all folds,
and were tuned for none.
"""

import argparse
import itertools
import math
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import Result, Results, Runs
from study import Study
from tables import perplexity, table
from text import (
    BATCH,
    QUICK,
    SEQUENCE_LENGTH,
    SETTINGS,
    VOCABULARY,
    add_data,
    federate,
    prepared,
    temporary_folder,
)

if TYPE_CHECKING:
    import numpy as np
    from flwr.app import RecordDict

    from photon.link.answer import Answer, MessageType, NodeConfig

SILOS, LIARS = 7, 2
ROUNDS, LOCAL_STEPS, RATE = 8, 12, 0.004
#: Windows of each silo's validation text.
EVALUATED = 48
BEARS = f"strategy.fold.liars={LIARS}"
#: Overrides by fold. Of seven replies of which two may lie, Krum has no fewer than it needs.
FOLDS = {
    "mean": [],
    "norm-bounded mean": ["strategy.fold.rule=norm-bounded-mean"],
    "median": ["strategy.fold.rule=median"],
    "trimmed mean": ["strategy.fold.rule=trimmed-mean", BEARS],
    "Krum": ["strategy.fold.rule=krum", BEARS],
    "multi-Krum": ["strategy.fold.rule=multi-krum", BEARS],
}
#: The mean again, with what the server does by default: it rejects updates by their size, undoes rounds that
#: made the model worse, and does not draw for a while who was rejected too often.
JUDGED = "mean, judged"
FOLDS |= {JUDGED: []}
UNJUDGED = ["federation.admission.norm_factor=null", "federation.guard.action=off"]
HONEST, AWAY, BACKWARDS, EQUAL = "none", "liars away", "text backwards", "equal, reversed"
#: By attack: what a liar multiplies its update by, if that is all.
FACTORS = {"reversed × 10": -10.0, "scaled × 30": 30.0}
NOISE = "noise × 10"
ATTACKS = [HONEST, AWAY, "reversed × 10", NOISE, "scaled × 30", BACKWARDS, EQUAL]
#: Partitions of the installation's text.
SPLITS = {"alike": f"iid:{SILOS}", "different": f"dirichlet:{SILOS}:0.3"}


@dataclass(frozen=True)
class Run:
    """What one run does."""

    split: str
    fold: str
    attack: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its line."""
        return f"{self.split}-{self.fold}-{self.attack}-seed{self.seed}"


def run_missing(runs: Runs, arguments: argparse.Namespace) -> None:
    for seed, split, attack, fold in itertools.product(
        arguments.seeds, arguments.splits, arguments.attacks, arguments.folds
    ):
        run = Run(split, fold, attack, seed)
        runs.once(run.name, partial(train, run, arguments.data))


def train(run: Run, data: Path) -> Result:
    honest = prepared(data / f"{run.split}-{SILOS}", VOCABULARY, SEQUENCE_LENGTH, partition=SPLITS[run.split])
    liars = silos_of(honest)[-LIARS:]
    overrides = [
        *SETTINGS,
        "strategy=photon",
        "strategy.weighting=uniform",
        *FOLDS[run.fold],
        QUICK,
        f"optimizer.lr={RATE}",
        f"data.path={backwards(honest, liars) if run.attack == BACKWARDS else honest}",
        f"cohort={SILOS}",
        f"federation.quorum={SILOS - LIARS}",
        f"local_steps={LOCAL_STEPS}",
        f"rounds={ROUNDS}",
        # The server judges a round by its evaluation.
        f"evaluation.every={1 if run.fold == JUDGED else ROUNDS}",
        *([] if run.fold == JUDGED else UNJUDGED),
        f"evaluation.sequences={EVALUATED}",
        f"seed={run.seed}",
    ]
    lie = None if run.attack in (HONEST, BACKWARDS) else partial(Liars, liars, run.attack, run.seed)
    with temporary_folder() as run_dir:
        summary = federate(overrides, run_dir, lie)
    return {**asdict(run), "perplexity": summary and summary["perplexity"]["final"]}


def silos_of(data: Path) -> list[str]:
    from photon.data.prepared import PreparedData

    return PreparedData.open(data).silo_names


# --- attacks ----------------------------------------------------------------------------------------


class Liars:
    """Answers in the place of a node whose liars send something else than what they have trained.

    Parameters
    ----------
    names
        The silos that lie.
    attack
        What they send.
    seed
        Of their noise.
    answer
        What answers for the node.
    """

    def __init__(self, names: list[str], attack: str, seed: int, answer: "Answer") -> None:
        self._names, self._attack, self._seed, self._answer = names, attack, seed, answer
        #: What the first liar of the round sent, by its number.
        self._agreed: dict[int, dict[str, np.ndarray]] = {}

    def __call__(
        self, message_type: "MessageType", content: "RecordDict", node_config: "NodeConfig"
    ) -> "RecordDict":
        """Answer a message."""
        from photon.errors import PhotonError
        from photon.link.messages import TrainRequest, unpack

        request = unpack(content, TrainRequest) if message_type == "train" else None
        if request is None or request.silo not in self._names:
            return self._answer(message_type, content, node_config)
        if self._attack == AWAY:
            raise PhotonError("away")
        # The node may take records out of the message.
        sent = arrays_of(content)
        return self._lied(self._answer(message_type, content, node_config), sent, request.round, request.silo)

    def _lied(
        self, reply: "RecordDict", sent: "dict[str, np.ndarray]", server_round: int, silo: str
    ) -> "RecordDict":
        import numpy as np
        from flwr.app import Array, ArrayRecord

        from photon.link import BODY
        from photon.link.messages import TrainReport, pack, unpack
        from photon.link.records import RAW

        trained = arrays_of(reply)
        update = {name: trained[name] - sent[name] for name in trained}
        norm = norm_of(update)
        if self._attack == NOISE:
            draw = np.random.default_rng([self._seed, server_round, self._names.index(silo)])
            noise = {name: draw.standard_normal(one.shape) for name, one in update.items()}
            lie = {name: 10 * norm / norm_of(noise) * one for name, one in noise.items()}
        elif self._attack == EQUAL:
            first = {name: -one for name, one in update.items()}
            lie = self._agreed.setdefault(server_round, first)
        else:
            lie = {name: FACTORS[self._attack] * one for name, one in update.items()}
        told = {name: (sent[name] + lie[name]).astype(np.float32) for name in trained}
        reply["params"] = ArrayRecord(
            {
                name: Array(dtype="float32", shape=one.shape, stype=RAW, data=one.tobytes())
                for name, one in told.items()
            }
        )
        # The report fits the reply: a server that checks this sees nothing.
        report = unpack(reply, TrainReport)
        reply[BODY] = pack(report.model_copy(update={"update_norm": norm_of(lie)}))
        return reply


def arrays_of(records: "RecordDict") -> "dict[str, np.ndarray]":
    """Return the parameters that a message brings, which no codec has touched."""
    import numpy as np

    record: Any = records["params"]
    return {
        name: np.frombuffer(array.data, dtype=array.dtype).reshape(array.shape)
        for name, array in record.items()
    }


def norm_of(tensors: "dict[str, np.ndarray]") -> float:
    import numpy as np

    return math.sqrt(math.fsum(float(np.square(one, dtype=np.float64).sum()) for one in tensors.values()))


def backwards(honest: Path, liars: list[str]) -> Path:
    """Return the text with the training windows of liars read from the end to the beginning."""
    import numpy as np

    from photon.data.prepared import silo_file

    folder = honest.with_name(f"{honest.name}-backwards")
    if not folder.exists():
        made = honest.with_name(f".{folder.name}")
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(honest, made)
        for liar in liars:
            file = silo_file(made, liar, "train")
            np.save(file, np.ascontiguousarray(np.load(file)[:, ::-1]))
        made.rename(folder)
    return folder


# --- the page ---------------------------------------------------------------------------------------


def sections(results: Results) -> Iterator[str]:
    for split, partition in SPLITS.items():
        of_split = [one for one in results if one["split"] == split]
        if not of_split:
            continue
        yield f"## Silos that are {split} (`{partition}`)"
        yield ""
        attacks = [attack for attack in ATTACKS if any(one["attack"] == attack for one in of_split)]
        base = values(of_split, "mean", HONEST)
        for heading, cell in (
            ("Perplexity", average),
            ("Against the mean without liars", partial(against, base=base)),
        ):
            yield f"### {heading}: {split}"
            yield ""
            rows = [
                [fold, *(cell(values(of_split, fold, attack)) for attack in attacks)]
                for fold in FOLDS
                if any(one["fold"] == fold for one in of_split)
            ]
            yield from table(["Fold", *attacks], rows)


def values(results: Results, fold: str, attack: str) -> dict[int, float]:
    """Return the perplexity by seed, infinite where a run diverged."""
    return {
        one["seed"]: one["perplexity"] or math.inf
        for one in results
        if (one["fold"], one["attack"]) == (fold, attack)
    }


def average(by_seed: dict[int, float]) -> str:
    """Return the geometric mean over seeds."""
    if not by_seed:
        return "–"
    mean = math.exp(statistics.fmean(map(math.log, by_seed.values())))
    return perplexity(mean) if mean < 1e4 else "> 10⁴"


def against(by_seed: dict[int, float], base: dict[int, float]) -> str:
    """Return the factor of the worst seed."""
    factors = [value / base[seed] for seed, value in by_seed.items() if seed in base]
    if not factors:
        return "–"
    return f"{max(factors):.2f}" if max(factors) < 100 else "> 100"


def add_options(run: argparse.ArgumentParser) -> None:
    add_data(run)
    run.set_defaults(data=Path(".photon/attacks"))
    run.add_argument("--folds", nargs="+", choices=list(FOLDS), default=list(FOLDS))
    run.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS)
    run.add_argument("--splits", nargs="+", choices=list(SPLITS), default=["alike"])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1])


ABOUT = (
    f"{SILOS} silos, of which the last {LIARS} lie in every round; {ROUNDS} rounds of {LOCAL_STEPS} local "
    f"steps, batch {BATCH} × {SEQUENCE_LENGTH}, peak rate {RATE:g}, the same for all folds and tuned for "
    "none. Of each split the first table has geometric means over seeds. In the second each run is divided "
    "by that of the mean without liars with the same seed, and the worst seed is shown. What the attacks are "
    "and what the figures mean is in [robust folds](../robustness.md#what-was-measured)."
)
STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/attacks.md",
    title="Attacks and folds: the figures",
    about=lambda _: ABOUT,
    run=run_missing,
    sections=sections,
    options=add_options,
)

if __name__ == "__main__":
    STUDY.main()
