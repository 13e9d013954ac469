"""Hashes of the recorded commits' runs, by the machine on which they were found."""

import json
from pathlib import Path

from tests.golden.reading import digest
from tests.golden.record import Recording

FILE = Path(__file__).with_name("hashes.json")


def stored(machine: str) -> dict[str, str] | None:
    """Return run to hash for a machine, or None: then nobody knows, and the comparison must be run."""
    found: dict[str, str] | None = json.loads(FILE.read_text()).get(machine) if FILE.exists() else None
    return found


def store(recording: Recording) -> None:
    """Keep a recording's hashes under its machine; those of runs that it has not are left as they are."""
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    new = {name: digest(record) for name, record in recording.records.items()}
    content[recording.machine] = dict(sorted((content.get(recording.machine, {}) | new).items()))
    FILE.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n")
