"""What the server's gate costs beside all else that the server does in a round of a deployment.

    python scripts/bench/gate.py                                    # 50 and 200 MB: messages, store
    python scripts/bench/gate.py --size-mb 500 --case standing

The server's time is the CPU time of SuperLink and ServerApp in a round: of real programs with TLS and node
keys, two silos, one local step (see ``deployed.py``). The gate's time is what the admission of a reply takes
beyond reading it, in a server whose replies are made here, as large. In it is one look at every value, which
any server needs to keep what is not a number out of its model; what the gate adds is the rest.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import Report, at_least, parser, spread
from deployed import CASES, FIRST, LAST, federation, wait_for
from fold_memory import photon_server
from store import MODELS, config_of, overheads
from usage import Usage, sampled

SERVER = ("SuperLink", "ServerApp")
SILOS = 2


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    report = Report(arguments)
    rows, raw = [], []
    for size in arguments.size_mb:
        for case in arguments.case:
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory(prefix="photon-bench-", dir=arguments.folder) as folder:
                server = server_seconds(case, size, Path(folder), arguments.rounds)
            with tempfile.TemporaryDirectory(prefix="photon-bench-", dir=arguments.folder) as folder:
                gate, look = gate_seconds(size, folder, arguments.replies)
            adds = SILOS * (statistics.median(gate) - statistics.median(look))
            share = adds / statistics.median(server)
            rows.append(
                [
                    f"{size} MB, {case}",
                    spread(server),
                    spread([1000 * one for one in gate], 1),
                    spread([1000 * one for one in look], 1),
                    f"{100 * share:.2f} %",
                ]
            )
            report.say(" · ".join(rows[-1]))
            raw.append(
                {
                    **{"case": case, "size_mb": size, "rounds": len(server), "replies": len(gate)},
                    "server_seconds": round(statistics.median(server), 3),
                    "gate_milliseconds": round(1000 * statistics.median(gate), 2),
                    "look_milliseconds": round(1000 * statistics.median(look), 2),
                    **{"adds": round(share, 4), "cpus": os.cpu_count(), "load": round(load, 1)},
                }
            )
    report.table(
        "CPU time: of the server in a round; of the gate for a reply, and of a look at every value of it",
        ["model", "server, s", "gate, ms", "look, ms", "gate adds"],
        rows,
        raw=raw,
    )
    report.close()


def server_seconds(case: str, size: int, folder: Path, rounds: int) -> list[float]:
    """Return the CPU seconds of the server's programs in each round that counts."""
    store = str(folder / "store")
    run_dir = folder / "run"
    carrier = "inline" if case == "inline" else "store"
    config = config_of(size, carrier, run_dir, store, rounds, *CASES[case])
    usage = Usage()
    with federation(folder, store) as (connection, family), sampled(lambda: usage.sample(family()), 0.2):
        run_id = connection.submit(config, resume=False, settings=folder / "submitted.toml")
        wait_for(run_dir / "summary.json", connection, run_id, folder / "federation" / "logs")
    return usage.between(overheads(run_dir)[0], SERVER)[FIRST:-LAST]


def gate_seconds(size: int, folder: str, replies: int) -> tuple[list[float], list[float]]:
    """Return the CPU seconds that the gate takes for replies, and those of a look at every value.

    Both see every reply in turn, so that the machine's load meets both.
    """
    import torch

    from photon.federation.admission import Admission
    from photon.link.transport import ServerLink

    gate: list[float] = []
    look: list[float] = []
    reading: list[float] = []

    def timed(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
        begin = time.process_time()
        result = work(*given)
        return time.process_time() - begin, result

    receive, trained = ServerLink.receive, Admission.trained

    def received(self: ServerLink, *given: Any) -> Any:
        seconds, groups = timed(receive, self, *given)
        reading.append(seconds)
        return groups

    def admitted(self: Admission, *given: Any) -> Any:
        seconds, result = timed(trained, self, *given)
        gate.append(seconds - reading.pop())
        tensors = [tensor for group in result.groups.values() for tensor in group.values()]
        look.append(timed(lambda: [torch.aminmax(tensor) for tensor in tensors])[0])
        return result

    case = {"who": "Photon", "silos": replies, "outer": "fedavg", "size_mb": size, "folder": folder}
    work, check = photon_server(case)
    with patch.object(ServerLink, "receive", received), patch.object(Admission, "trained", admitted):
        work()
    check()
    return gate, look


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--case", nargs="+", choices=CASES, default=["inline", "store"])
    made.add_argument("--size-mb", type=int, nargs="+", choices=sorted(MODELS), default=[50, 200])
    made.add_argument(
        "--rounds",
        type=at_least(FIRST + LAST + 1),
        default=8,
        help="rounds of a run; the first two and the last do not count",
    )
    made.add_argument("--replies", type=at_least(1), default=16, help="replies by which the gate is timed")
    made.add_argument("--folder", type=Path, help="where temporary files go")
    return made.parse_args()


if __name__ == "__main__":
    main()
