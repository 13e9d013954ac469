import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from photon.config.schema import Component, ModelSection
from photon.data.loader import WindowStream
from photon.errors import PhotonError
from photon.models.build import build_model
from photon.models.vocabulary import pack_vocabulary
from photon.state.tensors import save_groups
from photon.training.device_job import GroupJob
from photon.training.devices import ProcessGroup, stop_group, train_in_group
from photon.training.groups import read_optimizer, read_params
from photon.training.loop import LocalTrainer, TrainingDiverged, build_optimizer
from photon.training.schedule import build_schedule
from tests.training.tiny_lm import VOCABULARY, random_windows

OPTIMIZER = {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.1}
SCHEDULE = {"_target_": "photon.training.schedule.CosineSchedule", "steps": 20, "warmup_steps": 4}
# Odd sizes, so that shards are uneven.
MODEL = ModelSection.model_validate(
    {
        "name": "tiny",
        "architecture": {
            "model_type": "gpt2",
            "n_embd": 6,
            "n_layer": 2,
            "n_head": 2,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        "config_file": None,
        "vocab_size": VOCABULARY,
        "sequence_length": 8,
        "warm_start": None,
        "recipe": {
            "learning_rate": 0.01,
            "batch_size": 4,
            "local_batch_size": 4,
            "steps": 20,
            "warmup_steps": 4,
        },
    }
)


@pytest.fixture(autouse=True, scope="module")
def group_is_stopped() -> Iterator[None]:
    yield
    stop_group()


def group_pids() -> set[int]:
    """Return the processes of the group that this process keeps."""
    return {
        child.pid
        for child in psutil.Process().children()
        if "photon.training.device_process" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE
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


def job(folder: Path, **changes: object) -> GroupJob:
    path = folder / "train.npy"
    np.save(path, random_windows())
    fields = {
        "model": MODEL,
        "vocab_size": VOCABULARY,
        "optimizer": Component.model_validate(OPTIMIZER),
        "schedule": Component.model_validate(SCHEDULE),
        "total_steps": 20,
        "batch_size": 4,
        "micro_batch_size": None,
        "clip_norm": 0.5,
        "precision": "fp32",
        "parallel": "ddp",
        "device": "cpu",
        "windows": [path],
        "stream_seed": 3,
        "position": 0,
        "global_step": 0,
        "steps": 3,
    }
    return GroupJob.model_validate(fields | changes)


class OneProcess:
    """The same training in this process."""

    def __init__(self) -> None:
        self.model = build_model(MODEL, VOCABULARY, seed=1)
        self.optimizer = build_optimizer(OPTIMIZER, self.model)
        self.stream = WindowStream([random_windows()], seed=3)
        self.trainer = LocalTrainer(
            self.model,
            self.optimizer,
            build_schedule(SCHEDULE, 20, 4),
            batch_size=4,
            micro_batch_size=None,
            clip_norm=0.5,
            precision="fp32",
            device=torch.device("cpu"),
        )

    def train(self, steps: int):
        return self.trainer.train(self.stream, global_step=self.stream.position // 4, steps=steps)

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


@pytest.mark.parametrize(
    ("parallel", "micro"), [pytest.param("ddp", 1, marks=pytest.mark.slow), ("fsdp", None)]
)
def test_two_processes_continue_like_one(tmp_path, parallel, micro):
    one = OneProcess()
    one.train(2)
    state = one.state()
    task = job(tmp_path, parallel=parallel, micro_batch_size=micro, position=8, global_step=2)
    trained = train_in_group(task, *state, processes=2, folder=tmp_path / "job")

    expected = one.train(3)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert expected.gradient_norm > 0.5  # the clip is at work
    assert trained.position == one.stream.position == 20
    assert trained.result.tokens == expected.tokens
    assert trained.result.learning_rate == expected.learning_rate
    for field in ("loss", "loss_last", "gradient_norm"):
        assert getattr(trained.result, field) == pytest.approx(getattr(expected, field), rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_same_processes_take_the_next_job_and_forget_the_last(tmp_path, parallel):
    one = OneProcess()
    params = one.state()[0]

    def fit(state, folder, **changes):
        return train_in_group(
            job(tmp_path, parallel=parallel, **changes), *state, processes=2, folder=tmp_path / folder
        )

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


def test_a_softmax_over_some_tokens_is_the_same_in_two_processes(tmp_path):
    one, few, windows = OneProcess(), torch.arange(VOCABULARY) < 7, random_windows() % 7
    params = one.state()[0]
    task = job(tmp_path, vocabulary=pack_vocabulary(few))
    np.save(task.windows[0], windows)
    trained = train_in_group(task, params, {}, {}, processes=2, folder=tmp_path / "job")
    one.stream = WindowStream([windows], seed=3)
    expected = one.trainer.train(one.stream, global_step=0, steps=3, vocabulary=few)
    assert_state_equal(one, trained.params, trained.groups, trained.scalars)
    assert trained.result.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("why", ["a process died", pytest.param("another job", marks=pytest.mark.slow)])
def test_a_group_that_no_longer_serves_is_replaced(tmp_path, why):
    params = OneProcess().state()[0]

    def fit(**changes):
        trained = train_in_group(
            job(tmp_path, steps=1, **changes), params, {}, {}, processes=2, folder=tmp_path / "job"
        )
        return trained.params, group_pids()

    first, pids = fit()
    if why == "another job":
        other, others = fit(optimizer=Component.model_validate({"_target_": "torch.optim.SGD", "lr": 0.1}))
        assert not torch.equal(other["transformer.wte.weight"], first["transformer.wte.weight"])
    else:
        os.kill(min(pids), signal.SIGKILL)
        wait_until_gone({min(pids)})
        again, others = fit()
        assert all(torch.equal(again[name], first[name]) for name in params)
    assert len(others) == 2
    assert not others & pids
    wait_until_gone(pids)


PARENT = """
import pathlib, sys, time
from photon.training.device_job import GroupJob
from photon.training.devices import train_in_group
from photon.state.tensors import load_groups
folder = pathlib.Path(sys.argv[1])
job = GroupJob.model_validate_json((folder / "job.json").read_text())
params = load_groups(folder / "start.safetensors")["params"]
train_in_group(job, params, {}, {}, processes=2, folder=folder / "job")
print("trained", flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


@pytest.mark.parametrize("way", ["killed", pytest.param("ends", marks=pytest.mark.slow)])
def test_the_processes_end_with_the_one_that_started_them(tmp_path, way):
    save_groups(tmp_path / "start.safetensors", {"params": OneProcess().state()[0]})
    (tmp_path / "job.json").write_text(job(tmp_path, steps=1).model_dump_json(by_alias=True))
    command = [*python(PARENT), str(tmp_path), "stay" if way == "killed" else "end"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
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
        train_in_group(job(tmp_path), params, {}, {}, processes=2, folder=tmp_path / "job")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ranks(count: int) -> list[dict[str, str]]:
    return [dict(os.environ) | {"RANK": str(rank)} for rank in range(count)]


def test_a_crash_is_told_and_the_others_are_stopped(tmp_path):
    code = f"""
import os, pathlib, time
folder, rank = pathlib.Path(r"{tmp_path}"), os.environ["RANK"]
(folder / f"pid-{{rank}}").write_text(str(os.getpid()))
while len(list(folder.glob("pid-*"))) < 3:
    time.sleep(0.01)
if rank == "1":
    raise ValueError("the disk is on fire")
time.sleep(60)
"""
    started = time.monotonic()
    with pytest.raises(
        PhotonError, match=r"process 1 of 3 ended with exit code 1; .*ValueError: the disk is on fire"
    ):
        ProcessGroup(python(code), ranks(3), tmp_path).work(tmp_path)
    assert time.monotonic() - started < 30
    for rank in (0, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)


def test_a_killed_process_is_told(tmp_path):
    with pytest.raises(PhotonError, match=r"process 0 of 1 was killed by signal 9; .* it said: nothing"):
        ProcessGroup(python("import os; os.kill(os.getpid(), 9)"), ranks(1), tmp_path).work(tmp_path)


def test_a_process_that_leaves_without_an_answer_is_told(tmp_path):
    with pytest.raises(PhotonError, match=r"process 0 of 2 ended with exit code 0; .* it said: nothing"):
        ProcessGroup(python("import sys; print('done?')"), ranks(2), tmp_path).work(tmp_path)


def test_user_errors_come_through_as_they_were_said(tmp_path):
    code = "import sys; sys.stderr.write('some noise\\nset x=1\\n'); sys.exit(2)"
    with pytest.raises(PhotonError, match=r"^set x=1$"):
        ProcessGroup(python(code), ranks(2), tmp_path).work(tmp_path)


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 3, "processes=3 does not divide batch_size=4"),
        ({"micro_batch_size": 4}, 2, "does not divide the 2 sequences"),
        ({"parallel": "fsdp", "precision": "fp16"}, 2, "fsdp works in bf16 and fp32 alone"),
        ({"device": "cuda"}, 2, "this machine has 0 GPUs"),
    ],
)
def test_jobs_that_cannot_be_shared_are_refused(tmp_path, monkeypatch, changes, processes, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PhotonError, match=message):
        train_in_group(job(tmp_path, **changes), {}, {}, {}, processes=processes, folder=tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_a_process_that_dies_as_the_job_is_handed_over_is_replaced(tmp_path, monkeypatch):
    """A dying process counts as alive until its last thread is gone."""
    params = OneProcess().state()[0]

    def fit():
        return train_in_group(job(tmp_path, steps=1), params, {}, {}, processes=2, folder=tmp_path / "job")

    fit()
    pids = group_pids()
    os.kill(min(pids), signal.SIGKILL)
    wait_until_gone({min(pids)})
    asked = iter([True])
    alive = ProcessGroup.alive.fget
    monkeypatch.setattr(ProcessGroup, "alive", property(lambda group: next(asked, None) or alive(group)))
    fit()
    assert min(pids) not in group_pids()
