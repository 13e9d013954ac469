"""Cells within their limits: whatever one does, the next one has a kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from photon.benchmarks.notebook.kernel import Kernel
from photon.benchmarks.notebook.sandbox import Limits, Shut

pytest.importorskip("ipykernel")

LIMITS = Limits(cell_seconds=2, memory=1 << 30, disk=8 << 20, output=256 << 10, processes=40)


@pytest.fixture(scope="module")
def kernel(shut: Shut) -> Iterator[Kernel]:
    with Kernel({}, LIMITS, shut) as kernel:
        kernel.run("kept = 3")
        yield kernel


def text(kernel: Kernel, code: str) -> str:
    ran = kernel.run(code)
    assert (ran.error, ran.stopped) == (None, None)
    return "".join(output.get("text") or output["data"]["text/plain"] for output in ran.outputs)


def test_a_value_and_what_is_printed_are_outputs(kernel: Kernel) -> None:
    ran = kernel.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n1 + 1")
    kinds = sorted((output["output_type"], output.get("name", "")) for output in ran.outputs)
    assert kinds == [("execute_result", ""), ("stream", "stderr"), ("stream", "stdout")]
    assert next(o["data"]["text/plain"] for o in ran.outputs if o["output_type"] == "execute_result") == "2"


@pytest.mark.parametrize("code", ["1/0", "raise SystemExit", "def", "input()", "raise KeyboardInterrupt"])
def test_an_exception_leaves_the_kernel_alive(kernel: Kernel, code: str) -> None:
    ran = kernel.run(code)
    assert ran.error is not None
    assert not ran.lost
    assert text(kernel, "kept") == "3"


def test_a_cell_that_never_ends_is_stopped(kernel: Kernel) -> None:
    ran = kernel.run("while True: pass")
    assert ran.stopped == "it took more than 2 s"
    assert not ran.lost
    assert 2 <= ran.seconds < 6
    assert text(kernel, "kept") == "3"


def test_a_cell_that_says_too_much_is_stopped(kernel: Kernel) -> None:
    # In large pieces, so that it is within two seconds on a busy machine, too.
    ran = kernel.run("import time\nwhile True: print('y' * 20_000, flush=True); time.sleep(0.01)")
    assert ran.stopped == "it sent more than 256 KiB"
    assert 0 < sum(len(output.get("text", "")) for output in ran.outputs) <= LIMITS.output
    assert text(kernel, "kept") == "3"


def test_a_cell_that_eats_memory_gets_none(kernel: Kernel) -> None:
    assert kernel.run("large = bytearray(2 << 30)").error == "MemoryError: "
    assert text(kernel, "kept") == "3"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import ctypes; ctypes.string_at(0)", "the kernel ended"),
        # No single process is above its limit, all of them together are.
        (
            "import subprocess, sys, time\n"
            "many = [subprocess.Popen([sys.executable, '-c', 'x = b\"y\" * (300 << 20); input()'], "
            "stdin=subprocess.PIPE) for _ in range(5)]\n"
            "time.sleep(30)",
            "its processes used more than 1024 MiB of memory together",
        ),
        # One that does not let itself be interrupted.
        pytest.param(
            "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
            "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
            "it took more than 1 s",
            marks=pytest.mark.slow,
        ),
        pytest.param("print('z' * (20 << 20))", "it sent more than 256 KiB at once", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_that_is_lost_is_followed_by_a_new_one(
    shut: Shut, code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("photon.benchmarks.notebook.kernel._GRACE", 0.5)
    seconds = 30 if "together" in why or "at once" in why else 1
    with Kernel({}, Limits(cell_seconds=seconds, memory=1 << 30, output=256 << 10), shut) as kernel:
        ran = kernel.run(code)
        assert ran.lost
        assert ran.stopped == why
        assert text(kernel, "1 + 1") == "2"


@pytest.mark.slow
def test_a_new_kernel_has_no_variables_and_no_files(shut: Shut, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")
    with Kernel({"x": tmp_path / "x"}, LIMITS, shut) as kernel:
        assert (
            text(kernel, "kept = 3; open('made', 'w').close(); import os; sorted(os.listdir())")
            == "['made', 'x']"
        )
        kernel.start()
        assert kernel.run("kept").error == "NameError: name 'kept' is not defined"
        assert text(kernel, "import os; os.listdir()") == "['x']"
