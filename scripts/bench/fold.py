"""Folding replies: how fast, and in how much memory, beside Flower's FedAvg aggregation.

    python scripts/bench/fold.py                          # both parts; 32 x 500 MB of Flower needs 18 GB free
    python scripts/bench/fold.py --only speed             # GB of replies folded per CPU second, one thread
    python scripts/bench/fold.py --only memory --size-mb 50 --silos 2 8

Speed, first table: replies that are already tensors go into an accumulator that is already there; numpy's
in-place multiply-add does the same work. Second table: a round's replies from encoded messages to the mean,
as Photon does it (decode, check every value, fold) and as Flower does it (FedAvg.aggregate_train).

Memory: every case is a fresh process that plays the server of one round. Photon's is the whole round of
photon.federation (encode, send, decode, check, fold, outer step, evaluation, checkpoint) on a grid whose
replies arrive in the reverse of the cohort's order, the worst for streaming. Flower's is FedAvg.start for one
round without evaluation, on the same grid. A reply is made when it is asked for and belongs to the receiver
alone. What is reported is the process's peak less what it held after its imports, as a multiple of the model:
"total" is the kernel's own high-water mark of resident memory, checkpoint pages that are mapped included;
"anonymous" leaves out the mapped file pages, which the kernel may drop at any time (sampled).
"""

import argparse
import logging
from collections.abc import Callable

from common import Report, at_least, interleave, parser
from fold_memory import (
    SEQUENCE_LENGTH,
    check_mean,
    compare_memory,
    flower_records,
    photon_records,
    report_on,
    request_of,
    shapes_of_model,
)


def main() -> None:
    arguments = parse_arguments()
    report = Report(arguments)
    if arguments.only in (None, "memory"):
        # First, so that this process is still small.
        compare_memory(report, arguments.size_mb, arguments.silos, arguments.outer)
    if arguments.only in (None, "speed"):
        import torch

        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.ERROR)
        compare_adding(report, arguments)
        compare_rounds(report, arguments)
    report.close()


# --- speed ------------------------------------------------------------------------------------------


def compare_adding(report: Report, arguments: argparse.Namespace) -> None:
    """Time adding replies that are already tensors."""
    import numpy as np

    from photon.link.records import decode_groups, dense_groups
    from photon.strategy.fold import WeightedMean

    shapes, count = shapes_of_model(arguments.fold_mb), arguments.replies
    decoded = [dense_groups(decode_groups(photon_records(number, shapes))) for number in range(count)]
    mean = WeightedMean()
    mean.add(decoded[0], 1.0)
    accumulator = {name: tensor.numpy().copy() for name, tensor in decoded[0]["params"].items()}
    scratch = np.empty(max(shapes.values()), dtype=np.float32)
    weight = np.float32(1e-3)

    def photon_add() -> None:
        for groups in decoded:
            mean.add(groups, 1.0)

    def numpy_in_place() -> None:
        for groups in decoded:
            for name, tensor in groups["params"].items():
                product = scratch[: tensor.numel()]
                np.multiply(tensor.numpy(), weight, out=product)
                np.add(accumulator[name], product, out=accumulator[name])

    def numpy_expression() -> None:
        for groups in decoded:
            for name, tensor in groups["params"].items():
                accumulator[name] += weight * tensor.numpy()

    cases: dict[str, Callable[[], None]] = {
        "numpy: a += w * x": numpy_expression,
        "numpy: multiply(out=), add(out=)": numpy_in_place,
        "Photon: WeightedMean.add": photon_add,
    }
    report.rates(
        f"{count} replies of {arguments.fold_mb} MiB into an accumulator, one thread (goal: 5)",
        dict.fromkeys(cases, count * sum(shapes.values()) * 4 / 1e9),
        "GB",
        interleave(cases, arguments.repeats),
        digits=2,
    )


def compare_rounds(report: Report, arguments: argparse.Namespace) -> None:
    """Time a round's replies from messages to the mean."""
    import torch
    from flwr.app import Message
    from flwr.serverapp.strategy import FedAvg

    from photon.federation.admission import Asked, problem_with
    from photon.federation.sizes import measure, too_large
    from photon.flower_compat import ensure_task_identity
    from photon.link.records import decode_groups
    from photon.strategy.contract import Contract, Leaving
    from photon.strategy.fold import WeightedMean

    ensure_task_identity()
    shapes, count = shapes_of_model(arguments.fold_mb), arguments.replies
    records = [photon_records(number, shapes) for number in range(count)]
    messages = [
        Message(flower_records(number, shapes), dst_node_id=1, message_type="train")
        for number in range(count)
    ]
    expected = {name: tensor.shape for name, tensor in decode_groups(records[0])["params"].items()}
    contract = Contract({"params": expected}, {"params": Leaving("parameters", expected)})
    sent = {name: torch.full(shape, 0.5) for name, shape in expected.items()}
    asked = [
        Asked(request_of(number), contract, None, sent, None, SEQUENCE_LENGTH, 0, local_steps=1)
        for number in range(count)
    ]
    fedavg = FedAvg()

    def photon_round() -> None:
        mean = WeightedMean()
        for one, record in zip(asked, records, strict=True):
            groups = decode_groups(record)
            problem = problem_with(report_on(one.request), groups, one)
            assert problem is None, problem
            found = measure(groups, contract, sent, update=False, masked=False, steps=1)
            assert too_large(found) is None, found
            mean.add(groups, 1.0)
        check_mean(mean.result()["params"], count)

    def flower_round() -> None:
        arrays, _ = fedavg.aggregate_train(1, messages)
        assert arrays is not None
        check_mean({"embedding": arrays["embedding"].numpy()}, count)

    cases: dict[str, Callable[[], None]] = {
        "Flower: FedAvg.aggregate_train": flower_round,
        "Photon: decode, check, measure, fold": photon_round,
    }
    report.rates(
        f"{count} replies of {arguments.fold_mb} MiB from messages to the mean, one thread",
        dict.fromkeys(cases, count * sum(shapes.values()) * 4 / 1e9),
        "GB",
        interleave(cases, arguments.repeats),
        digits=2,
    )


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--only", choices=["speed", "memory"], help="one of the two parts")
    made.add_argument("--fold-mb", type=int, default=250, help="MiB of a reply in the speed part")
    made.add_argument("--replies", type=at_least(1), default=4, help="replies in the speed part")
    made.add_argument(
        "--repeats", type=at_least(1), default=9, help="timings of every case in the speed part"
    )
    made.add_argument("--size-mb", type=int, default=500, help="MiB of the model in the memory part")
    made.add_argument("--silos", type=int, nargs="+", default=[2, 8, 32], help="cohorts in the memory part")
    made.add_argument(
        "--outer",
        nargs="+",
        default=["fedavg", "diloco"],
        help="outer optimizers (conf/outer) in the memory part",
    )
    return made.parse_args()


if __name__ == "__main__":
    main()
