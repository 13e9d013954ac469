"""Accuracy against sparsity on SparsyFed's own task: CIFAR-10, dealt out by label, and a small ResNet-18.

    python scripts/studies/sparse_images.py run cifar10/ --minutes 30   # go on with what is missing
    python scripts/studies/sparse_images.py table                       # what there is, as a page

The folder holds one .tar.gz archive of {train,test}/LABEL/*.jpg. A run is a loop over rounds in this process,
as the paper describes it; re-parameterisation, pruning, mean and codec are Photon's own. Its result is a
line of a file; a run that has one is not done again, so the script may be stopped at any time. The same seed
draws the same weights, the same deal of the images and the same cohorts for every method. The learning rate
of the first round is tuned on one grid for all methods, in the first cell; the other cells take the best.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_task import Images, ResNet18, deal, read_images
from results import Result, Results, Runs, has_line
from study import Study
from tables import by_rate, marked, save_figure, table, with_lines
from torch import Tensor, nn
from torch.nn import functional

from photon.link.codecs import Bitmask, Zstd
from photon.link.encoding import PackedGroups, Pipelines, SparseTensor, pack_groups, payloads_of, unpack
from photon.models.sparse import SparseTraining, density, largest, masks_of, prunable_names, prune
from photon.strategy.fold import WeightedMean
from photon.strategy.sparse import Supports
from photon.training.groups import read_params, write_params

Groups = dict[str, dict[str, Tensor]]

DENSE, SPARSYFED, TOP_K, ZEROFL, FLASH = "dense", "SparsyFed", "Top-K", "ZeroFL", "FLASH"
METHODS: dict[str, Callable[[float], SparseTraining]] = {
    DENSE: lambda _: SparseTraining(0.0),
    SPARSYFED: lambda sparsity: SparseTraining(sparsity, beta=1.25, activations="measured"),
    TOP_K: SparseTraining,
    # Of the first layer, its authors prune neither weights nor inputs in a step.
    ZEROFL: lambda sparsity: SparseTraining(
        sparsity, method="layer-topk", activations="constant", layers=("^(?!stem)",)
    ),
    FLASH: lambda sparsity: SparseTraining(sparsity, method="fixed-support"),
}
#: What `link=sparse` does, both ways.
LINK = Pipelines(params=(Bitmask(), Zstd(level=1)))
CLIENTS, COHORT = 20, 4
BATCH = 16
#: Learning rates of the first round to choose from, the paper's first, and that of the last one.
RATES = (0.5, 0.1)
LAST_RATE = 0.01
#: Where they are tuned: sparsity, α and seed.
TUNING = (0.95, 1000.0, 0)
WEIGHT_DECAY = 1e-3
WIDTH = 8
COLUMNS_EXPLAINED = """\
* *Accuracy*: after the last round, for each seed, and the mean of the last four evaluations.
* *Regrown*: weights of a silo that were zero when they came and are not when they leave, of all
  prunable ones; mean from round 2 on.
* *IoU*: intersection over union of the masks of two silos, mean from round 2 on.
* *Values*: 2 / (density received + density sent), the paper's unit, from round 2 on and over all
  rounds; in the first one every model comes dense.
* *Bytes*: all float32 values both ways, of what really crossed: what `link=sparse` makes of the
  parameters, and the statistics of BatchNorm; from round 2 on and over all rounds.
