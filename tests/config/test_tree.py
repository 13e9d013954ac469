"""The tree of a federation of federations, as it is written and as it is read."""

from pathlib import Path

import pytest

from photon.config.compose import compose
from photon.config.tree import plain_tree, read_tree
from photon.errors import PhotonError

LONG = {
    "north": {"children": ["a", {"b": {"privacy": {"clip_norm": 1.0}}}], "rounds": 2, "outer": "diloco"},
    "south": {"children": {"inner": ["c"], "d": None}, "cohort": 1},
}


def test_short_and_long_form_mean_the_same() -> None:
    short = read_tree({"north": ["a", "b"], "south": {"inner": ["c"], "d": None}})
    long = read_tree({"north": {"children": ["a", "b"]}, "south": {"children": [{"inner": ["c"]}, "d"]}})
    assert short == long
    assert [node.name for node in short.walk()] == ["root", "north", "a", "b", "south", "inner", "c", "d"]
    assert short.silos() == ["a", "b", "c", "d"]


def test_plain_form_is_read_back() -> None:
    tree = read_tree(LONG)
    assert read_tree(plain_tree(tree)) == tree
    assert plain_tree(tree)["north"]["rounds"] == 2


def test_pace_is_that_of_the_busiest_silo() -> None:
    assert read_tree({"north": ["a"], "b": None}).pace == 1
    deep = {"north": {"children": {"inner": {"children": ["a"], "rounds": 3}}, "rounds": 2}, "south": ["b"]}
    assert read_tree(deep).pace == 6
    assert read_tree({"north": {"children": ["a"], "rounds": 5}, "south": ["b"]}, 2).pace == 5
    assert read_tree({"north": ["a"], "south": ["b"]}, 2).pace == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "expected children"),
        ({"north": []}, "federation.tree.north: expected children"),
        ({"north": ["a", "a"]}, "a is named twice"),
        ({"north": ["north"]}, "north is named twice"),
        ({"north": ["a"], "south": {"children": ["b"], "data": "a"}}, "a is named twice"),
        ({"root": ["a"]}, "root is named twice"),
        ({"no/rth": ["a"]}, "'no/rth' is not a name"),
        ({"north": {"children": ["a"], "cohrt": 1}}, "cohrt: unknown key; did you mean 'cohort'"),
        ({"north": {"children": ["a"], "rounds": 0}}, "federation.tree.north.rounds=0"),
        ({"north": [{"a": {"rounds": 2}}]}, "a silo has no children"),
    ],
)
def test_a_tree_that_cannot_be_is_refused_in_one_line(tree: object, message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        read_tree(tree)


def test_a_tree_that_contains_itself_is_refused() -> None:
    north: list[object] = ["a"]
    north.append({"inner": north})
    with pytest.raises(PhotonError, match="contains itself"):
        read_tree({"north": north})


def test_the_command_line_and_a_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "tree.yaml"
    file.write_text("north: [a, b]\nsouth: {children: [c, d], rounds: 2}\n")
    by_file = compose([f"federation.tree={file}"]).federation
    by_line = compose(["federation.tree={north: [a, b], south: {children: [c, d], rounds: 2}}"]).federation
    assert by_file.tree == by_line.tree
    assert by_file.root is not None
    assert by_file.root.pace == 2
    with pytest.raises(PhotonError, match=r"federation.tree=.*missing.yaml: cannot be read"):
        compose([f"federation.tree={tmp_path / 'missing.yaml'}"])
    with pytest.raises(PhotonError, match="a is named twice"):
        compose(["federation.tree={north: [a, a]}"])
