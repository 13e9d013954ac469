"""What a message costs a deployed silo, with the silo worker and without.

Every message gets a process of its own, as Flower gives it one: Python starts, imports Flower's runner of
ClientApps and Photon's ClientApp, and calls it. The messages are the orders of successive rounds of one silo.

    start       until the ClientApp is imported: paid with and without the worker
    overhead    of the call, beside the local steps and the saving of the state: search for the worker or
                import of torch, transfer, data, model, local state, encoding and transfer of the reply. So
                the time from the message's arrival to the first local step is less than this
    process     from its start to the answer, less the local steps

The processes run below one called flower-supernode, because a worker ends with its SuperNode.

Examples
--------
    python scripts/bench/worker.py
    python scripts/bench/worker.py --model photon-125m --messages 4
    python scripts/bench/worker.py --processes 2
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Report, at_least, parser, spread

CHILD = "--one-message"
SUPERNODE = "flower-supernode"
SEQUENCE_LENGTH = 64
PHASES = ("start", "overhead", "process")


def one_message(begin: float, message_file: Path, node_config: dict[str, Any]) -> None:
    """Be the process of one message, and print what took how long."""
    from flwr.supernode.runtime import run_clientapp  # noqa: F401

    from photon.client_app import app

    imported = time.time()
    from flwr.app import Context, Message, RecordDict

    from photon.flower_compat import ensure_task_identity
    from photon.link.frames import read_frame

    ensure_task_identity()
    with open(message_file, "rb") as file:
        message = Message(read_frame(file).records, 1, "train")
    context = Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})
    called = time.time()
    reply = app(message, context)
    answered = time.time()
    if reply.has_error():
        sys.exit(reply.error.reason)
    report = json.loads(str(reply.content["photon"]["body"]))
    seconds = report["seconds"]
    overhead = answered - called - seconds["training"] - seconds["save"]
    print(
        json.dumps(
            {
                "start": imported - begin,
                "overhead": overhead,
                "process": imported - begin + answered - called - seconds["training"],
                "position": report["position"],
            }
        )
    )


class Silo:
    """One silo's messages, round after round.

    Parameters
    ----------
    worker
        Whether the silo has a worker.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace, worker: bool) -> None:
        from photon.config.compose import compose

        self._folder = folder
        self._steps = arguments.steps
        self._node = {
            "data-dir": str(folder / "data"),
            "state-dir": str(folder / f"state-{worker}"),
            "worker": worker,
        }
        self._config = compose(
            [
                *(f"model={arguments.model}", f"model.sequence_length={SEQUENCE_LENGTH}"),
                *("federation=deployment", "training.batch_size=4", "telemetry.export=false"),
                *(f"training.processes={arguments.processes}", "training.micro_batch_size=null"),
            ]
        )
        self._round, self._position = 0, 0

    def message(self) -> dict[str, float]:
        """Train one round in a process of its own."""
        self._round += 1
        file = self._folder / "message.frame"
        self._write(file)
        words = [repr(time.time()), str(file), json.dumps(self._node)]
        done = subprocess.run(
            [sys.executable, __file__, CHILD, *words], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(done.stderr)
        timings: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        self._position = int(timings.pop("position"))
        return timings

    def _write(self, file: Path) -> None:
        from photon.link.frames import Frame, write_frame
        from photon.link.messages import BODY, TrainRequest, pack
        from photon.link.records import encode_groups
        from photon.models.build import build_model
        from photon.training.groups import read_params

        request = TrainRequest(
            run_id="bench",
            model_id=f"model-{self._round}",
            round=self._round,
            silo="silo",
            members=["silo"],
            global_step=self._steps * (self._round - 1),
            steps=self._steps,
            batch_size=4,
            last_round=self._round - 1,
            position=self._position,
            cohort=1,
        )
        content = encode_groups({"params": read_params(build_model(self._config.model, 300, seed=1))})
        content[BODY] = pack(request, self._config)
        with open(file, "wb") as stream:
            write_frame(stream, Frame({}, content))


def prepare_text(folder: Path) -> None:
    from photon.data.prepare import prepare

    source, letters = folder / "text", random.Random(0)
    source.mkdir()
    for number in range(40):
        words = ("".join(letters.choices("abcdefghij", k=letters.randint(2, 7))) for _ in range(2000))
        (source / f"{number}.txt").write_text(" ".join(words))
    prepare(
        {"silo": [source]},
        folder / "data",
        vocab_size=300,
        sequence_length=SEQUENCE_LENGTH,
        validation_fraction=0.1,
        seed=0,
        progress=False,
    )


def main(arguments: argparse.Namespace) -> None:
    report = Report(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_text(folder)
        silos = {"worker": Silo(folder, arguments, True), "no worker": Silo(folder, arguments, False)}
        timings: dict[str, list[dict[str, float]]] = {case: [] for case in silos}
        for _ in range(arguments.messages):
            # In turn, so that a change of the machine's load meets both.
            for case, silo in silos.items():
                timings[case].append(silo.message())
        size = (folder / "message.frame").stat().st_size / 2**20
    report.table(
        f"{arguments.model}, message of {size:,.1f} MiB, {arguments.processes} process(es): "
        "seconds, median (min – max)",
        ["case", *PHASES],
        [
            [f"{case}, {which}", *(spread([one[phase] for one in some]) for phase in PHASES)]
            for case, measured in timings.items()
            for which, some in (("first message", measured[:1]), ("later messages", measured[1:]))
        ],
        raw=timings,
    )
    report.close()


def arguments_of(words: list[str]) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="tiny", help="preset of conf/model")
    made.add_argument("--messages", type=at_least(2), default=6, help="messages of each case, two at least")
    made.add_argument("--steps", type=int, default=2, help="local steps of each message")
    made.add_argument("--processes", type=int, default=1, help="training.processes")
    return made.parse_args(words)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        one_message(float(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
    elif Path(sys.argv[0]).name == SUPERNODE:
        main(arguments_of(sys.argv[1:]))
    else:
        arguments_of(sys.argv[1:])
        with tempfile.TemporaryDirectory() as place:
            link = Path(place) / SUPERNODE
            link.symlink_to(Path(__file__).resolve())
            sys.exit(subprocess.call([sys.executable, str(link), *sys.argv[1:]], env=os.environ.copy()))