"""
#: A run is evaluated after every so many rounds.
EVALUATION = 2


@dataclass(frozen=True)
class Run:
    """What one run does."""

    method: str
    sparsity: float
    alpha: float
    seed: int
    rate: float
    rounds: int
    shrink: int

    @property
    def name(self) -> str:
        """Name of its line."""
        return (
            f"{self.method}-{self.sparsity:g}-alpha{self.alpha:g}-lr{self.rate:g}"
            f"-rounds{self.rounds}-shrink{self.shrink}-seed{self.seed}"
        )


# --- runs -------------------------------------------------------------------------------------------


def run_missing(runs: Runs, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    images = read_images(arguments.data, arguments.shrink)

    def once(method: str, sparsity: float, alpha: float, seed: int, rate: float) -> None:
        own = 0.0 if method == DENSE else sparsity
        run = Run(method, own, alpha, seed, rate, arguments.rounds, arguments.shrink)
        runs.once(run.name, partial(train, run, images["train"], images["test"]))

    for rate, method in itertools.product(RATES, arguments.methods):
        once(method, *TUNING, rate)
    for seed, sparsity, alpha, method in itertools.product(
        arguments.seeds, arguments.sparsities, arguments.alphas, arguments.methods
    ):
        best = tuned(runs.results(), method)
        if best is not None:
            once(method, sparsity, alpha, seed, best)


def tuned(results: Results, method: str) -> float | None:
    """Return the learning rate that serves a method best, of those that were tried; None: none was."""
    found = {one["rate"]: final(one) for one in tuning_runs(results, method)}
    return max(found, key=lambda rate: found[rate], default=None)


def tuning_runs(results: Results, method: str) -> Results:
    sparsity, alpha, seed = TUNING
    cell = (method, 0.0 if method == DENSE else sparsity, alpha, seed)
    return [one for one in results if (one["method"], one["sparsity"], one["alpha"], one["seed"]) == cell]


def final(run: Mapping[str, Any]) -> float:
    """Return the accuracy after the last round."""
    return float(run["rounds"][-1]["accuracy"])


def train(run: Run, images: Images, test: Images) -> Result:
    """Do the rounds of one run."""
    torch.manual_seed(run.seed)
    draw = np.random.default_rng(run.seed)
    silos = [images[own] for own in deal(images.labels.numpy(), CLIENTS, run.alpha, draw)]
    sparse = METHODS[run.method](run.sparsity)
    model = ResNet18(WIDTH)
    names = prunable_names(model, ())
    sparse.attach(model)
    state = read_groups(model)
    result: Result = {
        **vars(run),
        "parameters": sum(tensor.numel() for tensor in state["params"].values()),
        "prunable": sum(state["params"][name].numel() for name in names),
        "dense_bytes": sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values()),
        "rounds": [],
    }
    for number in range(run.rounds):
        rate = run.rate * (LAST_RATE / run.rate) ** (number / run.rounds)
        down = pack_groups(state, LINK)
        mean, supports = WeightedMean(), Supports(names, state["params"])
        figures: list[dict[str, float]] = []
        kept: list[list[float]] = []
        for client in draw.choice(CLIENTS, COHORT, replace=False):
            write_groups(model, dense(down))
            train_epoch(model, silos[client], rate, draw)
            trained = read_groups(model)
            masks = masks_of(trained["params"], names, run.sparsity, "global")
            own = prune(trained, masks)
            supports.add(own["params"])
            up = pack_groups(own, LINK)
            mean.add(decoded(up), len(silos[client]))
            figures.append({"sent": density(own["params"], names), "bytes_up": nbytes(up)})
            kept.append([density(own["params"], [name]) for name in names])
        received = density(state["params"], names)
        state = mean.result()
        if run.method == FLASH and number == 0:
            # The server chooses the support: of each layer as much as the silos kept on average.
            for name, *shares in zip(names, *kept, strict=True):
                tensor = state["params"][name]
                tensor.mul_(largest(tensor, round(statistics.fmean(shares) * tensor.numel())))
        figure = {
            "round": number + 1,
            "received": received,
            "density": density(state["params"], names),
            "layers": {name: density(state["params"], [name]) for name in names},
            "bytes_down": nbytes(down),
            **{key: statistics.fmean(one[key] for one in figures) for key in figures[0]},
            **supports.figures(),
        }
        if (number + 1) % EVALUATION == 0 or number + 1 == run.rounds:
            write_groups(model, state)
            figure["accuracy"] = accuracy(model, test)
        result["rounds"].append(figure)
    return result | {"accuracy": figure["accuracy"]}


def train_epoch(model: nn.Module, images: Images, rate: float, draw: np.random.Generator) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    for batch in images[draw.permutation(len(images))].batches(BATCH):
        functional.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images that the model names rightly."""
    model.eval()
    right = sum(int((model(batch.images).argmax(1) == batch.labels).sum()) for batch in images.batches(250))
    return right / len(images)


