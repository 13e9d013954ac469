"""The structure of the package: imports go down a list, in no circle, and files stay small.

Every import counts, those inside functions and under TYPE_CHECKING too, and so does a module's name in a
string, by which it may be imported, started with ``-m`` or patched: a circle opened by a string is not open.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_IMPORTS = 600, 80, 15


def modules_of(root: Path) -> dict[str, Path]:
    """Return every module of the package below ``root``, and its file."""
    found = {}
    for file in sorted((root / "photon").rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


def _module_in(name: str, modules: Mapping[str, Path]) -> str:
    """Return the module that a dotted name lies in, or an empty string."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _docstrings(tree: ast.AST) -> set[int]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, kinds) and node.body and isinstance(node.body[0], ast.Expr)
    }


def _names_in(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield every dotted name that a module imports, or writes into a string that is no docstring."""
    docstrings = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"(?<![\w.])photon(?:\.\w+)+", node.value)


def imports_of(root: Path) -> dict[str, set[str]]:
    """Return the modules of ours that each module imports or names; the bare package is none.

    What the package hands out when it is asked for, the Python interface, it does not import.
    """
    modules = modules_of(root)
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names = _names_in(ast.parse(file.read_text()), package) if module != "photon" else set()
        found[module] = {_module_in(name, modules) for name in names} - {module, "photon", ""}
    return found


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in imports:
        if module not in index:
            visit(module)
    return found


def layers() -> list[list[str]]:
    """Return the list of the architecture page, from the top down: the parts of the package on each line."""
    block = re.search(r"```text\n(photon\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None, "docs/architecture.md has no list that begins with the line 'photon'"
    lines = (line.split("  ")[0].split() for line in block[1].replace(", ", " ").splitlines()[1:])
    return [[part.removesuffix(".py").removesuffix("/") for part in line] for line in lines if line]


def part_of(module: str, lines: list[list[str]]) -> tuple[int, str]:
    """Return line (counted from the ground) and part of a module; the longest name that fits counts."""
    name = module.removeprefix("photon.")
    while name:
        for height, parts in enumerate(reversed(lines)):
            if name in parts:
                return height, name
        name = name.rpartition(".")[0]
    raise AssertionError(f"{module}: on no line of the list in docs/architecture.md")


def upward(imports: Mapping[str, set[str]], lines: list[list[str]]) -> list[str]:
    """Return the imports that go up the list."""
    return [
        f"{module} -> {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if part_of(other, lines)[0] > part_of(module, lines)[0]
    ]


def too_large(root: Path) -> list[str]:
    """Return files, functions and lists of imports that are beyond their bounds."""
    found = []
    for module, file in modules_of(root).items():
        text = file.read_text()
        if (lines := text.count("\n")) > MOST_LINES:
            found.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    found.append(f"{module}.{node.name}: {length} lines")
    for module, others in imports_of(root).items():
        if len(others) > MOST_IMPORTS:
            found.append(f"{module}: {len(others)} imports of ours")
    return found


def test_no_imports_go_in_a_circle() -> None:
    assert circles(imports_of(ROOT)) == []


def test_no_import_goes_up() -> None:
    assert upward(imports_of(ROOT), layers()) == []


def test_who_uses_a_strategy_knows_none_of_them() -> None:
    """What is a method's own is in its file: both of its halves are reached through the base classes."""
    seams = {f"photon.strategy.{module}" for module in ("base", "contract", "local")}
    for module, names in imports_of(ROOT).items():
        # Commands may ask about a sync plan.
        if not module.startswith(("photon.strategy", "photon.commands")):
            strategies = {name for name in names if name.startswith("photon.strategy.")}
            # Its rounds are no run's: it takes the arithmetic of one, which is no strategy.
            rounds = {"photon.strategy.fold", "photon.strategy.outer"}
            assert strategies <= (rounds if module == "photon.orchestration.federated" else seams), module


def test_training_knows_nothing_of_models_that_are_asked() -> None:
    tools = ("photon.endpoints", "photon.orchestration")
    users = (*tools, "photon.benchmarks", "photon.commands")
    for module, names in imports_of(ROOT).items():
        assert module.startswith(users) or not any(name.startswith(tools) for name in names), module


def test_files_functions_and_lists_of_imports_are_small() -> None:
    assert too_large(ROOT) == []


def test_no_file_of_tests_and_scripts_is_long() -> None:
    files = [file for part in ("tests", "scripts") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 200
    assert [str(file) for file in files if len(file.read_text().splitlines()) > MOST_LINES] == []


def test_only_those_that_the_page_names_know_flower() -> None:
    stated = re.search(r"Only (.*?) know of Flower", PAGE.read_text(), re.DOTALL)
    assert stated is not None
    know = {"server_app", "client_app", "worker", *re.findall(r"`(\w+)`", stated[1])}
    for file in modules_of(ROOT).values():
        names = _names_in(ast.parse(file.read_text()), "photon")
        if any(name.partition(".")[0] == "flwr" for name in names):
            part = file.relative_to(ROOT / "photon").parts[0].removesuffix(".py")
            assert part in know, f"{file} knows of Flower"


def test_every_part_of_the_package_is_on_the_list() -> None:
    lines = layers()
    used = {part_of(module, lines)[1] for module in modules_of(ROOT) if module != "photon"}
    assert used == {part for line in lines for part in line}


# --- the checks can fail --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "import photon.low",
        "def late():\n    from photon.low import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from photon import low",
        "import importlib\nimportlib.import_module('photon.low')",
        "command = ['-m', 'photon.low']",
        "target = f'photon.low.{1}'",
        "from . import low",
        "from .low import x",
    ],
)
def test_every_kind_of_import_counts(tmp_path: Path, line: str) -> None:
    package = tmp_path / "photon"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "high.py").write_text(f'"""Not photon.high itself."""\n{line}\n')
    (package / "low.py").write_text('"""A docstring may name `photon.high`."""\nx = 1\n')
    assert imports_of(tmp_path) == {"photon": set(), "photon.high": {"photon.low"}, "photon.low": set()}
    (package / "low.py").write_text("x = 'photon.high.y'\n")
    assert circles(imports_of(tmp_path)) == [["photon.high", "photon.low"]]
    assert upward(imports_of(tmp_path), [["high"], ["low"]]) == ["photon.low -> photon.high"]


def test_what_is_too_large_is_found(tmp_path: Path) -> None:
    package = tmp_path / "photon"
    package.mkdir()
    many = [f"m{number}" for number in range(MOST_IMPORTS + 1)]
    for name in many:
        (package / f"{name}.py").write_text("")
    (package / "a.py").write_text("".join(f"import photon.{name}\n" for name in many))
    (package / "b.py").write_text("\n" * (MOST_LINES + 1))
    (package / "c.py").write_text("def f():\n" + "    x = 1\n" * MOST_LINES_OF_A_FUNCTION)
    assert too_large(tmp_path) == [
        f"photon.b: {MOST_LINES + 1} lines",
        f"photon.c.f: {MOST_LINES_OF_A_FUNCTION + 1} lines",
        f"photon.a: {MOST_IMPORTS + 1} imports of ours",
    ]
