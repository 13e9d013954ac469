"""The part of the study of anchors that is on filters: what they do for pre-training on text with noise."""

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from anchor_text import LENGTH, MODEL, domains, passages, pretrained, tuned, with_anchors
from results import Result, Results, Runs
from tables import percent, table
from text import federate, temporary_folder

CLEAN, NOISE = "text", ("boilerplate", "shuffled", "language")
CLASSES = (CLEAN, *NOISE)
#: Documents of a silo of each class, those of the test set, and characters of one.
DOCUMENTS = {CLEAN: 120, "boilerplate": 27, "shuffled": 27, "language": 26}
TEST, CHARACTERS = 30, 1200
#: Passages of a silo that are labelled by anchors, and those that anchors are drawn from, of each class.
PASSAGES, FOR_ANCHORS, ANCHORS = 150, 40, 10
METHODS = ("all of it", "unigram threshold", "learnt filter", "text without noise")
_MENUS = ("Home", "About us", "Contact", "Sign in", "Subscribe", "Privacy policy", "Terms of use", "Cookies")
_LINES = (
    "We use cookies to improve your experience. Accept all | Reject | Settings",
    "Copyright {} Example Ltd. All rights reserved.",
    "Share this page: Facebook | Twitter | Email | Print",
    "Posted on 2024-{:02d} by admin in Uncategorised. {} comments",
    "Click here to read more >> page {} of {}",
)


def run_missing(runs: Runs, data: Path, work: Path, seed: int) -> None:
    texts = domains(data / "domain-text")
    base = pretrained(texts, work)
    prepare_noisy(texts, work)
    for method in METHODS:
        name = f"filter-{method.replace(' ', '-')}-seed{seed}"
        runs.once(name, partial(train, method, seed, base, work))


def sections(found: Results) -> Iterator[str]:
    yield from (
        "## A filter for pre-training",
        "",
        "Four silos with documents of one domain each. Two in five are noise: boilerplate, text with",
        "its words in another order, or another language. All methods take the same steps; perplexity is of",
        "clean text of the four domains that no silo has. The threshold leaves out the windows that unigram",
        "counts of a silo predict worst, as many as the learnt filter does.",
        "",
    )
    columns = ["trained on", "perplexity", "windows left out", "accuracy of the filter's labels"]
    rows = []
    for method in METHODS:
        runs = [one for one in found if one["method"] == method]
        if runs:
            rows.append([method, *(_cell(runs, key) for key in ("perplexity", "left_out", "accuracy"))])
    yield from table(columns, rows)


def _cell(runs: Results, key: str) -> str:
    values = [one[key] for one in runs if one[key] is not None]
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if key == "perplexity":
        return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"
    return f"{percent(mean, 1)} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def noise(kind: str, text: str, other: str, draw: random.Random) -> str:
    """Return a document of noise as long as a text.

    Parameters
    ----------
    other
        Text of another language.
    """
    if kind == "shuffled":
        words = text.split(" ")
        draw.shuffle(words)
        return " ".join(words)
    if kind == "language":
        start = draw.randrange(len(other) - len(text))
        return other[start : start + len(text)]
    lines: list[str] = []
    while sum(map(len, lines)) < len(text):
        menu = " | ".join(draw.sample(_MENUS, 4))
        line = draw.choice(_LINES)
        lines += [menu, line.format(*(draw.randint(1, 12) for _ in range(line.count("{"))))]
    return "\n".join(lines)[: len(text)]


