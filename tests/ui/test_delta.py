"""Only what is new travels, and it makes the same of what was there."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from photon.ui.delta import delta


def patch(old: Any, change: Any) -> Any:
    """Do what the page's script does."""
    what, value = change
    if what == "=":
        return value
    if what == "+":
        return old + value
    copy = list(old) if isinstance(old, list) else dict(old)
    for key, one in value.items():
        place = int(key) if isinstance(copy, list) else key
        before = copy[place] if isinstance(copy, list) or place in copy else None
        copy[place] = patch(before, one)
    return copy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, JSON)
def test_a_change_makes_the_new_of_the_old(old: Any, new: Any) -> None:
    change = delta(old, new)
    assert (old if change is None else patch(old, change)) == new


def test_of_a_line_that_grows_the_new_points_travel() -> None:
    old = {"loss": {"series": [{"name": "a", "x": [1, 2], "y": [0.5, 0.4]}, {"name": "b", "x": [], "y": []}]}}
    new = {
        "loss": {
            "series": [{"name": "a", "x": [1, 2, 3], "y": [0.5, 0.4, 0.3]}, {"name": "b", "x": [], "y": []}]
        }
    }
    assert delta(old, old) is None
    points = {"x": ["+", [3]], "y": ["+", [0.3]]}
    assert delta(old, new) == ["{", {"loss": ["{", {"series": ["{", {"0": ["{", points]}]}]}]
