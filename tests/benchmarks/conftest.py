"""A capsule of our own, and kernels that are shut in where the machine allows it."""

import json
from pathlib import Path

import pytest

from photon.benchmarks.notebook.sandbox import Shut, check_sandbox
from photon.errors import PhotonError


@pytest.fixture(scope="session")
def shut() -> Shut:
    """How kernels are started; skips where nothing can be shut in."""
    pytest.importorskip("ipykernel")
    how = Shut()
    try:
        check_sandbox(how)
    except PhotonError as error:
        pytest.skip(str(error))
    return how


TOY_CODE = {
    "toy-1-q1": [
        "import csv\nrows = list(csv.DictReader(open('values.csv')))",
        "print(sum(float(r['x']) for r in rows) / len(rows))",
    ],
    "toy-1-q2": [
        "import csv\nprint(max(csv.DictReader(open('values.csv')), key=lambda r: float(r['x']))['group'])"
    ],
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder of two questions on a capsule of three rows."""
    folder = tmp_path / "toy"
    (folder / "toy-1").mkdir(parents=True)
    (folder / "toy-1" / "values.csv").write_text("x,group\n1,a\n2,a\n6,b\n")
    common = {"short_id": "toy-1", "capsule_uuid": "c1", "data_folder": "toy-1", "version": "toy"}
    questions = [
        {
            **common,
            "question_id": "Toy-1-q1",
            "question": "What is the mean of x?",
            "ideal": "(2.99,3.01)",
            "distractors": ["(1.0,1.1)", "(4,5)", "(7,8)"],
            "eval_mode": "range_verifier",
            "categories": "['Statistics', 'Means']",
        },
        {
            **common,
            "question_id": "toy-1-q2",
            "question": "Which group has the largest x?",
            "ideal": "b",
            "distractors": ["a", "c", "d"],
            "eval_mode": "str_verifier",
            "categories": "Statistics",
        },
    ]
    (folder / "BixBench.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (folder / "reference.json").write_text(json.dumps(TOY_CODE))
    return folder