def read_groups(model: nn.Module) -> Groups:
    """Return copies of what the rounds average: parameters, and the running statistics of BatchNorm."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in {"params": read_params(model), "statistics": buffers}.items()
    }


def write_groups(model: nn.Module, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    write_params(model, groups["params"])
    own = dict(model.named_buffers())
    for name, tensor in groups["statistics"].items():
        own[name].copy_(tensor)


def decoded(groups: PackedGroups) -> dict[str, dict[str, Tensor | SparseTensor]]:
    return {
        group: {name: unpack(packed, name) for name, packed in tensors.items()}
        for group, tensors in groups.items()
    }


def dense(groups: PackedGroups) -> Groups:
    return {
        group: {
            name: tensor.dense() if isinstance(tensor, SparseTensor) else tensor
            for name, tensor in tensors.items()
        }
        for group, tensors in decoded(groups).items()
    }


def nbytes(groups: PackedGroups) -> int:
    return sum(tensor.nbytes for tensors in payloads_of(groups).values() for tensor in tensors.values())


# --- the page ---------------------------------------------------------------------------------------


def tuned_runs(results: Results) -> list[Result]:
    return [one for one in results if one["rate"] == tuned(results, one["method"])]


def about(results: Results) -> str:
    one = results[0]
    return (
        f"{one['prunable']:,} prunable weights of {one['parameters']:,} parameters, "
        f"{len(one['rounds'])} rounds of {COHORT} of {CLIENTS} silos. What they mean is in "
        "[sparse training](../sparsity.md#on-images)."
    )


def sections(results: Results) -> Iterator[str]:
    yield from tuning_table(results)
    yield from COLUMNS_EXPLAINED.splitlines()
    yield ""
    best = tuned_runs(results)
    for alpha in sorted({one["alpha"] for one in best}, reverse=True):
        own = [one for one in best if one["alpha"] == alpha]
        yield f"## α = {alpha:g}"
        yield ""
        yield from main_table(own)
        yield from densities(own)


def tuning_table(results: Results) -> Iterator[str]:
    """Accuracy by learning rate."""
    _, alpha, seed = TUNING
    rows = []
    for method in METHODS:
        found = {one["rate"]: marked(f"{final(one):.2%}", one) for one in tuning_runs(results, method)}
        if found:
            rows.append([method, *by_rate(found, RATES)])
    if rows:
        yield f"## Tuning: accuracy by learning rate of the first round (α = {alpha:g}, seed {seed})"
        yield ""
        yield from table(["Method", *(f"{rate:g}" for rate in RATES)], rows)


def main_table(results: Results) -> Iterator[str]:
    """What came of the runs, a row for each method."""
    rows = []
    for (sparsity, method), runs in cells(results):
        accuracies = [marked(f"{final(one):.2%} ({late(one):.2%})", one) for one in runs]
        shown = with_lines(runs)
        every = [one["rounds"] for one in shown]
        later = [rounds[1:] for rounds in every]
        values = [f"{ratio(rounds, 1.0, 'received', 'sent'):.2f}" for rounds in (later, every)]
        whole = runs[0]["dense_bytes"]
        nbytes = [f"{ratio(rounds, whole, 'bytes_down', 'bytes_up'):.2f}" for rounds in (later, every)]
        means = [
            f"{statistics.fmean(rounds[-1]['density'] for rounds in every):.2%}",
            f"{mean(later, 'regrown/mean') / runs[0]['prunable']:.3%}",
            f"{mean(later, 'mask_iou/all'):.3f}",
            ", ".join(values),
            ", ".join(nbytes),
        ]
        row = [method, f"{sparsity:.0%}", f"{runs[0]['rate']:g}", ", ".join(accuracies)]
        rows.append([*row, *(marked(text, *shown) for text in means)])
    columns = ["Method", "Zeros", "Rate", "Accuracy", "Density, last", "Regrown", "IoU", "Values", "Bytes"]
    yield from table(columns, rows, left=(0, 3))


def late(run: Mapping[str, Any]) -> float:
    """Return the mean of the last four accuracies, which is all that there is of an earlier run."""
    if "late" in run:
        return float(run["late"])
    return statistics.fmean([one["accuracy"] for one in run["rounds"] if "accuracy" in one][-4:])


def densities(results: Results) -> Iterator[str]:
    """Density of the global model after some of the rounds."""
    last = max(len(one["rounds"]) for one in results)
    shown = [number for number in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if number < last] + [last]
    rows = []
    for (sparsity, method), runs in cells(results):
        if method != DENSE:
            of_all = with_lines(runs)
            found = [
                mean([one["rounds"][number - 1 : number] for one in of_all], "density") for number in shown
            ]
            texts = [marked(f"{value:.2%}", *of_all) for value in found]
            rows.append([f"{method}, {sparsity:.0%}", *texts])
    yield from table(["Density after round", *map(str, shown)], rows)


def cells(results: Results) -> Iterator[tuple[tuple[float, str], Results]]:
    """Yield the runs that differ in their seed alone, in the order in which they are shown."""
    for sparsity, method in itertools.product(sorted({one["sparsity"] for one in results}), METHODS):
        own = [one for one in results if (one["sparsity"], one["method"]) == (sparsity, method)]
        if own:
            yield (sparsity, method), own


def mean(runs: Sequence[Results], figure: str) -> float:
    """Return the mean of a figure over rounds and runs."""
    return statistics.fmean(one[figure] for rounds in runs for one in rounds)


def ratio(runs: Sequence[Results], whole: float, down: str, up: str) -> float:
    """Return how much less crosses than if ``whole`` did both ways in every round."""
    crossed = sum(one[down] + one[up] for rounds in runs for one in rounds)
    return 2 * whole * sum(len(rounds) for rounds in runs) / crossed


def plot(results: Results, path: Path) -> None:
    """Draw accuracy and density by round, a column for each α; of an earlier run what points are known."""
    from matplotlib.figure import Figure

    results = sorted(
        tuned_runs(results),
        key=lambda one: (list(METHODS).index(one["method"]), one["sparsity"], one["seed"]),
    )
    alphas = sorted({one["alpha"] for one in results}, reverse=True)
    figure = Figure(figsize=(5.5 * len(alphas), 6.5), layout="constrained")
    axes = figure.subplots(2, len(alphas), sharex=True, sharey="row", squeeze=False)
    for one in results:
        column = axes[:, alphas.index(one["alpha"])]
        label = one["method"] if one["method"] == DENSE else f"{one['method']}, {one['sparsity']:.0%}"
        style: dict[str, Any] = {
            "color": f"C{list(METHODS).index(one['method'])}",
            "linestyle": "-" if one["seed"] == 0 else "--",
            "label": marked(label + f", seed {one['seed']}" * (one["seed"] > 0), one),
        }
        if not has_line(one):
            style |= {"linestyle": ":", "marker": "o", "mfc": "none", "markersize": 4}
        for axis, key in zip(column, ("accuracy", "density"), strict=True):
            if one["method"] == DENSE and key == "density":
                continue
            known = [point for point in one["rounds"] if key in point]
            axis.plot([point["round"] for point in known], [point[key] for point in known], **style)
    for number, alpha in enumerate(alphas):
        axes[0, number].set_title(f"α = {alpha:g}")
        axes[1, number].set_xlabel("round")
        for axis in axes[:, number]:
            axis.grid(alpha=0.3)
    handles = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(handles=[*handles.values()], loc="outside lower center", ncols=4, fontsize=8)
    axes[0, 0].set_ylabel("accuracy, test images")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("density of the global model")
    save_figure(figure, path)


def add_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("data", type=Path, help="folder of the images' archive")
    run.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    run.add_argument("--alphas", nargs="+", type=float, default=[1000.0, 0.1], help="of the Dirichlet draw")
    run.add_argument("--sparsities", nargs="+", type=float, default=[0.95])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    run.add_argument("--rounds", type=int, default=24)
    run.add_argument("--shrink", type=int, default=2, help="squares of so many pixels become one")


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/sparsity-images.md",
    title="Sparse training on images: the figures",
    about=about,
    run=run_missing,
    sections=sections,
    options=add_options,
    plot=plot,
    plotted="Accuracy and density by round",
    figure="accuracy",
    marks=True,
)

if __name__ == "__main__":
    STUDY.main()
