"""The command line: exit codes, sweeps, and a run as a newcomer starts it."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from photon import __version__ as VERSION
from photon.cli import main
from tests.conftest import SMALL, SMALL_DEPLOYED

PHOTON = str(Path(sys.executable).parent / "photon")


def photon(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PHOTON, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def photon_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Call ``photon`` in this process, which has imported torch, and return exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["photon", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capfd.readouterr().err

    yield call
    # Hydra gives each run of a sweep a log of its own.
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_it_says_its_version_and_helps_by_either_name(tmp_path: Path) -> None:
    said = photon("--version", cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(f"photon {VERSION} (flwr 1.41.")
    for command in ([], ["train"], ["data", "prepare"]):
        short, long = (photon(*command, name, cwd=tmp_path) for name in ("-h", "--help"))
        assert (short.returncode, short.stdout) == (0, long.stdout)


@pytest.mark.parametrize("engine", ["inprocess", "simulation"])
def test_data_that_is_not_there_is_told_before_anything_is_started(
    photon_here: Callable[..., tuple[int, str]], tmp_path: Path, engine: str
) -> None:
    where = [f"federation={engine}", f"data.path={tmp_path / 'nowhere'}", f"run_dir={tmp_path / 'run'}"]
    assert photon_here("train", *SMALL, *where) == (
        2,
        f"photon: data.path: {tmp_path / 'nowhere'} is not a folder: give one that `photon data prepare` "
        "wrote\n",
    )
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_there_is_told_before_a_superlink_is_asked(
    photon_here: Callable[..., tuple[int, str]],
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a deployed run the aggregator has the tokenizer alone."""
    alone = tmp_path / "alone"
    shutil.copytree(corpus / "tokenizer", alone / "tokenizer")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    for folder, told in ((tmp_path / "nowhere", "data.path: "), (alone, "does not exist")):
        where = [f"data.path={folder}", f"run_dir={tmp_path / 'run'}"]
        code, said = photon_here("train", *SMALL_DEPLOYED, *where)
        assert code == 2
        assert told in said
        assert said.count("\n") == 1
        assert (tmp_path / "run").exists() == (folder == alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "rouds=3"], "did you mean 'rounds'"),
        (["trian"], "No such command"),
        (["resume", "nowhere"], "is nowhere the folder of a run?"),
        (["report", "nowhere", "--output", "report.html"], "nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["data", "inspect", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    photon_here: Callable[..., tuple[int, str]],
) -> None:
    code, said = photon_here(*arguments)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["trian"], "train"),
        (["data", "prepar"], "prepare"),
        (["silo", "aprove"], "approve"),
        (["aggregator", "ini"], "init"),
        (["bench", "bixbench", "rnu"], "run"),
    ],
)
def test_a_misspelt_command_is_suggested_once(
    typed: list[str], meant: str, photon_here: Callable[..., tuple[int, str]]
) -> None:
    code, said = photon_here(*typed)
    assert code == 2
    assert said.count("Did you mean") == said.count(f"{meant!r}") == 1


def test_help_explains_every_command_quickly(tmp_path: Path) -> None:
    done = photon("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("train", "resume", "evaluate", "generate", "export", "report", "data"):
        assert command in done.stdout
    modules = ("torch", "transformers", "flwr")
    heavy = f"import photon.commands.app, sys; sys.exit(any(m in sys.modules for m in {modules}))"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0, (
        "a light command imports heavy modules"
    )


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "rouds=3"], "did you mean 'rounds'?"),
        (["resume", "nowhere"], "is nowhere the folder of a run?"),
        (["export", "nowhere", "out"], "nowhere: no such folder"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["chat", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_is_mistyped_is_told_before_anything_heavy_is_imported(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    code = (
        "import sys, photon.cli\n"
        f"sys.argv = ['photon', *{arguments!r}]\n"
        "try:\n    photon.cli.main()\n"
        "finally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == "False False\n"


def test_a_sweep_trains_every_combination_and_compares_them(corpus: Path, tmp_path: Path) -> None:
    done = photon(
        *("train", "-m", *SMALL, f"data.path={corpus}", "cohort=2", "rounds=2"),
        *("outer=fedavg,diloco", "strategy=photon"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "runs").iterdir()
    runs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert runs == ["0-outer=fedavg", "1-outer=diloco"]
    hashes = {json.loads((sweep / run / "summary.json").read_text())["weights_sha256"] for run in runs}
    assert len(hashes) == 2
    report = (sweep / "report.html").read_text()
    assert all(run in report for run in runs)


def test_a_sweep_with_a_wrong_value_trains_nothing(
    corpus: Path, tmp_path: Path, photon_here: Callable[..., tuple[int, str]]
) -> None:
    code, said = photon_here("train", "-m", *SMALL, f"data.path={corpus}", "outer=fedavg,dilocco")
    assert code == 2
    assert "did you mean 'diloco'" in said
    assert not (tmp_path / "runs").exists()


def test_a_sweep_over_text_that_is_not_there_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, photon_here: Callable[..., tuple[int, str]]
) -> None:
    code, said = photon_here("train", "-m", *SMALL, f"data.path={corpus},elsewhere", "hydra.sweep.dir=s")
    assert code == 2
    assert "data.path: " in said
    assert str(tmp_path / "elsewhere") in said
    assert not any(path.is_dir() for path in (tmp_path / "s").glob("*"))


@pytest.mark.slow
def test_a_sweep_in_parallel_with_joblib(corpus: Path, tmp_path: Path) -> None:
    done = photon(
        *("train", "-m", *SMALL, f"data.path={corpus}", "cohort=2", "rounds=2", "seed=0,1"),
        *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs").glob("*/*/summary.json"))) == 2
