import sys
from pathlib import Path

import pytest

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
    listener = WandbListener(
        "offline", "photon-tests", run_dir, {"rounds": 10, "model": {"name": "t"}}, "id7"
    )
    for event in [*events, RunFinished(summary={"tokens": 950_272, "status": "finished"})]:
        listener(event)
    listener.close()
    (written,) = run_dir.glob("wandb/offline-run-*/run-id7.wandb")
    content = written.read_bytes()
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


def test_a_missing_installation_is_said_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PhotonError, match=r"pip install 'photon-fl\[wandb\]'"):
        WandbListener("online", "photon", tmp_path, {}, "id")


def test_the_module_is_there_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing the listener must not import the package: only those who use it need it.
    import subprocess

    code = "import sys; sys.modules['wandb'] = None; import photon.telemetry.wandb"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
