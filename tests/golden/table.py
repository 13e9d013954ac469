"""The table of runs, the commits that they are compared with, and the steps that a run consists of."""

import random
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

HERE = Path(__file__).parent
#: The name in ``BASE`` of the commit that holds for every run which has none of its own.
DEFAULT = "default"
#: A corpus is recorded as a run of this name: what is prepared must not change either.
CORPUS = "corpus-"


class Strict(BaseModel):
    """What comes from a file, without a key that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Resumed(Strict):
    """Where a run is killed, and what is lost then; see ``runs.yaml``."""

    rename: str
    count: int
    lose: str | None = None


class Run(Strict):
    """A row of the table; see ``runs.yaml``."""

    overrides: list[str]
    corpus: str = "three"
    model: str = "gpt2"
    quick: Literal[True, False, "bounded"] = False
    resumed: Resumed | None = None
    ends_as: str | None = None
    nodes: dict[str, dict[str, Any]] | None = None


class Table(Strict):
    """All runs by name, and what they share."""

    common: list[str]
    added: list[str] = []
    models: dict[str, list[str]]
    corpora: dict[str, dict[str, str]]
    runs: dict[str, Run]

    def names(self, *, quick: bool = False, bounded: bool = False) -> list[str]:
        """Return the names of runs: of all, of the quick ones, or of the few for a bounded comparison."""
        wanted = ("bounded",) if bounded else (True, "bounded") if quick else (True, False, "bounded")
        return [name for name, run in self.runs.items() if run.quick in wanted]


@cache
def read_table() -> Table:
    """Read ``runs.yaml``."""
    return Table.model_validate(yaml.safe_load((HERE / "runs.yaml").read_text()))


def read_base(path: Path = HERE / "BASE") -> dict[str, str]:
    """Read ``BASE``: run to the commit that it is compared with, and `DEFAULT` to that of all others.

    A run that was changed on purpose has a line of its own with the commit that changed it, and why.

    Raises
    ------
    ValueError
        If a line lacks the commit or the reason.
    """
    lines = (line.split(maxsplit=2) for line in path.read_text().splitlines())
    rows = [line for line in lines if line and not line[0].startswith("#")]
    wrong = [row[0] for row in rows if len(row) < 2 or (row[0] != DEFAULT and len(row) < 3)]
    if wrong:
        raise ValueError(f"BASE: {', '.join(wrong)}: write NAME COMMIT REASON")
    return {name: commit for name, commit, *_ in rows}


def jobs(table: Table, names: list[str], folder: Path) -> list[dict[str, Any]]:
    """Return what `drive.py` is to do, with the corpora first; writes the texts that they are made from."""
    made = [_corpus_job(name, table, folder) for name in sorted({table.runs[name].corpus for name in names})]
    return [*made, *(_run_job(name, table, folder) for name in names)]


def _corpus_job(corpus: str, table: Table, folder: Path) -> dict[str, Any]:
    own = folder / f"{CORPUS}{corpus}"
    silos = table.corpora[corpus]
    for name, letters in silos.items():
        _write_text(own / "text" / name, name, letters)
    sources = [word for name in silos for word in ("--silo", f"{name}={own / 'text' / name}")]
    shape = ["--vocab-size", "300", "--sequence-length", "16", "--validation-fraction", "0.2"]
    steps = [
        {"command": ["data", "prepare", "--output", str(own / "data"), *sources, *shape]},
        {"earlier": str(own / "data")},
        {"command": ["data", "separate", str(own / "data"), "--output", str(own / "parts")]},
    ]
    return {"name": own.name, "folder": str(own), "steps": steps}


def _write_text(folder: Path, seed: str, letters: str) -> None:
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    for document in range(40):
        words = (
            "".join(generator.choices(letters, k=generator.randint(2, 7)))
            for _ in range(generator.randint(60, 160))
        )
        (folder / f"{document}.txt").write_text(" ".join(words))


def _run_job(name: str, table: Table, folder: Path) -> dict[str, Any]:
    run, own = table.runs[name], folder / name
    corpus = folder / f"{CORPUS}{run.corpus}"
    given = [*table.models[run.model], *table.common, *run.overrides]
    overrides = [override.replace("{folder}", str(own)) for override in given]
    run_dir = own / "run"
    steps: list[dict[str, Any]]
    if run.nodes is not None:
        overrides += ["federation=deployment", f"federation.silos={len(run.nodes)}"]
        nodes = {node: _node_config(*it, corpus, own) for node, it in enumerate(run.nodes.items(), start=1)}
        steps = [{"overrides": overrides, "run_dir": str(run_dir), "nodes": nodes}]
    else:
        if not any(override.startswith("federation=") for override in overrides):
            overrides.append("federation=inprocess")
        data = ["data=prepared", f"data.path={corpus / 'data'}"]
        train = ["train", *overrides, *data, f"run_dir={run_dir}"]
        steps = [{"command": train}]
    if run.resumed is not None:
        steps[0]["die"] = {"rename": run.resumed.rename, "count": run.resumed.count}
        if run.resumed.lose is not None:
            steps.append({"remove": str(run_dir / run.resumed.lose)})
        steps.append({"command": ["resume", str(run_dir)]})
    return {"name": name, "folder": str(own), "steps": steps}


def _node_config(silo: str, settings: dict[str, Any], corpus: Path, folder: Path) -> dict[str, Any]:
    config = {key: value for key, value in settings.items() if key != "policy"}
    config["data-dir"] = str(corpus / "parts" / silo)
    config["state-dir"] = str(folder / "nodes" / silo)
    if "policy" in settings:
        file = folder / f"{silo}-policy.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(settings["policy"]))
        config["policy"] = str(file)
    return config
