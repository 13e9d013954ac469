"""What pip and uv install: every package is pinned, also those that others bring, and none in vain."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Where Photon works.
MACHINES = [
    {**system, "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.5", "os_name": "posix"}
    for minor in (11, 12, 13)
    for system in (
        {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
        {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    )
]
#: Each build of torch names the packages of CUDA that it was made for, with their versions.
OF_TORCH = ("nvidia-", "cuda-", "triton")


def pins() -> dict[str, Requirement]:
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(line.name): line for line in lines}


def asked_for() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [
        Requirement(line) for line in (*PROJECT["dependencies"], *(one for extra in extras for one in extra))
    ]


def applies(marker: Marker | None, extras: set[str]) -> bool:
    environments = [{**machine, "extra": extra} for machine in MACHINES for extra in ("", *extras)]
    return marker is None or any(marker.evaluate(environment) for environment in environments)


def all_needed() -> Iterator[tuple[str, Requirement]]:
    """Follow the metadata of installed packages: who asks for what."""
    waiting = [("pyproject.toml", requirement) for requirement in asked_for()]
    seen = set()
    while waiting:
        by, requirement = waiting.pop()
        yield by, requirement
        package = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if package in seen:
            continue
        seen.add(package)
        try:
            lines = distribution(requirement.name).requires or ()
        except PackageNotFoundError:
            # Only what another machine needs may be missing here.
            assert requirement.marker is not None, f"{by} asks for {requirement}, and it is not installed"
            continue
        brought = (Requirement(line) for line in lines)
        waiting += [(requirement.name, one) for one in brought if applies(one.marker, requirement.extras)]


def test_every_package_that_an_extra_brings_is_pinned_and_no_other_is() -> None:
    pinned, needed = pins(), set()
    wrong = []
    for by, requirement in all_needed():
        name = canonicalize_name(requirement.name)
        needed.add(name)
        if name.startswith(OF_TORCH):
            continue
        if name not in pinned:
            wrong.append(f"{by} brings {name}, which constraints.txt does not pin")
        elif not requirement.specifier.contains(str(pinned[name].specifier).lstrip("="), prereleases=True):
            wrong.append(f"{by} wants {requirement}, and constraints.txt pins {pinned[name]}")
    assert wrong == []
    assert sorted(set(pinned) - needed) == []


def test_a_pin_is_one_version_anywhere_and_names_no_place() -> None:
    """So pip and uv take the file as constraints, with whatever registry they are told to use."""
    for pin in pins().values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        assert (pin.url, pin.marker, pin.extras) == (None, None, set()), pin


def test_dev_has_what_every_other_extra_has() -> None:
    extras = {name: set(lines) for name, lines in PROJECT["optional-dependencies"].items()}
    for name, lines in extras.items():
        assert lines <= extras["dev"], name
