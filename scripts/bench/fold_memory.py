"""The server of one round in a process of its own, watched from outside: the memory part of ``fold.py``."""

import json
import logging
import math
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common import Report

MEBI = 2**20
SEQUENCE_LENGTH = 128

# --- replies ----------------------------------------------------------------------------------------


def shapes_of_model(size_mb: int) -> dict[str, int]:
    """Split ``size_mb`` MiB of float32 as a language model does: a quarter is embedding."""
    numbers = size_mb * MEBI // 4
    matrices = 48
    matrix = (numbers - numbers // 4) // matrices
    return {"embedding": numbers - matrix * matrices} | {f"h.{i}.weight": matrix for i in range(matrices)}


def value_of(number: int) -> float:
    """Return what every parameter of a silo's reply is; the mean over the silos is known then."""
    return 0.001 * (number + 1)


def filled(number: int, numbers: int) -> bytes:
    """Return float32 bytes without a temporary array; every page is really written."""
    return struct.pack("<f", value_of(number)) * numbers


def photon_records(number: int, shapes: dict[str, int]) -> Any:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from photon.link.records import FORMAT, HEADER, RAW

    arrays = {name: Array("float32", (n,), RAW, filled(number, n)) for name, n in shapes.items()}
    header = json.dumps({"format": FORMAT, "groups": {"params": {}}})
    return RecordDict({"params": ArrayRecord(arrays), HEADER: ConfigRecord({"header": header})})


def flower_arrays(number: int, shapes: dict[str, int]) -> Any:
    """Return what ``ArrayRecord`` of numpy arrays would be, made without the arrays."""
    import io

    import numpy as np
    from flwr.app import Array, ArrayRecord

    arrays = {}
    for name, numbers in shapes.items():
        begin = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": (numbers,)}
        np.lib.format.write_array_header_1_0(begin, header)
        data = b"".join([begin.getvalue(), filled(number, numbers)])
        arrays[name] = Array("float32", (numbers,), "numpy.ndarray", data)
    return ArrayRecord(arrays)


def flower_records(number: int, shapes: dict[str, int]) -> Any:
    from flwr.app import MetricRecord, RecordDict

    return RecordDict(
        {"arrays": flower_arrays(number, shapes), "metrics": MetricRecord({"num-examples": 1.0})}
    )


def check_mean(params: dict[str, Any], silos: int) -> None:
    expected = statistics.fmean(value_of(number) for number in range(silos))
    for name, tensor in params.items():
        for end in (0, -1):
            assert math.isclose(float(tensor[end]), expected, rel_tol=1e-5), (
                name,
                float(tensor[end]),
                expected,
            )


# --- memory -----------------------------------------------------------------------------------------


def compare_memory(report: Report, size: int, cohorts: list[int], outers: list[str]) -> None:
    """Measure Photon with every outer optimizer and Flower, for every size of cohort."""
    rows: list[list[str]] = []
    raw: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as folder:
        for outer in outers:
            for silos in cohorts:
                raw.append(measure({"who": "Photon", "silos": silos, "outer": outer}, size, folder))
        for silos in cohorts:
            case = {"who": "Flower", "silos": silos, "outer": "FedAvg"}
            # Every reply, the model, the accumulator, and room for the rest of the machine.
            needed = (silos + 4) * size * MEBI + 1024 * MEBI
            if available_memory() < needed:
                raw.append({**case, "left_out": f"needs {needed / 1e9:.0f} GB of free memory"})
                continue
            raw.append(measure(case, size, folder))
    for found in raw:
        name = [str(found[key]) for key in ("who", "outer", "silos")]
        if "left_out" in found:
            rows.append([*name, found["left_out"], "", ""])
            continue
        rows.append(
            [
                *name,
                f"{found['total'] / size / MEBI:.2f}",
                f"{found['anonymous'] / size / MEBI:.2f}",
                f"{found['cpu']:.1f}",
            ]
        )
    report.table(
        f"Peak memory of the server over its baseline, in models of {size} MiB (goal: 2.5)",
        ["server", "outer step", "silos", "total", "anonymous", "CPU s"],
        rows,
        raw=raw,
    )


def available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def measure(case: dict[str, Any], size_mb: int, folder: str) -> dict[str, Any]:
    """Run one case in its own process and watch its memory from outside."""
    case = {**case, "size_mb": size_mb, "folder": folder}
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(case)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{case}: the process ended early")
        baseline = json.loads(line)
        process.stdin.write("go\n")
        process.stdin.flush()
        anonymous = 0
        # The child's answer closes the measurement; till then its memory is sampled.
        os.set_blocking(process.stdout.fileno(), False)
        while not (line := process.stdout.readline()):
            if process.poll() is not None:
                raise SystemExit(f"{case}: the process ended with {process.returncode}")
            anonymous = max(anonymous, memory_of(process.pid, "RssAnon"))
            time.sleep(0.005)
        result = json.loads(line)
    finally:
        process.kill()
        process.wait()
    return {
        **case,
        "total": result["peak"] - baseline["total"],
        "anonymous": anonymous - baseline["anonymous"],
        "cpu": result["cpu"],
        "wall": result["wall"],
        "baseline": baseline,
    }


def memory_of(pid: int | str, key: str) -> int:
    """Return a memory figure of a process in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def play(case: dict[str, Any]) -> None:
    """Be the server of one case: import, say the baseline, run, say the peak."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work, check = (photon_server if case["who"] == "Photon" else flower_server)(case)
    print(
        json.dumps({"total": memory_of("self", "VmRSS"), "anonymous": memory_of("self", "RssAnon")}),
        flush=True,
    )
    sys.stdin.readline()
    # Forget the high-water mark of the preparation. (ru_maxrss cannot be reset, and begins at the parent's.)
    Path("/proc/self/clear_refs").write_text("5")
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    result = {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "peak": memory_of("self", "VmHWM"),
    }
    check()
    print(json.dumps(result), flush=True)


def photon_server(case: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch

    from photon.config.compose import compose
    from photon.federation.federation import Federation
    from photon.state.checkpoint import CheckpointStore
    from photon.telemetry.events import EventStream

    torch.set_num_threads(1)
    shapes = shapes_of_model(case["size_mb"])
    run_dir = Path(case["folder"]) / f"{case['outer']}-{case['silos']}"
    config = compose(
        [
            *("federation=inprocess", "data=prepared", "data.path=/nowhere", f"run_dir={run_dir}"),
            *(
                "rounds=2",
                "local_steps=1",
                "schedule.warmup_steps=0",
                "training.batch_size=1",
                f"cohort={case['silos']}",
            ),
            *(f"outer={case['outer']}", "checkpoint.keep=1", "telemetry.display=none"),
        ]
    )
    write_checkpoint(Path(case["folder"]), run_dir, case)
    grid = scripted_grid(case["silos"], lambda number: photon_records(number, shapes), photon=True)
    federation = Federation(config, grid, run_dir, EventStream([]))

    def check() -> None:
        checkpoint, _ = CheckpointStore(run_dir / "checkpoints").latest()
        assert checkpoint.state.round == 2
        if case["outer"] == "fedavg":
            check_mean(checkpoint.load_params(), case["silos"])
        shutil.rmtree(run_dir)

    def work() -> None:
        federation.run(resume=True)

    return work, check


def write_checkpoint(folder: Path, run_dir: Path, case: dict[str, Any]) -> None:
    """Put the checkpoint after round 1 in place, written by a process of its own.

    The outer optimizer has its state by then: the second round is like all that follow.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fold_memory;"
        f"fold_memory.make_checkpoint({str(run_dir)!r}, {case['size_mb']}, {case['outer']!r})"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], check=True, cwd=folder)


def make_checkpoint(run_dir: str, size_mb: int, outer: str) -> None:
    import torch

    from photon.config.compose import compose
    from photon.state.checkpoint import CheckpointStore, LedgerEntry, ServerState
    from photon.strategy.outer import OuterOptimizer

    params = {name: torch.full((n,), 0.5) for name, n in sorted(shapes_of_model(size_mb).items())}
    mean = {name: torch.full_like(tensor, 0.4) for name, tensor in params.items()}
    optimizer = OuterOptimizer(compose([f"outer={outer}"]).outer.as_mapping())
    _, groups, scalars = optimizer.step(params, mean, {}, {})
    state = ServerState(
        run_id="bench",
        round=1,
        global_step=1,
        tokens=1,
        outer_scalars=scalars,
        vocab_size=8192,
        sequence_length=SEQUENCE_LENGTH,
        tokenizer_sha256="0" * 64,
        # By which the server knows how large an update is; those of the first round wait for each other.
        ledger={"silo-000": LedgerEntry(last_round=1, position=1, sizes={"params": 0.5})},
    )
    CheckpointStore(Path(run_dir) / "checkpoints").save(state, params, groups)


def flower_server(case: dict[str, Any]) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch  # noqa: F401  (the baseline of both servers holds it)
    from flwr.serverapp.strategy import FedAvg

    import photon.federation.federation  # noqa: F401

    shapes = shapes_of_model(case["size_mb"])
    silos = case["silos"]
    grid = scripted_grid(silos, lambda number: flower_records(number, shapes), photon=False)
    results = []

    def work() -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=silos, min_available_nodes=silos)
        results.append(strategy.start(grid, flower_arrays(0, shapes), num_rounds=1))

    def check() -> None:
        arrays = results[0].arrays
        assert arrays is not None
        check_mean({"embedding": arrays["embedding"].numpy()}, silos)

    return work, check


def request_of(number: int) -> Any:
    """Return a train request, for replies that answer no message."""
    from photon.link.messages import TrainRequest

    return TrainRequest(
        run_id="bench",
        model_id="bench",
        round=1,
        silo=f"silo-{number:03d}",
        members=[f"silo-{number:03d}"],
        global_step=0,
        steps=1,
        batch_size=1,
        last_round=0,
        position=0,
        cohort=1,
    )


def report_on(request: Any) -> Any:
    """Return the report that answers ``request``."""
    from photon.link.messages import TrainReport

    return TrainReport(
        round=request.round,
        silo=request.silo,
        steps=request.steps,
        tokens=request.steps * request.batch_size * SEQUENCE_LENGTH,
        position=request.position + request.steps * request.batch_size,
        loss=1.0,
        loss_last=1.0,
        learning_rate=1e-3,
        gradient_norm=1.0,
        update_norm=1.0,
        seconds={"total": 1.0, "training": 1.0, "load": 0.0, "save": 0.0},
        state_lost=False,
    )


def scripted_grid(silos: int, content: Callable[[int], Any], *, photon: bool) -> Any:
    """Return a grid that keeps nothing of what it is sent and makes replies when they are pulled."""
    from flwr.app import Message, RecordDict

    from photon.engine.inprocess import InProcessGrid
    from photon.flower_compat import with_own_records
    from photon.link.answer import MessageType, NodeConfig
    from photon.link.messages import (
        BODY,
        Description,
        EvaluateReport,
        EvaluateRequest,
        SiloInfo,
        TrainRequest,
        pack,
        unpack,
    )

    def silo(number: int) -> SiloInfo:
        return SiloInfo(
            name=f"silo-{number:03d}",
            train_tokens=10**6,
            validation_tokens=10**4,
            unigram_loss=7.0,
            vocab_size=8192,
            sequence_length=SEQUENCE_LENGTH,
            tokenizer_sha256="0" * 64,
            device="none",
            roofline_flops=None,
        )

    def answer(message_type: MessageType, records: RecordDict, node: NodeConfig) -> RecordDict:
        number = int(node["partition-id"])
        if message_type == "query":
            return RecordDict({BODY: pack(Description(silos=[silo(number)]))})
        if message_type == "evaluate":
            asked = unpack(records, EvaluateRequest)
            report = EvaluateReport(round=asked.round, silo=asked.silo, loss=1.0, tokens=1)
            return RecordDict({BODY: pack(report)})
        reply = content(number)
        if photon:
            reply[BODY] = pack(report_on(unpack(records, TrainRequest)))
        return reply

    def body_alone(message: Message) -> Message:
        """Return a message without what it brings: what was sent is gone."""
        kept = with_own_records(message)
        for name in set(kept.content) - {BODY}:
            del kept.content[name]
        return kept

    class ScriptedGrid(InProcessGrid):
        def __init__(self) -> None:
            super().__init__(answer, {node: {} for node in range(1, silos + 1)})
            self._polls = 0

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            self._polls = 0
            return super().push_messages(map(body_alone, messages))

        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            self._polls += 1
            # The last in the cohort arrives first, then one more with every second poll.
            arrived = set(list(self._mailbox)[-1 - self._polls // 2 :])
            return super().pull_messages([one for one in message_ids if one in arrived])

        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> list[Message]:
            identifiers = list(self.push_messages(messages))
            replies: list[Message] = []
            while len(replies) < len(identifiers):
                replies.extend(self.pull_messages(identifiers))
            return replies

    return ScriptedGrid()


if __name__ == "__main__":
    play(json.loads(sys.argv[1]))
