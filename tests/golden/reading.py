"""Read what a run has left on the disk, as figures that can be compared: without Photon, which may move.

What an earlier commit calls otherwise has the present names, by Photon's table of what was renamed.

A record is ``round → name of a figure → text``. Tensors are hashed, floats are written in hexadecimal.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import deserialize

from photon.config.renamed import renamed

Record = dict[str, dict[str, str]]

#: Fields of events, by event, that repeat: no times, no paths, no bytes of whole messages.
FIELDS: dict[str, tuple[str, ...]] = {
    "run_started": ("parameters", "silos", "flops_per_token", "privacy"),
    "round_started": ("cohort", "global_step"),
    "silo_finished": (
        *("loss", "loss_last", "learning_rate", "update_norm", "gradient_norm", "steps", "tokens"),
        *("group_bytes_up", "group_bytes_down", "privacy"),
    ),
    "silo_failed": ("kind",),
    "round_finished": (
        *("global_step", "tokens", "train_loss", "pseudo_gradient_norm", "silo_cosine", "consensus"),
        *("parameter_norm", "group_bytes_up", "group_bytes_down"),
    ),
    "diagnostics": ("values",),
    "evaluated": ("loss", "perplexity", "per_silo", "per_node", "tokens_trained"),
}
#: Fields of ``checkpoint.json`` and of a silo's ``state.json``.
STATE_FIELDS = (
    *("round", "global_step", "tokens", "ledger", "outer_scalars", "averaged_rounds", "local_scalars"),
    *("noise", "routed", "vocabulary", "position", "scalars"),
)
#: What the server's ledger measures beside what it counts, and what its gate remembers.
MEASURED = ("steps_per_second", "arrival_seconds", "sizes", "rejected", "quarantined_until")
_ROUND = re.compile(r"round-(\d+)$")


def read_run(folder: Path) -> Record:
    """Read all that a run has left below its folder, its silos' and its sub-federations' included."""
    record: Record = {}
    for path in sorted(folder.rglob("*")):
        where = str(path.parent.relative_to(folder))
        if path.name == "events.jsonl":
            for server_round, figure, value in _events(path):
                record.setdefault(server_round, {})[f"{where}: {figure}"] = value
        elif path.name == "previous.safetensors":
            # What the round before has as its own.
            continue
        elif path.parent.name.startswith("round-") and path.suffix in (".safetensors", ".json"):
            found = _ROUND.search(path.parent.name)
            if found is None:
                continue
            figures = record.setdefault(f"round {int(found[1])}", {})
            place = str(path.parent.parent.relative_to(folder))
            for figure, value in _state(path):
                figures[f"{place}: {figure}"] = value
        elif path.name == "summary.json":
            figures = record.setdefault("end", {})
            figures[f"{where}: weights_sha256"] = json.loads(path.read_text())["weights_sha256"]
    return {key: dict(sorted(record[key].items())) for key in sorted(record, key=_order)}


def read_corpus(folder: Path) -> Record:
    """Hash the windows and the tokenizer of a prepared corpus, whole and in parts."""
    files = [file for part in ("data", "parts") for file in sorted((folder / part).rglob("*"))]
    kept = [file for file in files if file.suffix == ".npy" or file.name == "tokenizer.json"]
    return {"files": {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}}


def digest(record: Record) -> str:
    """Return one hash of a whole record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def ending(record: Record) -> dict[str, str]:
    """Return how a run ended: its last parameters, the outer optimizer's state, and each silo's losses."""
    params, weights = "run/checkpoints: params params", "run: weights_sha256"
    # Federations below may count more rounds.
    last = max((key for key in record if params in record[key]), key=_order)
    wanted = re.compile(r"run/checkpoints: (params|outer)\b|run: .*\b(loss|per_silo|per_node)\b")
    end = {figure: value for figure, value in record[last].items() if wanted.match(figure)}
    return end | {weights: record["end"][weights]}


def _order(key: str) -> tuple[float, str]:
    word, _, number = key.partition(" ")
    return (float(number) if word == "round" else math.inf, key)


def _events(path: Path) -> Iterator[tuple[str, str, str]]:
    for line in path.read_text().splitlines():
        event = renamed().event(json.loads(line))
        name = event["event"]
        # What happened again after a resume takes the place of what was before.
        server_round = f"round {event.get('round', 0)}"
        who = " ".join(filter(None, [name, event.get("silo")]))
        for field in FIELDS.get(name, ()):
            for figure, value in _flat(f"{who} {field}", event.get(field)):
                yield server_round, figure, value


def _state(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".safetensors":
        for group, value in hash_groups(path).items():
            yield f"{path.stem} {_named(path.stem, group)}", value
        return
    content = renamed().content(json.loads(path.read_text()))
    for field in STATE_FIELDS:
        yield from _flat(f"{path.stem} {field}", content.get(field))


def hash_groups(path: Path) -> dict[str, str]:
    """Hash names, types, shapes and bytes of the tensors in a file, each state group by itself."""
    hashes: dict[str, Any] = {}
    for key, tensor in sorted(deserialize(path.read_bytes())):
        group, name = _split(key)
        hashed = hashes.setdefault(group, hashlib.sha256())
        hashed.update(f"{name}\0{tensor['dtype']}\0{tensor['shape']}\0".encode())
        hashed.update(tensor["data"])
    return {group: hashed.hexdigest() for group, hashed in hashes.items()}


def _split(key: str) -> tuple[str, str]:
    """Return group and name; a method's groups have a slash of their own."""
    parts = key.split("/", 2)
    return (
        ("/".join(parts[:2]), parts[2])
        if parts[0] in ("local", "shared")
        else (parts[0], key[len(parts[0]) + 1 :])
    )


def _named(file: str, group: str) -> str:
    """Return the name that a group has now."""
    (name,) = (renamed().kept_by_silo if file == "optimizer" else renamed().grouped)({group: None})
    return name


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the figures within a value; of floats every bit."""
    if isinstance(value, Mapping):
        for key in sorted(value):
            if key not in MEASURED:
                yield from _flat(f"{name} {_named('', key)}", value[key])
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(f"{name} {index}", inner)
    elif value is not None:
        yield name, value.hex() if isinstance(value, float) else str(value)
