"""The part of the study of anchors that is on text: whole federations on passages of nine domains."""

import gzip
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from results import Result, Runs
from text import federate, temporary_folder

LENGTH, VOCABULARY = 48, 1024
#: Passages of a domain in the silos, and in the set that anchors are drawn from; and characters of one.
IN_SILOS, FOR_ANCHORS, CHARACTERS = 120, 40, 160
SILOS = 6
ANCHORS = (4, 10)
MODEL = [
    "model.architecture.n_layer=2",
    "model.architecture.n_embd=64",
    "model.architecture.n_head=2",
    f"model.sequence_length={LENGTH}",
]
#: Share of a silo's texts that is trained on where labels are not its own.
COVERAGE = "objective.coverage=0.5"
METHODS: dict[str, list[str]] = {
    "anchors alone": ["objective.threshold=1.01"],
    "SemiFL": [
        "objective.labels=classifier",
        "objective.lambda_lc=0",
        "objective.server_order=after",
        "objective.threshold=null",
        COVERAGE,
    ],
    "FedAnchor": ["objective.threshold=null", COVERAGE],
    "full supervision": ["objective.labels=own"],
    "FedAnchor, silos first": ["objective.server_order=after", "objective.threshold=null", COVERAGE],
}
#: Measured where SemiFL is.
SILOS_FIRST = "FedAnchor, silos first"


def run_missing(runs: Runs, data: Path, work: Path, seed: int) -> None:
    base = pretrained(domains(data / "domain-text"), work)
    for anchors in ANCHORS:
        for method in METHODS:
            if method == SILOS_FIRST and anchors != max(ANCHORS):
                continue
            name = f"text-{method.replace(' ', '-')}-anchors{anchors}-seed{seed}"
            runs.once(name, partial(train, method, anchors, seed, base, work))


