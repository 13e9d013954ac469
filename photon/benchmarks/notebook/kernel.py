"""A notebook's kernel: cells run one after the other, each within its limits."""

import json
import queue
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from jupyter_client import BlockingKernelClient
from nbformat.v4 import output_from_msg

from photon.benchmarks.notebook.sandbox import Limits, Sandbox, Shut
from photon.errors import RunError, printable

#: Seconds that a cell which was told to stop has to do so.
_GRACE = 5.0
#: Seconds that a kernel which is there has to answer.
_START = 60.0
#: Bytes of a message above the limit of a cell's output, for a kernel gathers what is printed in a moment.
_ROOM = 16 << 20
#: Order in which the channels of a kernel have their sockets.
_CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
#: Seconds between two looks at what the kernel uses.
_LOOK = 0.25
#: Outputs of a cell that are kept; what a cell sends above it is left out.
_MOST_OUTPUTS = 200


@dataclass
class Ran:
    """What came of a cell.

    Attributes
    ----------
    outputs
        Outputs as a notebook holds them.
    error
        ``Name: message`` of the exception that ended the cell, or None.
    stopped
        Why the cell was stopped from outside, or None.
    lost
        Whether the kernel, and with it every variable, is gone.
    seconds
        Time that it took.
    """

    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    stopped: str | None = None
    lost: bool = False
    seconds: float = 0.0


class Kernel:
    """IPython in a sandbox; where it is lost, the next cell has a new one.

    Parameters
    ----------
    data
        Name in the work folder to the file or folder that is seen there, read-only.
    """

    def __init__(self, data: Mapping[str, Path], limits: Limits, how: Shut) -> None:
        self._data, self._limits, self._how = data, limits, how
        self._sandbox: Sandbox | None = None
        self._client: BlockingKernelClient | None = None
        self._context = zmq.Context()
        # A kernel that sends more in one message is cut off, before memory is taken for it.
        self._context.setsockopt(zmq.MAXMSGSIZE, limits.output + _ROOM)

    def start(self) -> None:
        """Start anew: a kernel without variables in a work folder as it was given.

        Raises
        ------
        RunError
            If it does not start.
        """
        self.stop()
        connection: dict[str, Any] = {
            "transport": "ipc",
            "ip": "{sockets}/k",
            "key": secrets.token_hex(16),
            "signature_scheme": "hmac-sha256",
            **{f"{name}_port": number for number, name in enumerate(_CHANNELS, 1)},
        }
        arguments = ["-m", "ipykernel_launcher", "-f", "{scratch}/.kernel.json"]
        # Nothing is kept between sessions, and `input` fails where nobody could answer.
        arguments += ["--HistoryManager.enabled=False", "--quiet"]
        files = {".kernel.json": json.dumps(connection)}
        self._sandbox = Sandbox(self._data, arguments, self._limits, self._how, files=files)
        client = BlockingKernelClient(context=self._context)
        here: Any = {**connection, "ip": str(self._sandbox.sockets / "k")}
        client.load_connection_info(here)
        self._client = client
        client.start_channels(stdin=False, hb=False)
        try:
            client.wait_for_ready(timeout=_START)
        except Exception as error:  # whatever it sends instead of what a kernel sends
            self.stop()
            raise RunError(f"a kernel does not answer ({printable(error)})") from None

    def stop(self) -> None:
        """End the kernel, if there is one."""
        if self._client is not None:
            self._client.stop_channels()
            self._client = None
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def close(self) -> None:
        """End the kernel for good."""
        self.stop()
        self._context.destroy(linger=0)

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, code: str) -> Ran:
        """Run a cell, and return what came of it; whatever the cell does, this returns.

        Raises
        ------
        RunError
            If there is no kernel, and none can be started.
        """
        if self._client is None:
            self.start()
        assert self._client is not None
        began = time.monotonic()
        ran = Ran()
        try:
            self._follow(self._client.execute(code, store_history=True, allow_stdin=False), ran)
        except Exception as error:  # what it sends may be anything
            ran.stopped, ran.lost = f"the kernel sends what no kernel sends ({printable(error)[:200]})", True
        ran.seconds = time.monotonic() - began
        if ran.lost:
            self.stop()
        return ran

    def _follow(self, asked: str, ran: Ran) -> None:
        """Take what a cell sends until it has ended, was stopped, or the kernel is gone."""
        assert self._client is not None
        assert self._sandbox is not None
        until = time.monotonic() + self._limits.cell_seconds
        received, look, replied = 0, 0.0, False
        while True:
            message = self._next()
            if message is not None and message["parent_header"].get("msg_id") == asked:
                size = len(json.dumps(message["content"], default=str))
                room, received = max(0, self._limits.output - received), received + size
                if _take(message, ran, size, room):
                    return
            now = time.monotonic()
            excess = None
            if received > self._limits.output:
                excess = f"it sent more than {self._limits.output >> 10} KiB"
            elif now > until:
                # Who has replied and does not say that it is idle was cut off in a message that was too long.
                excess = f"it sent more than {self._limits.output >> 10} KiB at once" if replied else None
                excess = excess or f"it took more than {self._limits.cell_seconds:g} s"
            if excess is not None and ran.stopped is None:
                ran.stopped = excess
                until, received = now + _GRACE, self._limits.output
                if not replied:
                    self._client.control_channel.send(self._client.session.msg("interrupt_request", {}))
            elif now > until:
                ran.lost = True
                return
            if now > look:
                look = now + _LOOK
                used = self._sandbox.overuse()
                if used is not None or not self._sandbox.running:
                    ran.stopped, ran.lost = ran.stopped or used or "the kernel ended", True
                    return
                if not replied and self._replied(asked):
                    replied, until = True, min(until, now + _GRACE)

    def _replied(self, asked: str) -> bool:
        assert self._client is not None
        while self._client.shell_channel.msg_ready():
            if self._client.get_shell_msg(timeout=0)["parent_header"].get("msg_id") == asked:
                return True
        return False

    def _next(self) -> dict[str, Any] | None:
        assert self._client is not None
        try:
            return self._client.get_iopub_msg(timeout=_LOOK)
        except queue.Empty:
            return None


def _take(message: dict[str, Any], ran: Ran, size: int, room: int) -> bool:
    """Take a message of a cell, as far as there is room; return whether the cell has ended."""
    kind, content = message["header"]["msg_type"], message["content"]
    if kind == "status":
        return bool(content.get("execution_state") == "idle")
    if kind == "error":
        ran.error = f"{content.get('ename', '')}: {content.get('evalue', '')}"[:1000]
    if kind not in ("stream", "error", "execute_result", "display_data") or len(ran.outputs) >= _MOST_OUTPUTS:
        return False
    if kind == "stream":
        text = str(content.get("text", ""))[:room]
        last = ran.outputs[-1] if ran.outputs else {}
        if last.get("output_type") == kind and last["name"] == content.get("name"):
            last["text"] += text
        elif text:
            ran.outputs.append(output_from_msg({**message, "content": {**content, "text": text}}))
    elif size <= room:
        ran.outputs.append(output_from_msg(message))
    elif kind == "error":
        short: dict[str, Any] = {"ename": "Error", "evalue": ran.error, "traceback": []}
        ran.outputs.append(output_from_msg({**message, "content": short}))
    return False
