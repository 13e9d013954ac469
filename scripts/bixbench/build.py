"""Build six capsules with real biomedical data, and thirty questions on them, in the form of BixBench.

    pip install 'photon-fl[bench-capsules]'
    python scripts/bixbench/build.py capsules

writes `capsules/BixBench.jsonl`, a zip file for each capsule, and `capsules/reference.json`, the cells that
the reference agent runs. The data comes from installed packages and is not part of this repository. Each
answer is computed in two ways that share nothing but the data; where they differ, nothing is built.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from argparse import ArgumentParser
from decimal import Decimal
from pathlib import Path
from typing import Any

from capsule_data import CAPSULES
from capsule_questions import QUESTIONS, Asked

VERSION = "photon-1"
#: Of the right number, and beside the right count, what is wrong.
_FACTORS = ((0.5, 0.7, 0.85), (0.6, 0.8, 1.3), (0.75, 1.25, 1.6), (1.2, 1.5, 1.9))
_STEPS = ((-3, -2, 2), (-3, 2, 5), (1, 2, 4))


def first_way(asked: Asked, folder: Path) -> str:
    """Run a question's cell in the capsule's folder, and return the last line that it prints."""
    said, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said):
            exec(compile(asked.cell, "cell", "exec"), {})
    finally:
        os.chdir(before)
    return said.getvalue().strip().splitlines()[-1]


def agree(printed: str, other: Any) -> bool:
    """Return whether both ways say the same, up to the digits that the first one prints."""
    if isinstance(other, str):
        return printed == other
    if isinstance(other, int):
        return printed == str(other)
    unit = 10.0 ** int(Decimal(printed).as_tuple().exponent)
    return abs(float(printed) - other) <= 0.5 * unit * (1 + 1e-9)


def row_of(asked: Asked, number: int, place: int, answer: str) -> dict[str, Any]:
    """Return a question as a row of BixBench 1.5."""
    if asked.width is None:
        ideal, verifier = answer, "str_verifier"
        wrong = list(asked.wrong) or [
            str(int(answer) + step) for step in _STEPS[(number + place) % len(_STEPS)]
        ]
    else:
        value = float(answer)
        width = asked.width or 0.02 * abs(value)
        ideal, verifier = _range(value, width), "range_verifier"
        # Nothing that cannot be, such as a share above 1, and the right one now here, now there among them.
        factors = _FACTORS[(number + place) % len(_FACTORS)] if not 0.5 <= value <= 1 else _FACTORS[0]
        wrong = list(asked.wrong) or [_range(value * factor, width) for factor in factors]
    if ideal in wrong or len(set(wrong)) != 3:
        raise SystemExit(f"{asked.text}: wrong answers {wrong} beside {ideal}")
    name = f"own-{number}-q{place}"
    return {
        "id": name,
        "tag": "photon",
        "version": VERSION,
        "question_id": name,
        "short_id": f"own-{number}",
        "capsule_uuid": asked.capsule,
        "question": asked.text,
        "ideal": ideal,
        "distractors": wrong,
        "eval_mode": verifier,
        "categories": CAPSULES[asked.capsule][1],
        "data_folder": f"CapsuleFolder-{asked.capsule}.zip",
    }


def _range(value: float, width: float) -> str:
    return f"({value - width:.6g},{value + width:.6g})"


def build(output: Path) -> int:
    """Write capsules, questions and reference cells; return the number of questions."""
    output.mkdir(parents=True, exist_ok=True)
    lines, reference = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (write, about)) in enumerate(CAPSULES.items(), 1):
            folder = Path(scratch, name)
            folder.mkdir()
            write(folder)
            _pack(folder, output / f"CapsuleFolder-{name}.zip", about)
            mine = [asked for asked in QUESTIONS if asked.capsule == name]
            for place, asked in enumerate(mine, 1):
                answer, other = first_way(asked, folder), asked.other(folder)
                if not agree(answer, other):
                    raise SystemExit(f"{asked.text}: one way says {answer}, the other {other}")
                row = row_of(asked, number, place, answer)
                lines.append(json.dumps(row))
                reference[row["question_id"]] = [asked.cell.strip()]
            shutil.rmtree(folder)
    (output / "BixBench.jsonl").write_text("\n".join(lines) + "\n")
    (output / "reference.json").write_text(json.dumps(reference, indent=1))
    return len(lines)


def _pack(folder: Path, archive: Path, about: str) -> None:
    """Pack a capsule as BixBench does: a folder of data, and one of notebooks that agents must not see."""
    solution = {"cells": [], "metadata": {"about": about}, "nbformat": 4, "nbformat_minor": 5}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        files = [
            (f"CapsuleData-{folder.name}/{file.name}", file.read_bytes()) for file in sorted(folder.iterdir())
        ]
        files.append((f"CapsuleNotebook-{folder.name}/solution.ipynb", json.dumps(solution).encode()))
        for path, content in files:
            # Without the time of day, so that the same data is the same archive.
            packed.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder, made where it is not there")
    print(f"{build(parser.parse_args().output)} questions")
