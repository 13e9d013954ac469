"""What classes take that a configuration names, and what is said of those that it cannot import."""

import types
from typing import Any

import pytest

from photon.components import build, import_target
from photon.errors import PhotonError


class Base:
    """Takes something at run time, and two settings."""

    def __init__(self, config: str, *, weighting: str = "tokens", power: float = 1.0) -> None:
        self.told = (config, weighting, power)


class Heir(Base):
    """Adds a setting, and hands the others on."""

    def __init__(self, config: str, *, floor: float = 1.0, **others: Any) -> None:
        super().__init__(config, **others)
        self.floor = floor


class Plain(Base):
    """Adds nothing."""


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("made_up")
    vars(made).update(Heir=Heir, Plain=Plain)
    monkeypatch.setitem(__import__("sys").modules, "made_up", made)


def test_what_is_handed_on_is_taken_by_the_base() -> None:
    section = {"_target_": "made_up.Heir", "floor": 2.0, "power": 3.0}
    made = build(section, "strategy", "run")
    assert (made.told, made.floor) == (("run", "tokens", 3.0), 2.0)


@pytest.mark.parametrize(
    ("target", "argument", "said"),
    [
        ("Heir", {"flor": 2.0}, r"^strategy\.flor: unknown key; did you mean 'floor'\?$"),
        ("Heir", {"powr": 2.0}, r"^strategy\.powr: unknown key; did you mean 'power'\?$"),
        ("Heir", {"x": 2.0}, r"^strategy\.x: unknown key; Heir takes floor, power, weighting$"),
        ("Heir", {"config": "y"}, r"^strategy\.config: unknown key; Heir takes floor, power, weighting$"),
        ("Heir", {"power": "high"}, r"^strategy\.power='high': .*valid number"),
        ("Plain", {"floor": 2.0}, r"^strategy\.floor: unknown key; "),
    ],
)
def test_a_misspelt_or_mistyped_argument_is_found_in_either(
    target: str, argument: dict[str, Any], said: str
) -> None:
    with pytest.raises(PhotonError, match=said):
        build({"_target_": f"made_up.{target}", **argument}, "strategy", "run")


def test_a_module_that_is_not_found_may_lie_where_python_does_not_look() -> None:
    with pytest.raises(PhotonError, match=r"PYTHONPATH must name the folder that mien lies in$"):
        import_target("mien.Heir", "strategy")
