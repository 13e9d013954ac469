"""Whatever a body, a checkpoint, a manifest or a silo's notes hold: a valid value, or one clean error.

By default a few hundred mutations of each; ``pytest -m slow tests/adversary/test_fuzz.py`` takes 150,000.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.link.messages import (
    BODY,
    Described,
    EvaluateReport,
    EvaluateRequest,
    Query,
    TrainReport,
    TrainRequest,
    unpack,
)
from photon.state.checkpoint import CheckpointStore, open_checkpoint
from photon.state.silo import SiloCounts, SiloStore
from tests.samples import train_report, train_request

REPORT = train_report(scalars={"step": 4.0}, diagnostics={"exp_avg_norm": 1.0})
EVALUATED = EvaluateReport(
    round=1, silo="alpha", loss=1.0, tokens=10, per_node={"alpha": {"loss": 1.0, "tokens": 1}}
)
DESCRIBED = {"silos": [{"name": "alpha", "train_tokens": 1, "tokenizer_sha256": "0" * 64}]}
#: Kind of body to a text of it.
BODIES: dict[Any, str] = {
    TrainReport: REPORT.model_dump_json(),
    TrainRequest: train_request().model_dump_json(),
    EvaluateReport: EVALUATED.model_dump_json(),
    Described: json.dumps(DESCRIBED),
    Query: json.dumps(
        {
            **{"kind": "advertise_keys", "attempt": "a" * 32, "run_id": "r"},
            **{"model_id": "m", "round": 1, "silo": "a"},
        }
    ),
    EvaluateRequest: EvaluateRequest(round=1, silo="alpha", run_id="r").model_dump_json(),
}
#: What numbers, texts and lists are turned into.
ODD = (
    *("1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 5000, "-1", "null", "true", "{}", "[]", '""'),
    *('"\\u202e"', '"\\u0000"', '"../../x"', "[" * 5000, '{"a":' * 2000, '"' + "x" * 100_000 + '"', "1e-400"),
)


def mutated(text: str, draw: random.Random) -> str:
    """Change a text in one to three places: a byte, a cut, a doubled part, or a value that becomes odd."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.randint(0, 12))
        what = draw.randrange(5)
        if what == 0:
            text = text[:at] + chr(draw.randrange(1, 0x2FF)) + text[at + 1 :]
        elif what == 1:
            text = text[:at] + text[end:]
        elif what == 2:
            text = text[:end] + text[at:]
        else:
            text = _odd_value(text, draw)
    return text


def _odd_value(text: str, draw: random.Random) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    places = list(_places(value))
    if not places:
        return text
    holder, key = draw.choice(places)
    holder[key] = "\0odd"
    return json.dumps(value).replace('"\\u0000odd"', draw.choice(ODD))


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(items):
        yield value, key
        yield from _places(one)


def _is_clean(read: Callable[[], Any]) -> bool:
    """Return whether a value came of it; an unclean error is raised on."""
    try:
        read()
    except PhotonError:
        return False
    return True


@pytest.mark.parametrize("count", [150, pytest.param(15_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_a_body_is_valid_or_one_clean_error(kind: Any, count: int) -> None:
    draw = random.Random(f"{kind.__name__}/{count}")
    valid = 0
    for _ in range(count):
        text = mutated(BODIES[kind], draw)
        records = RecordDict({BODY: ConfigRecord({"body": text})})
        valid += _is_clean(lambda records=records: unpack(records, kind))  # type: ignore[misc]
    assert 0 < valid < count, "mutations reach both ends"


#: Name of a file to its place and what reads it.
Files = dict[str, tuple[Path, Callable[[], Any]]]


@pytest.fixture(scope="module")
def run_files(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of a finished run and of its data, and what reads each."""
    from photon.engine.inprocess import run_inprocess
    from photon.federation.run import prepare_run
    from photon.node import answer
    from tests.conftest import deal, small_run

    folder = tmp_path_factory.mktemp("fuzz")
    deal(corpus, folder / "data", {"alpha": 1, "beta": 1})
    short = ("rounds=1", "local_steps=1", "model.recipe.warmup_steps=1", "cohort=null")
    config = small_run(*short, data=folder / "data", run_dir=folder / "run")
    run_inprocess(prepare_run(config), answer, resume=False)
    checkpoint = folder / "run" / "checkpoints" / "round-000001"
    state = folder / "run" / "silos"
    silo = next(state.glob("alpha/round-*"))
    run_id = json.loads((silo / "state.json").read_text())["run_id"]
    return {
        "checkpoint.json": (checkpoint / "checkpoint.json", lambda: open_checkpoint(checkpoint)),
        "seal": (checkpoint / "blake3.json", lambda: CheckpointStore(checkpoint.parent).verified(1)),
        "params": (checkpoint / "params.safetensors", lambda: open_checkpoint(checkpoint).load_params()),
        "manifest": (folder / "data" / "manifest.json", lambda: PreparedData.open(folder / "data")),
        "state.json": (silo / "state.json", lambda: SiloStore(silo.parent, keep=3).load(run_id, 1)),
        "counts.json": (state / "alpha" / "counts.json", lambda: SiloCounts(state, "alpha").used()),
    }


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["checkpoint.json", "seal", "params", "manifest", "state.json", "counts.json"]
)
def test_a_file_is_read_or_is_one_clean_error(name: str, count: int, run_files: Files) -> None:
    path, read = run_files[name]
    draw, whole = random.Random(f"{name}/{count}"), path.read_bytes()
    try:
        assert _is_clean(read)
        for _ in range(count):
            damaged = mutated(whole[:4000].decode("latin-1"), draw).encode("latin-1", "replace")
            path.write_bytes(damaged + whole[4000:])
            _is_clean(read)
    finally:
        path.write_bytes(whole)