def domains(folder: Path) -> dict[str, list[str]]:
    """Return the texts of nine domains: four that the installation brings, and five of the folder."""
    from photon.data.embedded import embedded_documents

    found = {name: [one.text for one in documents] for name, documents in embedded_documents().items()}
    for file in sorted(folder.glob("*.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            text = stream.read()
        rows = [json.loads(line)["text"] for line in text.splitlines()] if ".jsonl" in file.name else [text]
        found[file.name.partition(".")[0]] = rows
    return found


def passages(texts: Sequence[str], count: int, seed: str) -> Iterator[str]:
    """Yield different passages, drawn from all of the texts."""
    draw, text = random.Random(seed), "\n".join(texts)
    places = draw.sample(range(len(text) // CHARACTERS), min(2 * count, len(text) // CHARACTERS))
    whole = (text[CHARACTERS * place : CHARACTERS * (place + 1)].strip() for place in places)
    for number, passage in enumerate(passage for passage in whole if len(passage) > CHARACTERS // 2):
        if number == count:
            return
        yield passage


def pretrained(texts: dict[str, list[str]], work: Path) -> Path:
    """Return the export of a model that was pre-trained on the domains, and prepare the labelled passages.

    Half of each domain's passages are for pre-training; the other half has labels.
    """
    from photon.data.documents import Document, Labelled
    from photon.data.prepare import prepare_documents
    from photon.data.prepared import is_prepared

    export = work / "base" / "export"
    if not export.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        drawn = {name: list(passages(own, 1600, f"text/{name}")) for name, own in texts.items()}
        shutil.rmtree(work / "base", ignore_errors=True)
        plain = {
            n: [Document(n, "\n".join(own[800 + i : 820 + i])) for i in range(0, 800, 20)]
            for n, own in drawn.items()
        }
        if not is_prepared(work / "plain"):
            prepare_documents(plain, work / "plain", vocab_size=VOCABULARY, sequence_length=LENGTH)
        silos: dict[str, list[Document]] = {"anchors": []}
        for number, (name, own) in enumerate(drawn.items()):
            labelled = [Labelled(name, text, name) for text in own[: IN_SILOS + FOR_ANCHORS]]
            silos["anchors"] += labelled[IN_SILOS:]
            # A domain is in two of the silos, and a silo has three domains.
            for half in range(2):
                silo = f"silo-{(2 * number + half * 3) % SILOS + 1}"
                silos.setdefault(silo, []).extend(labelled[half * IN_SILOS // 2 : (half + 1) * IN_SILOS // 2])
        prepare_documents(
            silos,
            work / "labelled",
            tokenizer=work / "plain" / "tokenizer",
            sequence_length=LENGTH,
            validation_fraction=0.3,
            kind="labelled",
            overwrite=True,
        )
        own = ["rounds=6", "local_steps=48", "cohort=null", "training.batch_size=16", "optimizer.lr=4e-3"]
        own += [f"data.path={work / 'plain'}", "telemetry.export=true", "evaluation.every=6"]
        federate([*MODEL, *own], work / "base")
    return export


def with_anchors(labelled: Path, folder: Path, count: int, seed: int) -> Path:
    """Copy the labelled passages so that so many of each class, drawn by the seed, are anchors."""
    from photon.data.prepared import MANIFEST_NAME, PreparedData, array_file, file_sha256

    shutil.copytree(labelled, folder)
    manifest = PreparedData.open(folder).manifest
    file = array_file(folder, "anchors", "train", "labels")
    labels, draw = np.load(file), np.random.default_rng(seed)
    kept = np.full_like(labels, -1)
    for number in range(len(manifest.classes)):
        chosen = draw.permutation(np.flatnonzero(labels[:, 0] == number))[:count]
        kept[chosen] = number
    np.save(file, kept)
    entry = manifest.silos["anchors"]
    assert entry.train.labels is not None
    marks = entry.train.labels.model_copy(
        update={
            "labelled": int((kept >= 0).sum()),
            "sha256": {**entry.train.labels.sha256, "labels": file_sha256(file)},
        }
    )
    train = entry.train.model_copy(update={"labels": marks})
    silos = {**manifest.silos, "anchors": entry.model_copy(update={"train": train})}
    text = manifest.model_copy(update={"silos": silos}).model_dump_json(indent=2)
    (folder / MANIFEST_NAME).write_text(text + "\n")
    return folder


def tuned(base: Path, data: Path, run_dir: Path, seed: int, method: Sequence[str]) -> dict[str, Any]:
    """Let a federation learn the labels of prepared passages; return its summary."""
    from photon.data.prepared import PreparedData

    classes = ",".join(PreparedData.open(data).manifest.classes)
    own = [
        "model=custom",
        f"model.warm_start={base}",
        f"model.sequence_length={LENGTH}",
        "model.recipe.learning_rate=2e-3",
        f"data.path={data}",
        "objective=anchor",
        f"objective.classes=[{classes}]",
        "objective.proj_dim=32",
        "objective.max_anchors=128",
        "strategy=anchor",
        "federation.server_silo=anchors",
        "cohort=null",
        "evaluation.cohort=null",
        "evaluation.before_merge=false",
        "evaluation.sequences=null",
        "training.batch_size=16",
        "schedule=constant",
        "model.recipe.warmup_steps=0",
        "rounds=6",
        "local_steps=10",
        f"seed={seed}",
    ]
    summary = federate([*own, *method], run_dir)
    assert summary is not None, "it diverged"
    return summary


def train(method: str, anchors: int, seed: int, base: Path, work: Path) -> Result:
    """Do one federation; return what its rounds came to."""
    with temporary_folder() as folder:
        data = with_anchors(work / "labelled", folder / "data", anchors, seed)
        summary = tuned(base, data, folder / "run", seed, METHODS[method])
    rounds = [as_line(one) for one in summary["labels"]["rounds"] if one["round"]]
    return {
        "part": "text",
        "method": method,
        "place": list(METHODS).index(method),
        "anchors": anchors,
        "seed": seed,
        "rounds": rounds,
        "figure": rounds[-1]["accuracy"],
    }


def as_line(one: dict[str, Any]) -> dict[str, float | None]:
    found = {
        "accuracy": one["accuracy"],
        "right": one["pseudo_label_accuracy"],
        "right_all": one["pseudo_label_accuracy_all"],
        "coverage": one["coverage"],
    }
    return {name: None if value is None else round(value, 4) for name, value in found.items()}
