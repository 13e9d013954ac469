"""Do runs with the code of one checkout; a script of its own, because that code is found by PYTHONPATH.

    PYTHONPATH=CHECKOUT python tests/golden/drive.py JOBS.json RESULT.json

Nothing of the present tree is imported, and of Photon's modules only the command line, which does not move.
The exception is `_on_nodes`: no command gives a node config without Flower's processes. What it needs is
looked up under the names that it has had.

Every step is done in a process that is forked from this one. So runs see nothing of one another, one can be
killed, and the imports, which take longer than the runs, are paid for once.
"""

import atexit
import hashlib
import importlib
import inspect
import json
import math
import os
import pkgutil
import platform
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

#: What a step may be at most; the slowest start Flower's processes on a machine that does other things too.
STEP_SECONDS = 300.0

#: Modules that runs import late and that take long.
LATE_IMPORTS = ("transformers.models.gpt2.modeling_gpt2", "flwr.serverapp", "flwr.clientapp", "hydra")

#: What of a processor, and which packages beside torch, the bits of a run may depend on.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "sve", "bf16")
PACKAGES = ("numpy", "transformers", "tokenizers", "zstandard")

#: Names of what `_on_nodes` needs, the newest first.
COMPOSE = ("photon.config.compose:compose", "photon.config:compose")
GRID = ("photon.engine.inprocess:InProcessGrid", "photon.federation.grid:InProcessGrid")
ANSWER = ("photon.client_app:answer",)
CLIENT_APP = ("photon.client_app:app",)
RUN = ("photon.federation.run",)


def main(jobs_file: str, result_file: str) -> None:
    """Do the jobs in a file, in order, and write which failed, how long they took, and on what machine."""
    jobs = json.loads(Path(jobs_file).read_text())
    _import_everything()
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for job in jobs:
        begin = _seconds()
        for step in job["steps"]:
            problem = _do(step, Path(job["folder"]))
            if problem is not None:
                failed[job["name"]] = problem
                break
        seconds[job["name"]] = round(_seconds() - begin, 2)
    result = {"machine": machine(), "failed": failed, "seconds": seconds}
    Path(result_file).write_text(json.dumps(result, indent=1))


