import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from photon.code import command
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.models.build import build_model
from photon.models.vocabulary import pack_vocabulary
from photon.objective.configured import objective_of
from photon.silo.runtime import as_trained
from photon.state.tensors import save_groups
from photon.training.device_job import GroupJob, GroupState
from photon.training.devices import GroupResult, ProcessGroup, stop_group, train_in_group
from photon.training.groups import read_optimizer, read_params
from photon.training.loop import LocalTrainer, TrainingDiverged, TrainResult, build_optimizer
from photon.training.schedule import build_schedule
from tests.conftest import composed
from tests.silo.hooked_process import Controlled, Proximal
from tests.training.tiny_lm import VOCABULARY, random_windows, stream

#: Odd sizes, so that shards are uneven.
OVERRIDES = [
    "model.architecture.n_layer=2",
    "model.architecture.n_embd=6",
    "model.architecture.n_head=2",
    "model.sequence_length=8",
    f"model.vocab_size={VOCABULARY}",
    "federation=inprocess",
    "data=prepared",
    "data.path=elsewhere",
    "rounds=2",
    "local_steps=10",
    "optimizer.lr=0.01",
    "optimizer.weight_decay=0.1",
    "schedule.warmup_steps=4",
    "schedule.steps=20",
    "training.batch_size=4",
    "training.clip_norm=0.5",
    "training.processes=2",
    "training.threads=1",
]


@pytest.fixture(autouse=True, scope="module")
def group_is_stopped() -> Iterator[None]:
    yield
    stop_group()


GROUP_PROGRAM = command("photon.silo.group_process")


def group_pids(program: Sequence[str] = GROUP_PROGRAM) -> set[int]:
    """Return the processes of the group that this process keeps."""
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and child.cmdline()[1:] == list(program)[1:]
    }


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pids: set[int], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < end, f"{pids} live on"
        time.sleep(0.02)


def config_of(*overrides: str) -> RunConfig:
    # Some gradients are 0 but for rounding, of which Adam makes steps.
    eps = [] if "optimizer=sgd" in overrides else ["optimizer.eps=1e-6"]
    return composed(*OVERRIDES, *eps, *overrides)


def job(folder: Path, *overrides: str, windows: np.ndarray | None = None, **changes: object) -> GroupJob:
    config, path = config_of(*overrides), folder / "train.npy"
    windows = random_windows() if windows is None else windows
    np.save(path, windows)
    fields = {
        "config": as_trained(config.text),
        "vocab_size": VOCABULARY,
        "batch_size": 4,
        "precision": "fp32",
        "device": "cpu",
        "arrays": {name: [path] for name in objective_of(config).arrays},
        "sequence_length": windows.shape[1],
        "stream_seed": 3,
        "position": 0,
        "global_step": 0,
        "steps": 3,
        "draw_seed": 7,
    }
    return GroupJob.model_validate(fields | changes)


def fit_in_two(task: GroupJob, folder: Path, *state: object, **groups: object):
    return train_in_group(
        task,
        GroupState(*state, **groups),
        folder=folder,
        program=GROUP_PROGRAM,
    )


@pytest.fixture
def fit_anew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GroupResult]:
    """Train in two processes that build everything anew for each job, and are there for all tests' jobs."""
    monkeypatch.setattr(GroupJob, "fixed", lambda job: "any")

    def fit(task: GroupJob, folder: Path, *state: object, **groups: object) -> GroupResult:
        program = [sys.executable, "-m", "tests.silo.hooked_process"]
        return train_in_group(task, GroupState(*state, **groups), folder=folder, program=program)

    return fit


