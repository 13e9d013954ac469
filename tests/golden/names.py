"""The table of runs has present names: what a recorded commit calls them, and what it does not know."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from photon.config.renamed import FILE, Renamed, renamed
from tests.golden.table import Table

_OF_PACKAGE = Path("photon/config")


def as_known(table: Table, checkout: Path) -> Table:
    """Return the table of runs in the words of a checkout's code."""
    names = _present_to_old(checkout)
    code = "".join(file.read_text() for file in sorted((checkout / "photon").rglob("*.py")))
    unknown = [key for key in table.added if f" {key.rpartition('.')[2]}:" not in code]

    def known(overrides: Sequence[str]) -> list[str]:
        kept = (one for one in overrides if one.partition("=")[0] not in unknown)
        return [_replaced(override, names) for override in kept]

    runs = {
        name: run.model_copy(update={"overrides": known(run.overrides)}) for name, run in table.runs.items()
    }
    models = {name: known(overrides) for name, overrides in table.models.items()}
    return table.model_copy(update={"runs": runs, "models": models, "common": known(table.common)})


def _present_to_old(checkout: Path) -> dict[str, str]:
    """Return the keys, and options, that were renamed since: present name to the checkout's."""
    file = checkout / _OF_PACKAGE / FILE.name
    before = Renamed.model_validate(yaml.safe_load(file.read_text())) if file.is_file() else None
    since = {}
    for part in ("keys", "values"):
        old = getattr(before, part) if before is not None else {}
        since |= {new: name for name, new in getattr(renamed(), part).items() if name not in old}
    return since


def _replaced(override: str, names: dict[str, str]) -> str:
    for name, old in names.items():
        override = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w-])", old, override)
    return override
