"""Preparing text: against encoding it with the plain library, and how much memory it takes.

    python scripts/bench/prepare.py                     # 50 MB, each way in turn
    python scripts/bench/prepare.py --mb 1000 --only memory

The text is made of random lines of what the installed packages bring, in documents of about 2 kB. Photon
reads it, drops duplicates, compares documents, splits, encodes with a tokenizer that is given, packs, counts
and hashes. The baseline reads the same file, encodes it with a call of the library for every 1,000 documents,
on all cores, and writes the tokens down. Every way is a process of its own; its CPU time is that of its
children, too.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Report, Timing, at_least, parser, spread

PLAIN = """
import json, sys
from array import array
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[2])
with open(sys.argv[1], encoding="utf-8") as rows, open(sys.argv[3], "wb") as out:
    texts = []
    for row in rows:
        texts.append(json.loads(row)["text"])
        if len(texts) == 1000:
            for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                out.write(array("H", found.ids))
            texts = []
    for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        out.write(array("H", found.ids))
"""
PHOTON = """
import sys
from pathlib import Path
from photon.data.prepare import prepare

prepare({"text": [Path(sys.argv[1])]}, Path(sys.argv[3]), tokenizer=Path(sys.argv[2]).parent,
        workers=int(sys.argv[4]) or None, near_duplicates=sys.argv[5], overwrite=True)
"""


def main() -> None:
    arguments = parse_arguments()
    if arguments.make:
        make_text(arguments.make, arguments.mb)
        return
    report = Report(arguments)
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as temporary:
        folder = Path(temporary)
        # In a process of its own: what this one holds would count as the memory of all that it starts.
        subprocess.run(
            [sys.executable, __file__, "--make", str(folder), "--mb", str(arguments.mb)], check=True
        )
        rows, tokenizer = folder / "text.jsonl", folder / "tokenizer" / "tokenizer.json"
        size = rows.stat().st_size / 1e6
        cases = {
            "tokenizers, all cores": ["-c", PLAIN, str(rows), str(tokenizer), str(folder / "plain.bin")],
            "Photon, all cores": photon(rows, tokenizer, folder / "all", 0, "words"),
            "Photon, one process": photon(rows, tokenizer, folder / "one", 1, "words"),
            "Photon, all cores, documents not compared": photon(rows, tokenizer, folder / "none", 0, "none"),
        }
        if arguments.only == "memory":
            cases = {"Photon, all cores": cases["Photon, all cores"]}
        runs = in_turn(cases, arguments.repeats)
        if arguments.only != "memory":
            timings = {name: [timing for timing, _ in measured] for name, measured in runs.items()}
            report.rates(f"{size:,.0f} MB of text", dict.fromkeys(cases, size), "MB", timings, digits=2)
        report.table(
            f"Memory: the largest process, {size:,.0f} MB of text",
            ["case", "MB"],
            [[name, spread([most for _, most in measured], 0)] for name, measured in runs.items()],
        )
    report.close()


def photon(rows: Path, tokenizer: Path, output: Path, workers: int, compare: str) -> list[str]:
    return ["-c", PHOTON, str(rows), str(tokenizer), str(output), str(workers), compare]


def make_text(folder: Path, megabytes: float) -> None:
    """Write JSON lines, and a tokenizer that has learnt from the same text."""
    from photon.data.embedded import embedded_documents
    from photon.data.tokenizer import train_tokenizer

    texts = [document.text for silo in embedded_documents().values() for document in silo]
    train_tokenizer(texts[::10], 8192).save(folder / "tokenizer")
    lines = [line + "\n" for text in texts for line in text.split("\n") if line.strip()]
    draw = random.Random(0)
    rows, written = folder / "text.jsonl", 0
    with rows.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            written += file.write(json.dumps({"text": "".join(draw.choices(lines, k=50))}) + "\n")


def in_turn(cases: dict[str, list[str]], repeats: int) -> dict[str, list[tuple[Timing, float]]]:
    """Run the cases forwards and backwards; give seconds, and megabytes of the largest process."""
    runs: dict[str, list[tuple[Timing, float]]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name in list(cases) if repeat % 2 == 0 else reversed(cases):
            runs[name].append(run([sys.executable, *cases[name]]))
    return runs


def run(command: list[str]) -> tuple[Timing, float]:
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[1:3]} failed")
    return Timing(used.ru_utime + used.ru_stime, time.perf_counter() - start), used.ru_maxrss / 1024


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--mb", type=float, default=50, help="megabytes of text")
    made.add_argument("--repeats", type=at_least(1), default=5)
    made.add_argument("--only", choices=["memory"], help="memory: Photon alone, for large texts")
    made.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
