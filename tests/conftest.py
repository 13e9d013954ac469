"""Fixtures for whole runs: a small corpus of three silos and a model that trains in milliseconds."""

import copy
import gc
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from photon.config import folders
from photon.config.compose import (
    _check_override,
    _own,
    _parsed,
    _register_resolvers,
    compose,
    resolved,
    validate,
)
from photon.config.schema import RunConfig
from photon.data.prepared import MANIFEST_NAME, SPLITS, PreparedData, silo_file
from photon.preflight import preflight

SEQUENCE_LENGTH = 16

# Rewriting the assertions of all tests takes each worker seconds; what is written down is rewritten once.
sys.dont_write_bytecode = False


# Where a process may be killed, tests do it; no test cuts the power, and each flush waits for the disk.
os.fsync = lambda fd: None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let ``few(n)`` leave the first cases of a test to the default suite, and mark the others as slow."""
    seen: Counter[str] = Counter()
    for item in items:
        if (few := item.get_closest_marker("few")) is not None:
            function = item.nodeid.partition("[")[0]
            seen[function] += 1
            if seen[function] > few.args[0]:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave all that is loaded by now out of later garbage collections: each would look at it again."""
    gc.collect()
    gc.freeze()
    # Runs make many objects, and few that refer to each other in circles.
    gc.set_threshold(7_000, 10, 10)


#: A model of a few thousand parameters; short rounds; nothing written that a test does not look at.
SMALL = [
    "model.architecture.n_layer=1",
    "model.architecture.n_embd=16",
    "model.architecture.n_head=2",
    f"model.sequence_length={SEQUENCE_LENGTH}",
    "model.recipe.warmup_steps=2",
    "federation=inprocess",
    "data=prepared",
    "rounds=3",
    "local_steps=4",
    "training.batch_size=4",
    "training.threads=1",
    "training.precision=fp32",
    "evaluation.sequences=8",
    "telemetry.display=none",
    "telemetry.report=false",
    "telemetry.export=false",
]


#: The same on an aggregator's side: the data is with the silos.
SMALL_DEPLOYED = [o for o in SMALL if not o.startswith(("federation=", "data="))] + ["federation=deployment"]


@cache
def composed(*overrides: str) -> RunConfig:
    """Compose overrides, the same ones but once: Hydra takes as long as a small run.

    Files of ``conf/`` are put together once for all who choose the same, which is most of it. Single keys are
    set by what Hydra sets them with; tests/config/test_config.py compares.
    """
    folder = folders.conf_dir()
    for override in overrides:
        _check_override(override)
    try:
        parsed = [_parsed(override) for override in overrides]
        is_choice = [(folder / o.key_or_group).is_dir() and not isinstance(o.value(), dict) for o in parsed]
        choices = [override for override, chosen in zip(overrides, is_choice, strict=True) if chosen]
        config = copy.deepcopy(_chosen(str(folder), *choices))
        keys = [override for override, chosen in zip(parsed, is_choice, strict=True) if not chosen]
        ConfigLoaderImpl._apply_overrides_to_config(keys, config)
    except (HydraException, OmegaConfBaseException):
        # It says what is wrong.
        return preflight(compose(overrides))
    return preflight(validate(_own(resolved(config))))


@cache
def _chosen(folder: str, *choices: str) -> DictConfig:
    _register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(folder, version_base="1.3"):
        return hydra_compose("config", overrides=list(choices))


def small_run(*overrides: str, data: Path, run_dir: Path) -> RunConfig:
    """Return the small run with more overrides, on a corpus and in a folder of its own."""
    config = composed(*SMALL, "data.path=elsewhere", *overrides)
    changed: dict[str, Any] = {} if config.run_dir else {"run_dir": str(run_dir)}
    if config.data.path == "elsewhere":
        changed["data"] = config.data.model_copy(update={"path": str(data)})
    return config.model_copy(update=changed)


