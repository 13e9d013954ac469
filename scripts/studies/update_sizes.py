"""How large honest updates are beside what is usual: how far from the bound of the server's gate they stay.

    python scripts/studies/update_sizes.py run      # do what is missing, some minutes
    python scripts/studies/update_sizes.py table    # what there is, as a page of docs/results

Every run is a whole federation of honest silos in this process, on text that the installation brings. The
figure is the largest size of an update, in units of what it is compared with: the larger of the median of
its round and that of the ledger.
"""

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from unittest.mock import patch

from results import Result, Results, Runs
from study import Study
from tables import table
from text import SEQUENCE_LENGTH, SETTINGS, VOCABULARY, add_data, federate, prepared, temporary_folder

ROUNDS = 6
USUAL = [
    "cohort=null",
    f"rounds={ROUNDS}",
    "local_steps=8",
    "optimizer.lr=0.004",
    f"evaluation.every={ROUNDS}",
    "evaluation.sequences=8",
    "model.recipe.warmup_steps=8",
]
#: Partition of the text, and overrides, by what is unusual about the silos.
RUNS: dict[str, tuple[str, list[str]]] = {
    "text alike": ("iid:6", []),
    "text of different domains": ("by-source", []),
    "text very different (Dirichlet 0.1)": ("dirichlet:8:0.1", []),
    "batches of one sequence": ("dirichlet:8:0.3", ["training.batch_size=1"]),
    "batches of 16 sequences": ("dirichlet:8:0.3", ["training.batch_size=16"]),
    "no warm-up, five times the rate": (
        "dirichlet:8:0.3",
        ["model.recipe.warmup_steps=0", "optimizer.lr=0.02"],
    ),
    "a warm-up of four rounds": ("dirichlet:8:0.3", ["model.recipe.warmup_steps=32"]),
    "two of eight drawn, the others away": ("dirichlet:8:0.3", ["cohort=2"]),
    "one of eight drawn, the others away": ("dirichlet:8:0.3", ["cohort=1"]),
    "one local step a round": ("dirichlet:8:0.3", ["local_steps=1", "model.recipe.warmup_steps=2"]),
    "outer momentum (DiLoCo)": ("dirichlet:8:0.3", ["strategy=diloco"]),
    "SGD": ("dirichlet:8:0.3", ["optimizer=sgd", "optimizer.lr=0.1"]),
    "averaged moments (Local Adam)": ("dirichlet:8:0.3", ["strategy=local-adam"]),
    "control variates (SCAFFOLD)": ("dirichlet:8:0.3", ["strategy=scaffold"]),
    "sparse masks (SparsyFed)": ("dirichlet:8:0.3", ["strategy=sparsyfed"]),
    "a hundredth of the bytes": ("dirichlet:8:0.3", ["link=topk-100x"]),
}


def run(runs: Runs, arguments: argparse.Namespace) -> None:
    """Do what is missing."""
    for name, (partition, overrides) in RUNS.items():
        runs.once(name, partial(_largest, partition, overrides, arguments.data))


def _largest(partition: str, overrides: list[str], data: Path) -> Result:
    """Train, and return the largest size of an update beside what it is compared with, by kind of group."""
    from photon.federation import sizes as judged
    from photon.federation.sizes import Plausibility, Sizes
    from photon.strategy.contract import PARAMS

    largest: dict[str, float] = {"times": 0.0, "times_state": 0.0}

    class Measuring(Plausibility):
        """Looks at every reply beside the others, and lets all of them wait."""

        def at_once(self, sizes: Sizes) -> bool:
            return False

        def problems(self, replies: Mapping[str, Sizes]) -> dict[str, str]:
            for group, usual in self.usual(replies).items():
                kind = "times" if group == PARAMS else "times_state"
                most = max(sizes[group] for sizes in replies.values() if group in sizes)
                largest[kind] = max(largest[kind], most / usual)
            return super().problems(replies)

    path = prepared(data / partition.replace(":", "-"), VOCABULARY, SEQUENCE_LENGTH, partition=partition)
    with temporary_folder() as folder, patch.object(judged, "Plausibility", Measuring):
        summary = federate([*SETTINGS, f"data.path={path}", *USUAL, *overrides], folder / "run")
    assert summary is not None, "an honest run"
    return {**largest, "failures": summary["failures"], "perplexity": summary["perplexity"]["final"]}


def sections(results: Results) -> Iterable[str]:
    """Return the table."""
    found = {one["run"]: one for one in results}
    rows = [
        [
            name,
            f"{one['times']:.2f}",
            f"{one['times_state']:.2f}" if one["times_state"] else "",
            str(one["failures"]),
        ]
        for name in RUNS
        if (one := found.get(name)) is not None
    ]
    head = ["Silos", "largest update, times what is usual", "largest other group", "rejected or failed"]
    yield from table(head, rows)


def _figure(value: float) -> str:
    return f"{value:.2f}" if value else ""


def about(results: Results) -> str:
    """Return what the page says of the figures."""
    largest = max(one["times"] for one in results)
    return (
        f"Each is a whole run of {ROUNDS} rounds with honest silos and the default gate. The bound is "
        f"`federation.admission.norm_factor`, 20 by default for updates and its square for other groups; the "
        f"largest honest update of all runs was {largest:.1f} times what is usual."
    )


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/update-sizes.md",
    title="Sizes of honest updates",
    about=about,
    run=run,
    sections=sections,
    options=add_data,
    figure="times",
)

if __name__ == "__main__":
    STUDY.main()
