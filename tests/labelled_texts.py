"""Small texts with labels: words over the alphabet of their class."""

import json
import random
from pathlib import Path

from photon.data.prepare import prepare

NAMES = ["low", "middle", "high"]
LETTERS = {"low": "abcdefgh", "middle": "ijklmnop", "high": "qrstuvwxyz"}


def write_texts(file: Path, counts: dict[str, int], *, told: bool) -> None:
    draw = random.Random(file.stem)

    def text(name: str) -> str:
        words = (
            "".join(draw.choices(LETTERS[name], k=draw.randint(2, 5))) for _ in range(draw.randint(1, 5))
        )
        return " ".join(words)

    rows = [
        {"text": text(name), **({"topic": name} if told else {})}
        for name, count in counts.items()
        for _ in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def labelled_corpus(folder: Path, silos: dict[str, dict[str, int]], untold: tuple[str, ...] = ()) -> Path:
    for name, counts in silos.items():
        write_texts(folder / f"{name}.jsonl", counts, told=name not in untold)
    prepare(
        {name: [folder / f"{name}.jsonl"] for name in silos},
        folder / "data",
        vocab_size=300,
        sequence_length=16,
        validation_fraction=0.2,
        kind="labelled",
        label_field="topic",
    )
    return folder / "data"
