"""The command that measures a GPU runs on small models here, and says of each line what it ran on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "gpu.py"
PAGE = "before\n<!-- gpu: made by scripts/bench/gpu.py -->\nold\n<!-- gpu: end -->\nafter\n"


def measure(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_lines_become_the_table_of_the_page(tmp_path):
    lines, page = tmp_path / "gpu.jsonl", tmp_path / "page.md"
    page.write_text(PAGE)
    models = ["photon-125m", "llama-720m", "abbie-350m"]
    done = measure("--tiny", "--no-compile", "--models", *models, "--lines", lines, "--page", page)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["model"] for line in found] == models
    device = "CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    for line in found:
        assert line["failed"] is None
        assert line["tiny"]
        assert line["machine"].startswith(device)
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] <= 1.2
        assert list(line["seconds"]) == ["forward", "backward", "clip and optimizer"]
        assert all(seconds > 0 for seconds in line["seconds"].values())
        # A CPU agrees with itself to the bit.
        most = 0.0 if device == "CPU" else 0.05
        assert max(line["differs_from_cpu"].values()) <= most
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(models)
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert all(f"| {device}" in row for row in rows[2:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_measures_small_models_alone(tmp_path):
    done = measure("--lines", tmp_path / "lines", "--page", tmp_path / "page")
    assert done.returncode == 1
    assert done.stderr.strip() == "this machine has no CUDA device; --tiny runs small models on its CPU"
    assert not list(tmp_path.iterdir())