def _seconds() -> float:
    """Return the processor time of the steps so far, but for workers that end by themselves."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine() -> str:
    """Return what the bits of a run depend on beside its code: the processor, and the builds that compute."""
    import torch

    processor = _processor()
    known = processor.get("flags", processor.get("Features", "")).split()
    flags = [flag for flag in FLAGS if flag in known]
    model = [processor.get(key, "") for key in ("model name", "cpu family", "model", "stepping")]
    switches = [
        f"{name}={os.environ[name]}"
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
        if name in os.environ
    ]
    parts = [
        " ".join(filter(None, [platform.system(), platform.machine(), *model])),
        " ".join(flags),
        f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
        f"oneDNN {'on' if torch.backends.mkldnn.is_available() else 'off'}",
        *(f"{package} {version(package)}" for package in PACKAGES),
        *switches,
    ]
    return "; ".join(parts)


def _processor() -> dict[str, str]:
    """Return the facts of the first processor, where the system tells them in Linux's way."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"model name": platform.processor()}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _import_everything() -> None:
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    import photon

    found, wanted = Path(photon.__path__[0]).resolve().parent, Path(os.environ["PYTHONPATH"]).resolve()
    if found != wanted:
        sys.exit(f"photon is found in {found}, and not in {wanted}")
    for module in pkgutil.walk_packages(photon.__path__, "photon."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                # An optional package is missing; a run that needs it says so.
                sys.stderr.write(f"{module.name}: {error}\n")


def _do(step: Mapping[str, Any], folder: Path) -> str | None:
    """Do one step; return what went wrong."""
    if "remove" in step:
        shutil.rmtree(step["remove"])
        return None
    if "earlier" in step:
        as_earlier(Path(step["earlier"]))
        return None
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    process = os.fork()
    if process == 0:
        _child(step, log)
    status = _wait(process)
    if status is None:
        return f"not done after {STEP_SECONDS:g} s; see {log}"
    wanted = -signal.SIGKILL if "die" in step else 0
    if status != wanted:
        said = log.read_text(errors="replace").strip().splitlines()[-3:]
        return f"ended with {status} instead of {wanted}: {' | '.join(said)}"
    return None


def as_earlier(data: Path) -> None:
    """Rewrite prepared text in format 1, which all commits read.

    Its windows lack the token that is only told, and unigram models are of all tokens of windows.
    """
    manifest = json.loads((data / "manifest.json").read_text())
    if manifest["format"] == "photon-data/1":
        return
    manifest["format"] = "photon-data/1"
    counts: dict[str, dict[str, np.ndarray]] = {"train": {}, "validation": {}}
    for name, silo in manifest["silos"].items():
        for split, of_silos in counts.items():
            file = data / "silos" / name / f"{split}.npy"
            windows = np.load(file)[:, :-1]
            np.save(file, windows)
            silo[split]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            of_silos[name] = np.bincount(windows.reshape(-1), minlength=manifest["vocab_size"])
        np.save(data / "silos" / name / "unigram.npy", counts["train"][name].astype(np.int64))
    union = np.sum(list(counts["train"].values()), axis=0)
    for name, silo in manifest["silos"].items():
        silo["unigram_loss"] = _unigram_loss(union, counts["validation"][name])
        silo["own_unigram_loss"] = _unigram_loss(counts["train"][name], counts["validation"][name])
    manifest["unigram_loss"] = _unigram_loss(union, np.sum(list(counts["validation"].values()), axis=0))
    manifest["unigram_perplexity"] = math.exp(manifest["unigram_loss"])
    (data / "manifest.json").write_text(json.dumps(manifest))


def _unigram_loss(train: np.ndarray, validation: np.ndarray) -> float:
    log_probability = np.log(train + 1.0) - math.log(float(train.sum()) + len(train))
    return float(-(validation * log_probability).sum() / validation.sum())


def _wait(process: int) -> int | None:
    deadline = time.monotonic() + STEP_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def _child(step: Mapping[str, Any], log: Path) -> None:
    """Do a step in a process that was forked for it, which ends here."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if "die" in step:
            _die_at(**step["die"])
        if "nodes" in step:
            _on_nodes(step["overrides"], step["run_dir"], step["nodes"])
        else:
            _command(step["command"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # Processes that train together are stopped by what was registered.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str]) -> None:
    sys.argv = ["photon", *arguments]
    _found("photon.cli:main")()


def _die_at(rename: str, count: int) -> None:
    """Kill this process when it is about to give a file or folder its final name for the ``count``-th time.

    Parameters
    ----------
    rename
        Regular expression that is searched in the final path.
    """
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and re.search(rename, os.fspath(arguments[1])):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _on_nodes(overrides: list[str], run_dir: str, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Train as a deployment does, but for Flower's processes: nodes have a node config each."""
    run = _found(*RUN)
    config = _found(*COMPOSE)([*overrides, f"run_dir={run_dir}"])
    grid_type = _found(*GRID)
    # A grid is given the ClientApp of its nodes, or a function that answers for them.
    wants_app = "client_app" in inspect.signature(grid_type).parameters
    answer = _found(*(CLIENT_APP if wants_app else ANSWER))
    grid = grid_type(answer, {int(node): settings for node, settings in nodes.items()})
    run.run_federation(run.prepare_run(config), grid, resume=False, live=False)


def _found(*names: str) -> Callable[..., Any] | Any:
    """Return the first of modules, or of ``module:attribute``, that is there."""
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        return getattr(found, attribute) if attribute else found
    raise ModuleNotFoundError(f"none of {', '.join(names)}; add the present name to {__file__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
