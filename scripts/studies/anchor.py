"""Labels for silos without any: FedAnchor beside SemiFL, the anchors alone, and full supervision.

    python scripts/studies/anchor.py run --data DIR --minutes 30   # go on with what is missing
    python scripts/studies/anchor.py table                         # what there is, as a page

DIR has a folder `domain-text` (books, and papers as .jsonl.gz) and a folder `cifar10-jpeg-12k` (one archive
of {train,test}/LABEL/*.jpg).

Text: whole federations, as `photon train objective=anchor` runs them, on passages of nine domains, four of
which the installation brings. The model is pre-trained on the same domains, once. Images: the same losses and
labels around a small network, in a loop over rounds in this process. The same seed draws the same anchors,
weights and deal of the data for all methods. A run that has a line is not done again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import anchor_filter
import anchor_images
import anchor_text
from results import Result, Results, Runs
from study import Study
from tables import percent, save_figure, table

PARTS = {"text": anchor_text, "images": anchor_images, "filter": anchor_filter}
SEEDS = (0, 1, 2)


def run_missing(runs: Runs, arguments: argparse.Namespace) -> None:
    # All parts of a seed before the next one, so that a study that is stopped has something of each.
    for seed in arguments.seeds:
        for name in arguments.parts:
            PARTS[name].run_missing(runs, arguments.data, arguments.work, seed)


def options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--data", type=Path, required=True, help="folder with domain-text and cifar10-jpeg-12k")
    run.add_argument("--work", type=Path, default=Path(".photon/anchor"), help="folder of what is prepared")
    run.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    run.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to do")


def about(_: Results) -> str:
    return (
        "A figure is the mean over the seeds that are named, with the range from the lowest to the highest "
        "behind it; a section that is not there has not been run yet. All methods of a table have the same "
        "anchors, steps and rounds, and FedAnchor and SemiFL train on the same share of the silos' texts. "
        "[How it works](../anchor.md)."
    )


def sections(results: Results) -> Iterator[str]:
    for part, found in (("text", of(results, "text")), ("images", of(results, "images"))):
        if found:
            yield from (TEXT if part == "text" else IMAGES)
            yield from label_tables(found)
    if found := of(results, "filter"):
        yield from anchor_filter.sections(found)


TEXT = (
    "## Text",
    "",
    "Passages of 48 tokens of nine domains in six silos, each with three of the domains, and a test set of",
    "all. The model has two layers of width 64; it was pre-trained on other text of the same domains.",
    "SemiFL is measured after the aggregator's silo has trained, FedAnchor as it is by default after the",
    "mean of the silos, so the two differ in more than their labels. FedAnchor with silos first, where it is",
    "in a table, is measured as SemiFL is.",
    "",
)
IMAGES = (
    "## Images",
    "",
    "CIFAR-10 at 16 × 16 pixels, 4,000 images without labels in ten silos, of labels in shares drawn from",
    "Dirichlet(0.3); a network of three convolutions. A round has three silos, and then the server trains on",
    "the anchors, in all methods.",
    "",
)


def of(results: Results, part: str) -> list[Result]:
    return [one for one in results if one["part"] == part]


def label_tables(found: Results) -> Iterator[str]:
    """Yield a table of the methods for each number of anchors."""
    columns = [
        "method",
        "accuracy, first round",
        "last round",
        "labels trained on, first round",
        "last round",
        "coverage, last round",
    ]
    for anchors in sorted({one["anchors"] for one in found}):
        runs = [one for one in found if one["anchors"] == anchors]
        seeds = ", ".join(map(str, sorted({one["seed"] for one in runs})))
        yield f"{anchors} labelled ones of each class, seeds {seeds}:"
        yield ""
        methods = dict.fromkeys(one["method"] for one in sorted(runs, key=lambda one: one["place"]))
        yield from table(
            columns, (row(method, [o for o in runs if o["method"] == method]) for method in methods)
        )


def row(method: str, runs: Results) -> list[str]:
    def cell(key: str, place: int) -> str:
        values = [one["rounds"][place][key] for one in runs]
        known = [value for value in values if value is not None]
        return spread(known) if known else "–"

    return [
        method,
        cell("accuracy", 0),
        cell("accuracy", -1),
        cell("right", 0),
        cell("right", -1),
        cell("coverage", -1),
    ]


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{percent(mean, 1)} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def plot(results: Results, path: Path) -> None:
    """Draw accuracy and right labels by round: means over the seeds."""
    from matplotlib.figure import Figure

    parts = [part for part in ("text", "images") if of(results, part)]
    figure = Figure(figsize=(9, 3.4 * len(parts)))
    for number, part in enumerate(parts):
        most = max(one["anchors"] for one in of(results, part))
        runs = [one for one in of(results, part) if one["anchors"] == most]
        for place, (key, title) in enumerate((("accuracy", "accuracy"), ("right", "right labels"))):
            axes = figure.add_subplot(len(parts), 2, 2 * number + place + 1)
            for method in dict.fromkeys(one["method"] for one in sorted(runs, key=lambda one: one["place"])):
                rounds = [one["rounds"] for one in runs if one["method"] == method]
                lines = [[entry[key] for entry in one] for one in rounds]
                if any(value is None for line in lines for value in line):
                    continue
                means = [sum(column) / len(column) for column in zip(*lines, strict=True)]
                axes.plot(range(1, len(means) + 1), means, marker=".", label=method)
            axes.set(title=f"{part}: {title}, {most} anchors a class", xlabel="round", ylim=(0, 1))
            axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/anchor.md",
    title="Labels from a few anchors",
    about=about,
    run=run_missing,
    sections=sections,
    options=options,
    plot=plot,
    plotted="Accuracy and right labels by round",
    figure="figure",
)

if __name__ == "__main__":
    STUDY.main()