class OneProcess:
    """The same training in this process."""

    def __init__(self, *overrides: str, windows: np.ndarray | None = None) -> None:
        config = config_of(*overrides)
        self.model = build_model(config.model, VOCABULARY, seed=1)
        self.optimizer = build_optimizer(config.optimizer.as_mapping(), self.model)
        self.stream = stream(seed=3, windows=windows)
        self.trainer = LocalTrainer(
            self.model,
            self.optimizer,
            build_schedule(config.schedule.as_mapping(), config.total_steps, 4),
            loss=objective_of(config).loss,
            count=objective_of(config).count,
            batch_size=4,
            micro_batch_size=config.training.micro_batch_size,
            clip_norm=0.5,
            precision="fp32",
            device=torch.device("cpu"),
        )

    def train(self, steps: int, **more: object):
        return self.trainer.train(self.stream, global_step=self.stream.position // 4, steps=steps, **more)

    def state(self):
        groups, scalars = read_optimizer(self.model, self.optimizer)
        copies = {
            group: {name: tensor.clone() for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        params = {name: tensor.clone() for name, tensor in read_params(self.model).items()}
        return params, copies, scalars


def assert_state_equal(one, params, groups, scalars):
    expected_params, expected_groups, expected_scalars = one.state()
    assert scalars == expected_scalars
    assert groups.keys() == expected_groups.keys()
    for name, ours in {**groups, "params": params}.items():
        theirs = {**expected_groups, "params": expected_params}[name]
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


def own(parallel: str, micro: int | None = None) -> list[str]:
    return [f"training.parallel={parallel}", *([f"training.micro_batch_size={micro}"] if micro else [])]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_same_processes_take_the_next_job_and_forget_the_last(tmp_path, parallel):
    one = OneProcess()
    params = one.state()[0]

    def fit(state, folder, **changes):
        return fit_in_two(job(tmp_path, *own(parallel), **changes), tmp_path / folder, *state)

    first = fit((params, {}, {}), "first")
    pids = group_pids()
    assert len(pids) == 2
    state = (first.params, first.groups, first.scalars)
    second = fit(state, "second", position=first.position, global_step=3, steps=2)
    one.train(5)
    assert_state_equal(one, second.params, second.groups, second.scalars)
    # From the start once more, with neither moments nor parameters nor text of the jobs in between.
    again = fit((params, {}, {}), "first")
    assert group_pids() == pids
    assert again.result.loss == first.result.loss
    assert all(torch.equal(again.params[name], first.params[name]) for name in params)
    assert (tmp_path / "second" / "rank-1.log").exists()


@pytest.mark.slow
def test_another_job_is_not_done_by_processes_that_were_built_for_the_last(tmp_path):
    params = OneProcess().state()[0]

    def fit(*overrides):
        trained = fit_in_two(job(tmp_path, *overrides, steps=1), tmp_path / "job", params)
        return trained.params, group_pids()

    first, pids = fit()
    other, others = fit("optimizer=sgd", "optimizer.lr=0.1")
    assert not torch.equal(other["transformer.wte.weight"], first["transformer.wte.weight"])
    assert len(others) == 2
    assert not others & pids
    wait_until_gone(pids)


#: Processes that train nothing: who is kept, and who is replaced, is decided by the one that starts them.
IDLE = """
import json, os, pathlib, shutil, sys
for line in sys.stdin:
    folder, rank = pathlib.Path(json.loads(line)), os.environ["RANK"]
    (folder / f"rank-{rank}.log").touch()
    if rank == "0":
        shutil.copytree(folder, folder / "trained")
        shutil.copy(folder.parent / "result.json", folder / "trained")
    os.write(1, b"done\\n")
"""


@pytest.fixture
def fit_idly(tmp_path: Path) -> Callable[..., set[int]]:
    """Give a job to processes that train nothing, and return which did it."""
    program = [sys.executable, "-c", IDLE]
    result = TrainResult(1, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)
    (tmp_path / "result.json").write_text(json.dumps({"position": 4, "result": vars(result)}))
    params = {"w": torch.ones(2)}

    def fit(*overrides: str) -> set[int]:
        task, state = job(tmp_path, *overrides, steps=1), GroupState(params)
        trained = train_in_group(task, state, folder=tmp_path / "job", program=program)
        assert torch.equal(trained.params["w"], params["w"])
        return group_pids(program)

    return fit


@pytest.mark.few(1)
@pytest.mark.parametrize("why", ["a process died", "another job"])
def test_a_group_that_no_longer_serves_is_replaced(fit_idly, why):
    pids = fit_idly()
    assert fit_idly() == pids
    if why == "another job":
        others = fit_idly("optimizer=sgd", "optimizer.lr=0.1")
    else:
        os.kill(min(pids), signal.SIGKILL)
        wait_until_gone({min(pids)})
        others = fit_idly()
    assert len(others) == 2
    assert not others & pids
    wait_until_gone(pids)


def test_a_process_that_dies_as_the_job_is_handed_over_is_replaced(fit_idly, monkeypatch):
    """A dying process counts as alive until its last thread is gone."""
    pids = fit_idly()
    os.kill(min(pids), signal.SIGKILL)
    wait_until_gone({min(pids)})
    asked = iter([True])
    alive = ProcessGroup.alive.fget
    monkeypatch.setattr(ProcessGroup, "alive", property(lambda group: next(asked, None) or alive(group)))
    others = fit_idly()
    assert len(others) == 2
    assert min(pids) not in others


PARENT = """
import pathlib, sys, time
from photon.code import command
from photon.training.device_job import GroupJob, GroupState
from photon.training.devices import train_in_group
from photon.state.tensors import load_groups
folder = pathlib.Path(sys.argv[1])
job = GroupJob.model_validate_json((folder / "job.json").read_text())
params = load_groups(folder / "start.safetensors")["params"]
program = command("photon.silo.group_process")
train_in_group(job, GroupState(params), folder=folder / "job", program=program)
print("trained", flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


# A worker that is killed takes its group with it by default, too: see tests/silo/test_worker.py.
@pytest.mark.slow
@pytest.mark.parametrize("way", ["killed", "ends"])
def test_the_processes_end_with_the_one_that_started_them(tmp_path, way):
    save_groups(tmp_path / "start.safetensors", {"params": OneProcess().state()[0]})
    (tmp_path / "job.json").write_text(job(tmp_path, steps=1).model_dump_json())
    parent_command = [sys.executable, "-c", PARENT, str(tmp_path), "stay" if way == "killed" else "end"]
    with subprocess.Popen(parent_command, stdout=subprocess.PIPE, text=True) as parent:
        seen: set[int] = set()
        if way == "killed":
            assert parent.stdout.readline() == "trained\n"
            seen = {child.pid for child in psutil.Process(parent.pid).children()}
            assert len(seen) == 2
            parent.kill()
        else:
            while parent.poll() is None:
                seen |= {child.pid for child in psutil.Process(parent.pid).children()}
                time.sleep(0.05)
            assert len(seen) == 2
            assert parent.returncode == 0
    wait_until_gone(seen)


@pytest.mark.slow
def test_divergence_is_told_as_in_one_process(tmp_path):
    params = OneProcess().state()[0]
    params["transformer.wte.weight"][0] = torch.nan
    with pytest.raises(TrainingDiverged, match="at local step 0"):
        fit_in_two(job(tmp_path), tmp_path / "job", params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.processes=3", "training.batch_size=3"], "processes=3 does not divide batch_size=4"),
        (["training.micro_batch_size=4"], "does not divide the 2 sequences"),
        (["training.parallel=fsdp", "fp16"], "fsdp works in bf16 and fp32 alone"),
        (["cuda"], "this machine has 0 GPUs"),
    ],
)
def test_jobs_that_cannot_be_shared_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    overrides = [change for change in changes if "=" in change]
    device, precision = "cuda" if "cuda" in changes else "cpu", "fp16" if "fp16" in changes else "fp32"
    task = job(tmp_path, *overrides, device=device, precision=precision)
    with pytest.raises(PhotonError, match=message):
        fit_in_two(task, tmp_path / "job", {})
    assert not (tmp_path / "job").exists()


# --- two processes compute what one does -------------------------------------------------------------------


@pytest.mark.parametrize(("parallel", "micro"), [("ddp", 1), ("fsdp", None)])
def test_two_processes_continue_like_one(tmp_path, fit_anew, parallel, micro):
    one = OneProcess()
    one.train(2)
    state = one.state()
    task = job(tmp_path, *own(parallel, micro), position=8, global_step=2)
    trained = fit_anew(task, tmp_path / "job", *state)

    expected = one.train(3)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert expected.gradient_norm > 0.5  # the clip is at work
    assert trained.position == one.stream.position == 20
    assert trained.result.tokens == expected.tokens
    assert trained.result.learning_rate == expected.learning_rate
    for field in ("loss", "loss_last", "gradient_norm"):
        assert getattr(trained.result, field) == pytest.approx(getattr(expected, field), rel=1e-5)


ABBIE = ["model.abbie={head_blocks: 0, body_blocks: 1, tail_blocks: 1, train_iterations: 3}"]


@pytest.mark.parametrize(
    ("parallel", "more"),
    [("ddp", []), ("fsdp", []), ("fsdp", ["training.activation_checkpointing=true"])],
)
def test_a_body_that_iterates_is_trained_alike_in_two_processes(tmp_path, fit_anew, parallel, more):
    one = OneProcess(*ABBIE)
    params = one.state()[0]
    trained = fit_anew(job(tmp_path, *own(parallel), *ABBIE, *more), tmp_path / "job", params)
    expected = one.train(3)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert trained.result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert trained.result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)


def test_a_softmax_over_some_tokens_is_the_same_in_two_processes(tmp_path, fit_anew):
    few, windows = torch.arange(VOCABULARY) < 7, random_windows() % 7
    one = OneProcess(windows=windows)
    params = one.state()[0]
    trained = fit_anew(job(tmp_path, windows=windows, rows=pack_vocabulary(few)), tmp_path / "job", params)
    expected = one.train(3, rows=few)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert trained.result.loss == pytest.approx(expected.loss, rel=1e-5)


TOY = ["objective._target_=tests.objective.toy.Masked", "+objective.below=5"]


@pytest.mark.parametrize(("parallel", "micro"), [("ddp", 1), ("ddp", None), ("fsdp", 1)])
def test_a_masked_loss_in_two_processes_is_that_of_the_whole_batch(tmp_path, fit_anew, parallel, micro):
    one = OneProcess(*TOY)
    task = job(tmp_path, *TOY, *own(parallel, micro))
    trained = fit_anew(task, tmp_path / "job", one.state()[0])
    counts = [int((batch[:, 1:] < 5).sum()) for batch in stream(seed=3).next_batch(4)["tokens"].split(2)]
    assert counts[0] != counts[1], "the processes have different shares"
    expected = one.train(3)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    for field in ("loss", "loss_last", "gradient_norm"):
        assert getattr(trained.result, field) == pytest.approx(getattr(expected, field), rel=1e-5)
    assert trained.result.figures == pytest.approx(expected.figures, rel=1e-5)


def test_unequal_processes_have_the_mean_of_all_items_not_of_means(tmp_path, fit_anew):
    """One item costs 1, three cost 2: 7/4, where the mean of the processes' means is 3/2."""
    windows = np.array([[1, 0, 0], [2, 2, 2]], dtype=np.uint16)
    target = "objective._target_=tests.objective.toy.Costs"
    changes = ["training.batch_size=2", "training.clip_norm=null", "model.sequence_length=3"]
    task = job(tmp_path, target, *changes, windows=windows, batch_size=2, steps=1)
    params = OneProcess(target, *changes).state()[0]
    assert fit_anew(task, tmp_path / "job", params).result.loss == 1.75


#: Adam makes whole steps of what a term leaves of rounding.
SGD = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"]


def control_of(params):
    return {name: torch.full_like(tensor, 0.3) for name, tensor in params.items()}


def test_a_term_in_two_processes_is_that_of_one(tmp_path, fit_anew):
    one, bare = OneProcess(*SGD), OneProcess(*SGD)
    params = one.state()[0]
    task = job(tmp_path, *SGD, *own("ddp", 1), steps=4)
    trained = fit_anew(task, tmp_path / "term", params, context={"received": params})
    expected = one.train(4, hooks=Proximal().hooks({"received": params}, {}))
    bare.train(4)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert trained.result.loss == pytest.approx(expected.loss, rel=1e-5)
    name = "transformer.wte.weight"
    assert (trained.params[name] - bare.state()[0][name]).abs().max() > 1e-4, "the term matters"
    assert trained.collected == {}


@pytest.mark.parametrize(("parallel", "micro"), [("ddp", 1), ("fsdp", None), ("fsdp", 1)])
def test_gradients_are_corrected_in_two_processes_as_in_one(tmp_path, fit_anew, parallel, micro):
    one = OneProcess()
    params = one.state()[0]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    context = {"received": params, "control": control_of(params)}
    task = job(tmp_path, *own(parallel, micro), steps=4)
    trained = fit_anew(task, tmp_path / "correct", params, context=context, collected={"raw": zeros})
    collected = {"raw": {name: torch.zeros_like(tensor) for name, tensor in params.items()}}
    expected = one.train(4, hooks=Controlled().hooks(context, collected))
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert trained.result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    for name, raw in trained.collected["raw"].items():
        torch.testing.assert_close(raw, collected["raw"][name], rtol=1e-4, atol=1e-6)
    assert trained.collected["raw"].keys() == params.keys()


@pytest.mark.slow
def test_a_term_over_sharded_parameters_is_refused_in_one_line(tmp_path, fit_anew):
    """The last of those that share two processes, because a refusal ends them."""
    params = OneProcess().state()[0]
    task = job(tmp_path, *own("fsdp"))
    with pytest.raises(PhotonError, match=r"^training.parallel=fsdp: .*; set training.parallel=ddp$"):
        fit_anew(task, tmp_path / "term", params, context={"received": params})
