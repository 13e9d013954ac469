"""What a secure sum costs a silo and the server: seconds, and bytes, with and without a silo that drops out.

python scripts/bench/secure_sum.py --parameters 10_000_000 --silos 4 16 --dropped 0 1

Silos and server run in turn in this process, without Flower: seconds are those of the cryptography and of the
arithmetic. The bytes are those of the typed bodies; the masked vector of 4 bytes a parameter, and the run's
configuration with every question, come on top.
"""

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from common import Report, parser

from photon.config.compose import compose
from photon.federation.secure import SecureSum
from photon.link.encoding import Packed
from photon.link.messages import Body, TrainRequest
from photon.privacy.masking import Quantizer
from photon.silo import secure
from photon.silo.policy import SiloPolicy
from photon.silo.service import answer_keys
from photon.silo.site import SiloSite
from photon.strategy.contract import Contract, Leaving

HEADS = ["silos, dropped", "bits", "keys, s / silo", "mask, s / silo", "unmask, s / silo", "server, s"]
HEADS += ["bodies, B / silo", "error / step"]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--parameters", type=int, default=10_000_000)
    made.add_argument("--silos", type=int, nargs="+", default=[4, 16])
    made.add_argument("--dropped", type=int, nargs="+", default=[0, 1])
    arguments = made.parse_args()
    report = Report(arguments)
    cases = itertools.product(arguments.silos, arguments.dropped)
    rows = [measure(arguments.parameters, *case) for case in cases]
    report.table(f"A secure sum of {arguments.parameters:,} parameters", HEADS, rows)
    report.close()


def measure(parameters: int, silos: int, dropped: int) -> list[str]:
    config = compose(
        ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update", "cohort=null"]
    )
    names = [f"silo-{number:04d}" for number in range(silos)]
    masked = Leaving("parameters", {"w": torch.Size([parameters])}, masked=frozenset({"w"}))
    contract = Contract({}, {"params": masked})
    seconds: dict[str, float] = defaultdict(float)
    sizes = 0
    with tempfile.TemporaryDirectory() as folder:
        site = SiloSite(Path(folder), Path(folder), None, SiloPolicy(), config.privacy)

        def ask(bodies: Mapping[str, Body], kind: type[Body]) -> dict[str, Body]:
            nonlocal sizes
            answers = {}
            for name, body in bodies.items():
                begin = time.perf_counter()
                answers[name] = answer_keys(body, site)  # type: ignore[arg-type]
                seconds[type(body).__name__] += time.perf_counter() - begin
                sizes += len(body.model_dump_json()) + len(answers[name].model_dump_json())
            return answers

        requests = {
            name: TrainRequest(
                run_id="run", model_id="model", round=1, silo=name, members=[name], global_step=0, steps=1,
                batch_size=1, last_round=0, position=0, cohort=silos,
            )
            for name in names
        }  # fmt: skip
        server = SecureSum(config.privacy, requests, contract, ask, lambda name, failure: None, print)
        agreed = server.agree()
        expected = torch.zeros(parameters, dtype=torch.float64)
        for number, name in enumerate(names[dropped:]):
            update = torch.randn(parameters, generator=torch.Generator().manual_seed(number)) * 1e-2
            expected += update.double() / (silos - dropped)
            masking = agreed[name].masking
            assert masking is not None
            sizes += len(masking.model_dump_json())
            start = time.perf_counter()
            reply = secure.mask(agreed[name], {"params": {"w": Packed(update)}}, site, config, contract)
            seconds["mask"] += time.perf_counter() - start
            start = time.perf_counter()
            server.add(name, {"w": reply["params"]["w"].data})
            seconds["server"] += time.perf_counter() - start
        begin = time.perf_counter()
        helped = seconds["Unmask"]
        mean = server.opened()["w"]
        seconds["server"] += time.perf_counter() - begin - (seconds["Unmask"] - helped)
    quantizer = Quantizer(config.privacy.range, silos)
    error = float((mean.double() - expected).abs().max()) / quantizer.step
    left = silos - dropped
    keys = (seconds["AdvertiseKeys"] + seconds["ShareKeys"] + seconds["CheckShares"]) / silos
    return [
        f"{silos}, {dropped}",
        f"{quantizer.bits}",
        f"{keys:.3f}",
        f"{seconds['mask'] / left:.2f}",
        f"{seconds['Unmask'] / left:.3f}",
        f"{seconds['server']:.2f}",
        f"{sizes // silos:,}",
        f"{error:.2f}",
    ]


if __name__ == "__main__":
    main()
