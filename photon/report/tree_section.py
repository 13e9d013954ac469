"""The section on a federation of federations: its tree, own models, attention and routes."""

from collections.abc import Mapping, Sequence

from photon.config.tree import TreeNode, read_tree
from photon.report import tree_figures
from photon.report.charts import Series, Style
from photon.report.page import (
    PERPLEXITY,
    Figure,
    Panel,
    Table,
    Tables,
    Tree,
    TreeRow,
    by_round,
    thinned,
    written,
)
from photon.report.run import Run
from photon.telemetry.events import Event
from photon.telemetry.summary import format_bytes, format_perplexity

_Histories = Mapping[str, Sequence[Event]]


def tree_section(run: Run) -> list[tuple[str, Sequence[Panel]]]:
    """Return the section, or nothing for a run without a tree."""
    if run.started.tree is None:
        return []
    root = read_tree(run.started.tree)
    events = tree_figures.histories(run.folder, run.history, root)
    panels: list[Panel | None] = [
        _tree(root, events),
        *_own_models_by_level(run, root),
        _attention(root, events),
        _routes(root, events),
    ]
    return [("Tree", [panel for panel in panels if panel is not None])]


def _tree(root: TreeNode, events: _Histories) -> Tree:
    branches = tree_figures.branches(root, events)
    rows = [
        TreeRow(
            name=branch.name,
            level=branch.level,
            is_silo=branch.is_silo,
            figure=f"{format_perplexity(branch.first)} → {format_perplexity(branch.last)}",
            edge=f"↑ {format_bytes(branch.up)}   ↓ {format_bytes(branch.down)}" if branch.level else "",
        )
        for branch in branches
    ]
    table = [
        [
            branch.name,
            str(branch.level),
            format_perplexity(branch.first),
            format_perplexity(branch.last),
            format_bytes(branch.up),
            format_bytes(branch.down),
        ]
        for branch in branches
    ]
    note = (
        "Rings are federations, dots silos. Beside each: perplexity of its own model on its own text before "
        "training and last, and bytes of training on the edge to the node above it."
    )
    if any(branch.level and branch.up is None for branch in branches):
        note += " Where bytes are missing, the run folder of the federation above is not at hand."
    columns = ["node", "level", "before", "after", "up", "down"]
    return Tree("Perplexity and bytes of each node", note, rows, columns, thinned(table))


def _own_models_by_level(run: Run, root: TreeNode) -> list[Figure | None]:
    levels: dict[int, list[str]] = {}
    for level, node in root.levels():
        levels.setdefault(level, []).append(node.name)
    return [_own_models(run, level, names) for level, names in levels.items() if level]


def _own_models(run: Run, level: int, names: Sequence[str]) -> Figure | None:
    series = []
    for index, name in enumerate(names):
        curve = tree_figures.perplexities(run.history, name)
        series.append(
            Series(name, [number for number, _ in curve], [value for _, value in curve], Style.of(index))
        )
    note = f"What the own models of the nodes at level {level} give on their own validation text."
    title = f"Own models, level {level}"
    return by_round(title, note, series, PERPLEXITY, format_perplexity)


def _attention(root: TreeNode, events: _Histories) -> Tables | None:
    """Return heat maps: for each federation key blocks by children, then all nodes by what they keep."""
    tables, kept = [], []
    for _, node in root.levels():
        weights = tree_figures.attention_to_children(events.get(node.name, ()))
        columns = ["self", *(child.name for level, child in node.levels() if level == 1)]
        cells = {
            f"{node.name}, block {block}": [found.get(who) for who in columns]
            for block, found in weights.items()
        }
        if cells:
            tables.append(_heat_map(["of its children", *columns], cells))
    for parent in root.walk():
        for child in (node for level, node in parent.levels() if level == 1):
            history, above = events.get(child.name, ()), events.get(parent.name, ())
            kept.append((child.name, tree_figures.attention_to_above(child, history, above)))
    known = {name: [own, 1 - own] for name, own in kept if own is not None}
    if known:
        tables.append(_heat_map(["of what comes down", "self", "others"], known))
    if not tables:
        return None
    note = (
        "How much of itself and of its children a federation takes into each key "
        "block, and how much of its own key layers a node keeps when those from above and routed layers come "
        "down, averaged over key blocks."
    )
    return Tables("Attention in the last round", note, tables)


def _heat_map(columns: list[str], cells: Mapping[str, Sequence[float | None]]) -> Table:
    rows = [[name, *(written("{:.2f}".format, value) for value in values)] for name, values in cells.items()]
    shades = [[value or 0.0 for value in values] for values in cells.values()]
    return Table(columns, rows, [None] * len(rows), shades=shades)


def _routes(root: TreeNode, events: _Histories) -> Tables | None:
    rows = [
        [
            route.block,
            route.origin,
            route.child,
            str(route.rounds),
            str(route.last_round),
            f"{route.similarity:.3f}",
        ]
        for _, node in root.levels()
        for route in tree_figures.routes(events.get(node.name, ()))
    ]
    if not rows:
        return None
    note = (
        "Key blocks that travelled to other nodes: whose, where to, in how many rounds, how much alike last. "
        "Each federation counts its own rounds."
    )
    columns = ["block", "from", "to", "rounds", "last round", "similarity"]
    return Tables("Routed layers", note, [Table(columns, thinned(rows), [None] * len(rows))])
