"""Validation perplexity of WorldLM and its baselines on the leaves of a tree of real text, at equal tokens.

    python scripts/studies/trees.py run --minutes 30     # the installation's text; go on with what is missing
    python scripts/studies/trees.py run --name languages --data DIR --tree '{a: [x, y], b: [z, u]}'
    python scripts/studies/trees.py table                # what there is, as docs/results/worldlm-figures.md

DIR is a folder of ``photon data prepare`` whose silos are the leaves of a tree with two branches; for the
methods in which a branch trains too, it has a silo BRANCH-text for each. Every run is a whole tree in this
process. Its result is a line of a file; a run that has one is not done again, so the script may be stopped at
any time. All methods have the same model, rate, seeds and tokens per leaf; ``--rate`` is for looking at what
another rate would do. Where the hierarchy is broken, the last leaves of the two branches have changed places.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from results import Result, Results, Runs
from study import Study
from tables import save_figure, table
from text import SEQUENCE_LENGTH, federate, prepared, temporary_folder

#: Branches of a tree by name: silos, or branches again.
Tree = dict[str, "list[str] | Tree"]
WORLDLM = "WorldLM, τ = 1"
RESTRICTED = "strategy.embeddings=restricted"
SWAPPED = ", leaves swapped"
#: Ours: layers that are one for each branch and never leave it, so that they depend on who is in it.
REGIONAL = "regional"
RULES = "{down: overwrite, up: mean}"
HIERFAVG = "HierFAVG, κ2 = 2"
FLAT = ["strategy=photon", "strategy.weighting=uniform"]
#: FedAvg over the tree without key layers but perhaps embeddings; on a balanced tree that is flat FedAvg.
SHARED = ["strategy=fedper", "strategy.key_fraction=0"]
CLIP_NORM = 5.0
PRIVATE = ["privacy=gaussian", f"privacy.clip_norm={CLIP_NORM}"]

#: With noise on what a branch sends to the root alone, in place of that on what every silo sends.
AT_BORDER = 0.05
BORDER = f", z = {AT_BORDER} at the border"


def private(noise: float) -> list[str]:
    return [*PRIVATE, f"privacy.noise_multiplier={noise}"]


#: WorldLM's open points: what each is changed to, all else being as the preset has it.
OPEN_POINTS = {
    "cosine of the weights": ["strategy.attention.score=cosine"],
    "dot product": ["strategy.attention.score=dot"],
    "projection": ["strategy.attention.score=projection"],
    "1 key block of 4": ["strategy.key_fraction=0.25"],
    "3 key blocks of 4": ["strategy.key_fraction=0.75"],
    "key blocks spread": ["strategy.key_blocks=spread"],
    "down without itself": ["strategy.attention.include_self_down=false"],
    "up without itself": ["strategy.attention.include_self_up=false"],
    "down overwrites": ["strategy.down=overwrite"],
    "nothing down": ["strategy.down=none"],
    "no residuals": ["strategy.routed.n_res=0"],
    "2 residuals": ["strategy.routed.n_res=2"],
    "residuals of least attention": ["strategy.routed.select=least_attention"],
    "own embeddings": ["strategy.embeddings=key"],
    "trimmed embeddings": [RESTRICTED],
}
#: With text of a branch's own, on which it trains before its children or beside them.
INNER = ", text at branches"
PARALLEL = f"{INNER}, parallel"
#: Overrides by method; flat ones have no tree.
METHODS: dict[str, list[str]] = {
    WORLDLM: ["strategy=worldlm"],
    **{f"{WORLDLM}, {name}": ["strategy=worldlm", *overrides] for name, overrides in OPEN_POINTS.items()},
    WORLDLM + INNER: ["strategy=worldlm"],
    WORLDLM + PARALLEL: ["strategy=worldlm", "strategy.schedule=parallel"],
    "flat FedAvg": FLAT,
    HIERFAVG: ["strategy=hierfavg"],
    "FedPer": ["strategy=fedper"],
    "local": ["strategy=local"],
    "centralized": ["strategy=centralized"],
    "WorldLM, τ = 0.3": ["strategy=worldlm", "strategy.attention.tau=0.3"],
    WORLDLM + SWAPPED: ["strategy=worldlm"],
    "flat FedAvg, z = 0.002": [*FLAT, *private(0.002)],
    "WorldLM, τ = 1, z = 0.002": ["strategy=worldlm", *private(0.002)],
    "flat FedAvg, z = 0.01": [*FLAT, *private(0.01)],
    "WorldLM, τ = 1, z = 0.01": ["strategy=worldlm", *private(0.01)],
    "FedPer, z = 0.01": ["strategy=fedper", *private(0.01)],
    "flat FedAvg, z = 0.05": [*FLAT, *private(0.05)],
    "WorldLM, τ = 1, z = 0.05": ["strategy=worldlm", *private(0.05)],
    "FedPer, own embeddings, z = 0.05": ["strategy=fedper", "strategy.embeddings=key", *private(0.05)],
    "WorldLM, τ = 0.1": ["strategy=worldlm", "strategy.attention.tau=0.1"],
    "FedPer, own embeddings": ["strategy=fedper", "strategy.embeddings=key"],
    "FedPer, trimmed embeddings": ["strategy=fedper", RESTRICTED],
    "FedAvg, own embeddings": [*SHARED, "strategy.embeddings=key"],
    "FedAvg, trimmed embeddings": [*SHARED, RESTRICTED],
    **{
        f"{REGIONAL} {what}{swapped}": ["strategy=fedper", *overrides]
        for what, overrides in {
            "key layers": [],
            "key layers and embeddings": ["strategy.embeddings=key"],
            "models": ["strategy.embeddings=key", "strategy.key_fraction=1"],
        }.items()
        for swapped in ("", SWAPPED)
    },
}
#: The variant that is compared on every tree.
OURS = f"{REGIONAL} key layers and embeddings"
METHODS |= {
    **{f"{OURS}, z = {noise}": [*METHODS[OURS], *private(noise)] for noise in (0.01, 0.05)},
    **{f"{method}{BORDER}": METHODS[method] for method in (WORLDLM, OURS)},
}
#: In the plot; the tables have all.
PLOTTED = [
    WORLDLM,
    WORLDLM + SWAPPED,
    "flat FedAvg",
    HIERFAVG,
    "FedPer",
    "local",
    "centralized",
    OURS,
    OURS + SWAPPED,
]
EMBEDDED_TREE = "{code: [cpp, python], text: [prose, legal]}"
ROUNDS = 12
LOCAL_STEPS = 24
BATCH = 8
VOCABULARY = 1024
RATE = 0.004
SETTINGS = [
    "cohort=null",
    "model.architecture.n_layer=4",
    "model.architecture.n_embd=48",
    "model.architecture.n_head=4",
    f"model.sequence_length={SEQUENCE_LENGTH}",
    "model.recipe.warmup_steps=32",
    f"local_steps={LOCAL_STEPS}",
    f"training.batch_size={BATCH}",
    "evaluation.sequences=256",
]


# --- runs -------------------------------------------------------------------------------------------


def run_missing(runs: Runs, arguments: argparse.Namespace) -> None:
    name, tree = arguments.name, read_branches(arguments.tree)
    data = arguments.data or prepared(Path(".photon/worldlm/embedded"), VOCABULARY, SEQUENCE_LENGTH)
    if arguments.rate != RATE:
        name = f"{name}, rate {arguments.rate:g}"
    for seed in arguments.seeds:
        for method in arguments.methods:
            run = partial(train, name, data, tree, method, seed, arguments.rate)
            runs.once(f"{name}-seed{seed}-{method}", run)


def read_branches(text: str) -> Tree:
    """Return a tree of two branches, in each of which all leaves are equally deep."""
    import yaml

    from photon.config.tree import TreeNode, read_tree

    def branches(node: TreeNode) -> Tree | list[str]:
        if all(child.is_silo for child in node.children):
            return [child.name for child in node.children]
        if any(child.is_silo for child in node.children):
            raise SystemExit(f"--tree {text}: {node.name} has leaves beside branches")
        return {child.name: branches(child) for child in node.children}

    tree = branches(read_tree(yaml.safe_load(text)))
    if isinstance(tree, list) or len(tree) != 2:
        raise SystemExit(f"--tree {text}: expected two branches")
    return tree


def leaves_of(tree: Tree | list[str]) -> list[str]:
    if isinstance(tree, list):
        return tree
    return [leaf for branch in tree.values() for leaf in leaves_of(branch)]


def broken(tree: Tree) -> Tree:
    """Let the last leaves of the two branches change places."""
    one, other = (leaves_of(branch)[-1] for branch in tree.values())
    places = {one: other, other: one}

    def swapped(part: Tree | list[str]) -> Tree | list[str]:
        if isinstance(part, list):
            return [places.get(leaf, leaf) for leaf in part]
        return {name: swapped(branch) for name, branch in part.items()}

    return {name: swapped(branch) for name, branch in tree.items()}


def train(name: str, data: Path, tree: Tree, method: str, seed: int, rate: float) -> Result:
    from photon.telemetry.events import RunStarted, SiloFinished
    from photon.telemetry.log import read_events

    inner = 2 if method == HIERFAVG else 1
    overrides = [
        *SETTINGS,
        *METHODS[method],
        f"optimizer.lr={rate}",
        f"data.path={data}",
        f"rounds={ROUNDS // inner}",
        f"federation.inner_rounds={inner}",
        f"evaluation.every={ROUNDS // inner}",
        f"seed={seed}",
    ]
    if not METHODS[method][0].endswith(("=photon", "=centralized")):
        overrides.append(f"federation.tree={as_override(method, tree)}")
    if ", z = " in method:
        overrides.append(f"privacy.seed={seed}")
    with temporary_folder() as run_dir:
        summary = federate(overrides, run_dir)
        root = list(read_events(run_dir / "events.jsonl"))
        below = [event for log in run_dir.glob("silos/**/events.jsonl") for event in read_events(log)]
    at_root = [event for event in root if isinstance(event, SiloFinished)]
    everywhere = [*at_root, *(event for event in below if isinstance(event, SiloFinished))]
    return {
        "name": name,
        "seed": seed,
        "method": method,
        "tree": tree,
        "parameters": next(event.parameters for event in root if isinstance(event, RunStarted)),
        "tokens": sum(event.tokens for event in at_root),
        "update_norm": statistics.fmean(event.update_norm for event in at_root),
        "bytes": {
            "root": {"up": sum(e.bytes_up for e in at_root), "down": sum(e.bytes_down for e in at_root)},
            "all": {"up": sum(e.bytes_up for e in everywhere), "down": sum(e.bytes_down for e in everywhere)},
        },
        "perplexity": summary and {leaf: summary["perplexity"]["per_node"][leaf] for leaf in leaves_of(tree)},
    }


def as_override(method: str, tree: Tree) -> str:
    """Return the tree as Hydra reads it, with what ``method`` asks of its branches."""
    rules = {}
    if method.startswith(REGIONAL):
        rules["strategy"] = RULES
    if method.endswith(BORDER):
        rules["privacy"] = f"{{clip_norm: {CLIP_NORM}, noise_multiplier: {AT_BORDER}}}"

    def node(name: str, part: Tree | list[str]) -> str:
        if isinstance(part, list):
            own = {**rules, **({"data": f"{name}-text"} if INNER in method else {})}
            silos = f"[{', '.join(part)}]"
            if not own:
                return f"{name}: {silos}"
            return f"{name}: {{children: {silos}, {', '.join(f'{key}: {own[key]}' for key in own)}}}"
        return f"{name}: {shown(part)}"

    def shown(part: Tree) -> str:
        return "{" + ", ".join(node(name, branch) for name, branch in part.items()) + "}"

    return shown(broken(tree) if method.endswith(SWAPPED) else tree)


# --- the page ---------------------------------------------------------------------------------------


def mean_of(result: Result) -> float:
    """Return the mean perplexity over the leaves; infinite for a run that diverged."""
    found = result["perplexity"]
    return math.inf if found is None else statistics.fmean(found.values())


def sections(results: Results) -> Iterator[str]:
    for name in names_of(results):
        yield from tree_table(name, [one for one in results if one["name"] == name])


def names_of(results: Results) -> list[str]:
    return sorted({one["name"] for one in results})


def by_method(results: Results) -> dict[str, list[Result]]:
    found = {method: [one for one in results if one["method"] == method] for method in METHODS}
    return {method: runs for method, runs in found.items() if runs}


def tree_table(name: str, results: Results) -> Iterator[str]:
    tree = results[0]["tree"]
    leaves = leaves_of(tree)
    yield f"## {name}: {as_override('', tree)}"
    yield ""
    yield "Validation perplexity per leaf and its mean over leaves, over seeds; then each seed's mean."
    yield "Megabytes that crossed the root's edges in the whole run, and those of all edges of the tree."
    yield ""
    columns = [
        "Method",
        *leaves,
        "Mean",
        "Seeds",
        "To WorldLM",
        "Up, root",
        "Down, root",
        "Up, all",
        "Down, all",
    ]
    rows, chosen = [], by_method(results)
    for method, runs in sorted(chosen.items(), key=lambda item: statistics.fmean(map(mean_of, item[1]))):
        means = {one["seed"]: mean_of(one) for one in runs}
        mean = statistics.fmean(means.values())
        ours = {one["seed"]: mean_of(one) for one in chosen.get(WORLDLM, [])}
        cells = ["diverged"] * len(leaves)
        if math.isfinite(mean):
            cells = [f"{statistics.fmean(one['perplexity'][leaf] for one in runs):.1f}" for leaf in leaves]
        shared = sorted(means.keys() & ours.keys())
        ratio = statistics.fmean(means[seed] / ours[seed] for seed in shared) if shared else math.nan
        cells += [
            f"**{mean:.1f}**",
            ", ".join(f"{means[seed]:.1f}" for seed in sorted(means)),
            f"{ratio:.2f}×",
        ]
        cells += [
            f"{statistics.fmean(one['bytes'][where][way] for one in runs) / 1e6:.1f}"
            for where in ("root", "all")
            for way in ("up", "down")
        ]
        rows.append([method, *cells])
    yield from table(columns, rows)


def plot(results: Results, path: Path) -> None:
    """Draw the mean perplexity of the main methods, a panel for each tree that has most; a dot is a seed."""
    from matplotlib.figure import Figure

    methods = {name: by_method([one for one in results if one["name"] == name]) for name in names_of(results)}
    names = [name for name in methods if len(methods[name].keys() & set(PLOTTED)) > len(PLOTTED) - 2]
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(6.5 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(names) :]:
        unused.remove()
    for axis, name in zip(axes, names, strict=False):
        chosen = {method: methods[name][method] for method in PLOTTED if method in methods[name]}
        means = {method: [mean_of(one) for one in runs] for method, runs in chosen.items()}
        ordered = sorted(means, key=lambda method: -statistics.fmean(means[method]))
        bars = [statistics.fmean(means[method]) for method in ordered]
        colours = ["C1" if method == WORLDLM else "C0" for method in ordered]
        axis.barh(ordered, [bar if math.isfinite(bar) else 0.0 for bar in bars], color=colours, alpha=0.6)
        for method in ordered:
            axis.plot(means[method], [method] * len(means[method]), "k.", markersize=5)
        axis.set_title(name)
        axis.set_xlabel("validation perplexity, mean over leaves")
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def add_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--name", default="domains", help="what the tree is called in the table")
    run.add_argument("--data", type=Path, help="prepared text; the default is the installation's own")
    run.add_argument(
        "--tree", default=EMBEDDED_TREE, help="two branches of leaves, which are silos of the text"
    )
    run.add_argument("--rate", type=float, default=RATE, help="peak learning rate")
    run.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds, one after the other")
    run.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="some of them")


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/worldlm-figures.md",
    title="WorldLM: the figures",
    about=lambda _: "What they mean is in [WorldLM on text](worldlm.md).",
    run=run_missing,
    sections=sections,
    options=add_options,
    plot=plot,
)

if __name__ == "__main__":
    STUDY.main()