def prepare_noisy(texts: dict[str, list[str]], work: Path) -> None:
    """Prepare the silos' text with noise and without, passages of it with labels, and the test set."""
    from photon.data.documents import Document, Labelled
    from photon.data.prepare import prepare_documents
    from photon.data.prepared import is_prepared

    if is_prepared(work / "noisy-test"):
        return
    japanese = next(rows[0] for name, rows in texts.items() if name.endswith("_ja"))
    silos: dict[str, dict[str, list[str]]] = {}
    test: dict[str, list[Document]] = {}
    from photon.data.embedded import embedded_documents

    for name in embedded_documents():
        draw, text = random.Random(f"noise/{name}"), "\n".join(texts[name])
        needed = sum(DOCUMENTS.values()) + TEST
        # Of a small domain documents overlap, and those of the test set do not.
        step = min(CHARACTERS, (len(text) - CHARACTERS * (TEST + 1)) // (needed - TEST))
        places = draw.sample(range(needed - TEST), needed - TEST)
        own_text, held_out = text[: -CHARACTERS * TEST], text[-CHARACTERS * TEST :]
        cut = [held_out[CHARACTERS * place : CHARACTERS * (place + 1)] for place in range(TEST)]
        test[name] = [Document(name, one) for one in cut]
        rest, silos[name] = iter([own_text[step * place : step * place + CHARACTERS] for place in places]), {}
        for kind, count in DOCUMENTS.items():
            own = [next(rest) for _ in range(count)]
            silos[name][kind] = own if kind == CLEAN else [noise(kind, one, japanese, draw) for one in own]
    labelled: dict[str, list[Document]] = {"anchors": []}
    for name, kinds in silos.items():
        for kind, own in kinds.items():
            share = round(PASSAGES * DOCUMENTS[kind] / sum(DOCUMENTS.values()))
            found = list(passages(own, share + FOR_ANCHORS // 4, f"{name}/{kind}"))
            labelled["anchors"] += [Labelled(name, one, kind) for one in found[share:]]
            labelled.setdefault(name, []).extend(Labelled(name, one, kind) for one in found[:share])
    common: dict[str, Any] = {
        "tokenizer": work / "plain" / "tokenizer",
        "sequence_length": LENGTH,
        "near_duplicates": "none",
        "tokenizer_loss": 1.0,
        "overwrite": True,
    }
    prepare_documents(labelled, work / "noisy-labelled", validation_fraction=0.3, kind="labelled", **common)
    clean = {name: [Document(name, one) for one in kinds[CLEAN]] for name, kinds in silos.items()}
    prepare_documents(clean, work / "noisy-clean", **common)
    mixed = {
        name: [Document(name, one) for own in kinds.values() for one in own] for name, kinds in silos.items()
    }
    prepare_documents(mixed, work / "noisy", **common)
    prepare_documents(test, work / "noisy-test", **common)


def learnt(seed: int, base: Path, work: Path, folder: Path) -> tuple[Path, float]:
    """Return a copy of the silos' text with labels that a federation has learnt, and their accuracy.

    A seed's is kept: two methods go by it.
    """
    from photon.evaluation.labelling import label_data

    kept, told = work / f"noisy-given-{seed}", work / f"noisy-given-{seed}.json"
    if not told.exists():
        shutil.rmtree(kept, ignore_errors=True)
        data = with_anchors(work / "noisy-labelled", folder / "passages", ANCHORS, seed)
        labels = ["objective.threshold=null", "objective.coverage=0.5"]
        summary = tuned(base, data, folder / "labels", seed, labels)
        shutil.copytree(work / "noisy", kept)
        label_data(kept, folder / "labels")
        told.write_text(json.dumps(summary["labels"]["accuracy"]))
    noisy = folder / "noisy"
    shutil.copytree(kept, noisy)
    return noisy, json.loads(told.read_text())


def thresholded(noisy: Path) -> None:
    """Replace the labels: as many of a silo's windows are left out, those that unigrams predict worst."""
    from photon.data.given import read_given, write_given
    from photon.data.prepared import PreparedData

    data = PreparedData.open(noisy)
    for silo in data.silo_names:
        labels, known = read_given(data, silo)
        count = int((labels != known.classes.index(CLEAN)).sum())
        counts = data.unigram(silo) + 1.0
        losses = -np.log(counts / counts.sum())[data.windows(silo, "train")].mean(1)
        left_out = np.zeros(len(labels), dtype=np.int32)
        left_out[np.argsort(-losses, kind="stable")[:count]] = 1
        write_given(data, silo, left_out, ("kept", "left out"), "unigrams")


def train(method: str, seed: int, base: Path, work: Path) -> Result:
    """Pre-train on the silos' text; return the perplexity of the test set."""
    from photon.data.given import read_given
    from photon.data.prepared import SPLITS, PreparedData
    from photon.evaluation.load import open_trained
    from photon.evaluation.perplexity import evaluate_windows

    left_out = accuracy = None
    with temporary_folder() as folder:
        data, drop = work / ("noisy-clean" if method == METHODS[-1] else "noisy"), []
        if method in METHODS[1:3]:
            data, accuracy = learnt(seed, base, work, folder)
            drop = list(NOISE)
            if method == METHODS[1]:
                thresholded(data)
                drop, accuracy = ["left out"], None
            opened = PreparedData.open(data)
            gone = []
            for silo in opened.silo_names:
                labels, known = read_given(opened, silo)
                gone.append(np.isin(labels, [known.classes.index(one) for one in drop]))
            left_out = round(float(np.concatenate(gone).mean()), 4)
        own = [f"data.path={data}", f"seed={seed}", "rounds=4", "local_steps=32", "cohort=null"]
        own += [
            "training.batch_size=16",
            "optimizer.lr=4e-3",
            "evaluation.every=4",
            "model.recipe.warmup_steps=32",
        ]
        names = ",".join(f"'{one}'" for one in drop)
        assert federate([*MODEL, *own, f"data.filter=[{names}]"], folder / "run") is not None, "it diverged"
        model, test = open_trained(folder / "run").model, PreparedData.open(work / "noisy-test")
        windows = np.concatenate([test.windows(silo, split) for silo in test.silo_names for split in SPLITS])
        score = evaluate_windows(model, windows, batch_size=64, device="cpu", precision="fp32")
    return {
        "part": "filter",
        "method": method,
        "seed": seed,
        "perplexity": round(score.perplexity, 3),
        "left_out": left_out,
        "accuracy": accuracy,
        "figure": round(score.perplexity, 3),
    }
