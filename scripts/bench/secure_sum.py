"""What a secure sum costs a silo and the server: seconds, and bytes, with and without a silo that drops out.

python scripts/bench/secure_sum.py --parameters 10_000_000 --silos 4,16 --dropped 0,1

Silos and server run in turn in this process, without Flower: seconds are those of the cryptography and of the
arithmetic. The bytes are those of the typed bodies; the masked vector of 4 bytes a parameter, and the run's
configuration with every question, come on top.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from photon.config.compose import compose
from photon.federation.secure import SecureSum
from photon.link.encoding import Packed
from photon.link.messages import Body, TrainRequest
from photon.privacy.masking import Quantizer
from photon.silo import secure
from photon.silo.policy import SiloPolicy
from photon.silo.service import answer_keys
from photon.silo.site import SiloSite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--silos", default="4,16")
    parser.add_argument("--dropped", default="0,1")
    arguments = parser.parse_args()
    print(
        "silos  dropped  bits  keys, s/silo  mask, s/silo  unmask, s/silo  server, s  bodies, B/silo  "
        "error/step"
    )
    for silos in map(int, arguments.silos.split(",")):
        for dropped in map(int, arguments.dropped.split(",")):
            measure(arguments.parameters, silos, dropped)


def measure(parameters: int, silos: int, dropped: int) -> None:
    config = compose(
        ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update", "cohort=null"]
    )
    names = [f"silo-{number:04d}" for number in range(silos)]
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
        server = SecureSum(config.privacy, requests, ask, lambda name, failure: None, print)
        agreed = server.agree()
        expected = torch.zeros(parameters, dtype=torch.float64)
        for number, name in enumerate(names[dropped:]):
            update = torch.randn(parameters, generator=torch.Generator().manual_seed(number)) * 1e-2
            expected += update.double() / (silos - dropped)
            masking = agreed[name].masking
            assert masking is not None
            sizes += len(masking.model_dump_json())
            start = time.perf_counter()
            reply = secure.mask(agreed[name], {"params": {"w": Packed(update)}}, site, config, {"w"})
            seconds["mask"] += time.perf_counter() - start
            start = time.perf_counter()
            server.add(name, {"w": reply["params"]["w"].data})
            seconds["server"] += time.perf_counter() - start
        begin = time.perf_counter()
        helped = seconds["Unmask"]
        mean = server.mean()["w"]
        seconds["server"] += time.perf_counter() - begin - (seconds["Unmask"] - helped)
    quantizer = Quantizer(config.privacy.range, silos)
    error = float((mean.double() - expected).abs().max()) / quantizer.step
    left = silos - dropped
    keys = (seconds["AdvertiseKeys"] + seconds["ShareKeys"] + seconds["CheckShares"]) / silos
    print(
        f"{silos:5}  {dropped:7}  {quantizer.bits:4}  {keys:12.3f}  {seconds['mask'] / left:12.2f}"
        f"  {seconds['Unmask'] / left:14.3f}  {seconds['server']:9.2f}  {sizes // silos:14,}  {error:10.2f}"
    )


if __name__ == "__main__":
    main()