def write_corpus(folder: Path, silos: dict[str, str], tokenizer: Path | None = None) -> Path:
    """Write text files for each silo, made of words over its own alphabet, and prepare them."""
    from photon.data.prepare import prepare

    sources = {}
    for name, alphabet in silos.items():
        generator = random.Random(name)
        source = folder / "text" / name
        source.mkdir(parents=True)
        for document in range(40):
            words = (
                "".join(generator.choices(alphabet, k=generator.randint(2, 7)))
                for _ in range(generator.randint(60, 160))
            )
            (source / f"{document}.txt").write_text(" ".join(words))
        sources[name] = [source]
    output = folder / "data"
    prepare(
        sources,
        output,
        vocab_size=300,
        tokenizer=tokenizer,
        sequence_length=SEQUENCE_LENGTH,
        validation_fraction=0.2,
        seed=0,
        progress=False,
    )
    return output


def deal(data: Path, folder: Path, islands: dict[str, int]) -> None:
    """Write prepared data in which each silo of ``islands`` is dealt to so many: NAME-1, NAME-2, …

    One that is dealt to one keeps its name.
    """
    whole = PreparedData.open(data)
    shutil.copytree(whole.tokenizer_path, folder / "tokenizer")
    silos = {}
    for silo, count in islands.items():
        for island in range(count):
            name, entry = silo if count == 1 else f"{silo}-{island + 1}", whole.manifest.silos[silo]
            (folder / "silos" / name).mkdir(parents=True)
            np.save(silo_file(folder, name, "unigram"), whole.unigram(silo))
            for split in SPLITS:
                windows = whole.windows(silo, split)[island::count]
                np.save(silo_file(folder, name, split), windows)
                part = getattr(entry, split).model_copy(
                    update={"sequences": len(windows), "tokens": windows.size}
                )
                entry = entry.model_copy(update={split: part})
            silos[name] = entry
    manifest = whole.manifest.model_copy(update={"silos": silos})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with three silos of different alphabets."""
    return write_corpus(
        tmp_path_factory.mktemp("corpus"), {"alpha": "abcdefgh", "beta": "ijklmnop", "gamma": "qrstuvwxyz"}
    )


@pytest.fixture(scope="session")
def silo_folders(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared data of two silos in folders of their own, with one tokenizer."""
    return {
        name: write_corpus(tmp_path_factory.mktemp(name), {name: alphabet}, corpus / "tokenizer")
        for name, alphabet in {"alpha": "abcdefgh", "beta": "ijklmnop"}.items()
    }


@pytest.fixture(scope="session")
def lone_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with a single silo."""
    return write_corpus(tmp_path_factory.mktemp("lone"), {"alone": "abcdefgh"})


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: anchors, two silos of two classes each, and one that nobody has labelled."""
    from tests.labelled_texts import NAMES, labelled_corpus

    return labelled_corpus(
        tmp_path_factory.mktemp("labelled"),
        {
            "anchors": dict.fromkeys(NAMES, 8),
            "a": {"low": 30, "middle": 30},
            "b": {"middle": 30, "high": 30},
            "c": {"low": 20, "high": 20},
        },
        untold=("c",),
    )


@pytest.fixture
def small_config(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Compose the small run, in its own folder, with more overrides."""

    def make(*overrides: str, data: Path = corpus, name: str = "run") -> RunConfig:
        return small_run(*overrides, data=data, run_dir=tmp_path / name)

    return make


@pytest.fixture
def run_small(small_config: Callable[..., RunConfig]) -> Callable[..., dict[str, Any]]:
    """Train the small run in this process and return its summary."""

    def run(*overrides: str, resume: bool = False, **where: Any) -> dict[str, Any]:
        from photon.engine.inprocess import run_inprocess
        from photon.federation.run import prepare_run
        from photon.node import answer

        return run_inprocess(prepare_run(small_config(*overrides, **where)), answer, resume=resume)

    return run
