"""A served model at several temperatures as agents, asked by the commands as a user would ask it."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from results import Result


@dataclass(frozen=True)
class Place:
    """The served model, its questions, and where answers are kept."""

    model: Path
    questions: Path
    folder: Path
    number: int


#: The address is part of what an answer is kept by.
PORT = "8177"
TEMPERATURES = (0.2, 0.6, 1.0, 1.4)
REAL = ("parallel", "rule", "full", "self-consistency", "selforg")


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """Yield the address of a `photon serve` of a model."""
    command = [sys.executable, "-m", "photon.cli", "serve", str(model), "--port", PORT, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+/v1", process.stdout.readline())
            assert found is not None, "photon serve does not answer"
            yield found[0]
        finally:
            process.terminate()


def asked(place: Place, policy: str) -> Result:
    """Let agents at several temperatures answer, by the command."""
    place.folder.mkdir(parents=True, exist_ok=True)
    sections = {"refine_prompt": REFINE, "most_characters": 200}
    (place.folder / "method.yaml").write_text(json.dumps(sections))
    with serving(place.model) as address:
        agents = {f"t{10 * one:.0f}": {"temperature": one, "seed": 1} for one in TEMPERATURES}
        defaults = {
            "model": place.model.resolve().name,
            "max_tokens": 12,
            "endpoint": address,
            "timeout": 600,
        }
        (place.folder / "agents.yaml").write_text(json.dumps({"defaults": defaults, "agents": agents}))
        output = place.folder / f"{policy}-{place.number}"
        command = [sys.executable, "-m", "photon.cli", "orchestrate", str(place.questions)]
        command += ["--agents", str(place.folder / "agents.yaml"), "--policy", policy]
        command += ["--method", str(place.folder / "method.yaml"), "--output", str(output)]
        command += ["--cache", str(place.folder / "replies"), "--concurrency", "4"]
        subprocess.run(command, check=True)
    found = json.loads((output / "summary.json").read_text())
    kept = ("accuracy", "parallel_accuracy", "calls", "edges", "rescue", "harm")
    counts = ["rescued", "harmed", "wrong_before", "right_before", "judged"]
    counts += ["prompt_tokens", "completion_tokens"]
    shares = {key: round(found[key] or 0.0, 4) for key in kept}
    return {"model": "SmolLM2", "policy": policy, **shares, **{key: found[key] for key in counts}}


REFINE = (
    "{question}\n\nYour answer: {own}\n\nOther answers:\n{others}\n\nAny of them may be wrong. "
    "Answer the question again."
)


def written_questions(source: Path, target: Path, number: int) -> Path:
    """Write questions in our form, the first ones of ARC-easy's file."""
    text = gzip.decompress(source.read_bytes()).decode() if source.suffix == ".gz" else source.read_text()
    rows = [json.loads(line) for line in text.splitlines()[:number]]
    lines = [
        json.dumps(
            {
                "id": str(at),
                "question": row["query"].removeprefix("Question: "),
                "choices": row["choices"],
                "answer": row["choices"][row["gold"]],
            }
        )
        for at, row in enumerate(rows)
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    return target
