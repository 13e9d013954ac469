import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from photon.config.trackers import WandbSection
from photon.errors import PhotonError
from photon.telemetry.events import Event, RunFinished
from photon.telemetry.wandb import WandbListener


def test_an_offline_run_is_written_below_the_run_folder(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    run_dir = tmp_path / "run"
    settings = WandbSection(
        mode="offline", project="photon-tests", entity="us", group="first", tags=["a tag"], name="mine"
    )
    listener = WandbListener(settings, run_dir, {"rounds": 10, "model": {"name": "t"}}, "id7")
    for event in [*events, RunFinished(summary={"tokens": 950_272, "status": "told by a silo"})]:
        listener(event)
    listener.close()
    (written,) = run_dir.glob("wandb/offline-run-*/run-id7.wandb")
    content = written.read_bytes()
    assert b"told by a silo" not in content
    assert b"not finite" not in content, "the reason that a silo failed stays here"
    run = next(record.run for record in _records(written) if record.HasField("run"))
    assert (run.entity, run.project, run.run_group, list(run.tags), run.display_name, run.run_id) == (
        *("us", "photon-tests", "first"),
        *(["a tag"], "mine", "id7"),
    )
    for metric in (
        b"train/loss",
        b"server/pseudo_gradient_norm",
        b"validation/perplexity",
        b"validation/legal/perplexity",
        b"silo/cpp/tokens_per_second",
        b"seconds/overhead",
    ):
        assert metric in content
    assert content.count(b"validation/perplexity") >= 11


def test_the_parts_of_an_offline_run_have_one_axis(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of the second part comes after those of the first."""
    pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    chosen = ("telemetry=wandb", "telemetry.wandb.mode=offline", "schedule=constant")
    run_small(*chosen, "rounds=2")
    run_small(*chosen, "rounds=4", resume=True)
    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    assert len(files) == 2
    assert files[0].name == files[1].name, "both are of one run"
    # W&B's own process may still be writing when the run has ended.
    end = time.monotonic() + 20
    while len(rows := [row for file in files for row in _rows(file)]) < 13 and time.monotonic() < end:
        time.sleep(0.1)
    assert [step for step, _ in rows] == list(range(len(rows)))
    assert {number for _, number in rows} == {0, 1, 2, 3, 4}


def _records(file: Path) -> Iterator[Any]:
    """Yield the records of a file of W&B's.

    Blocks of 32 KiB after a head of seven bytes; in them chunks: checksum, length, and whether a record is
    whole (1) or begins (2), goes on (3) or ends (4) there.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, data = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(data)
            data = b""


def _rows(file: Path) -> list[tuple[int, int]]:
    """Return step and round of each row of a file of W&B's."""
    rows: list[tuple[int, int]] = []
    for record in _records(file):
        items = {(".".join(i.nested_key) or i.key): i.value_json for i in record.history.item}
        if items:
            rows.append((int(items["_step"]), int(float(items["round"]))))
    return rows


def test_a_missing_installation_is_said_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PhotonError, match=r"pip install 'photon-fl\[wandb\]'"):
        WandbListener(WandbSection(mode="online", project="photon"), tmp_path, {}, "id")


def test_the_module_is_there_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing the listener must not import the package: only those who use it need it.
    import subprocess

    code = "import sys; sys.modules['wandb'] = None; import photon.telemetry.wandb"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
