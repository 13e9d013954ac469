"""The page of BixBench is copied from top to bottom, with a served model and with a recording."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from photon.benchmarks.bixbench.settings import GradeSettings, LimitSettings, RunSettings
from photon.benchmarks.notebook.sandbox import Shut

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bixbench.md").read_text()


def test_every_setting_is_on_the_page_with_its_default() -> None:
    for kind in (RunSettings, GradeSettings):
        for name, field in kind.model_fields.items():
            row = re.search(rf"^\| `{name}` \| (.*?) \|", PAGE, re.MULTILINE)
            assert row is not None, name
            if name != "limits":
                default = field.default
                told = f"[{', '.join(default)}]" if isinstance(default, list) else str(default)
                assert row[1].strip("`") == told.removesuffix(".0").replace("False", "false").replace(
                    "True", "true"
                )
    (limits,) = re.findall(r"^\| `limits` \|.*$", PAGE, re.MULTILINE)
    told = {name: float(value) for name, value in re.findall(r"`(\w+)` (\d+)", limits)}
    assert told == LimitSettings().model_dump()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_runs_as_it_says(tmp_path: Path, shut: Shut) -> None:
    """All but what installs, and the paper's own questions, with a base model that has learnt nothing."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PHOTON_HOME": str(tmp_path / "home"),
    }

    def run(text: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-c", f'photon() {{ "{sys.executable}" -m photon.cli "$@"; }}; {text}'],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(f"photon data prepare --output base --silo docs={ROOT / 'docs'} --vocab-size 512")
    small = "rounds=1 local_steps=1 cohort=1 schedule.warmup_steps=0 model.sequence_length=1024"
    run(f"photon train data=prepared data.path=base federation=inprocess {small} run_dir=runs/quickstart")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for block in blocks:
        lines = [
            line for line in block.splitlines() if not line.startswith("pip install") and "…" not in line
        ]
        run("\n".join(lines).replace("8000", port))
    found = {
        name: json.loads((tmp_path / "runs" / "bix" / name / "results.json").read_text())
        for name in ("reference", "random", "refusing", "small", "recorded")
    }
    assert {one["accuracy"] for one in found["reference"]["regimes"].values()} == {1.0}
    # What was recorded stands for the endpoint: the same answers, and the same grades.
    assert found["recorded"]["regimes"] == found["small"]["regimes"]
    assert found["recorded"]["cost"]["prompt_tokens"] > 0
    assert (tmp_path / "runs" / "bix" / "report.html").stat().st_size > 10_000
