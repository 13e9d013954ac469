"""How soon `photon ui` shows a run of many silos and rounds, and what it reads and sends for one more round.

    python scripts/bench/ui.py --silos 1000 --rounds 300

Every silo takes part in every round, which is the most that a file of events can hold.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import Report, at_least, parser

from photon.telemetry.events import (
    Evaluated,
    Event,
    RoundFinished,
    RoundStarted,
    RunStarted,
    SiloFinished,
    evaluation_of,
)
from photon.ui.live import LiveRun


def begin(names: list[str], rounds: int) -> Iterator[Event]:
    """Yield the events before the first round."""
    yield RunStarted(
        run_id="bench",
        name="bench",
        strategy="photon",
        model="tiny",
        parameters=3_231_744,
        silos=[
            {"name": name, "train_tokens": 10**6, "validation_tokens": 10**4, "unigram_loss": 6.5}
            for name in names
        ],
        rounds=rounds,
        cohort=len(names),
        local_steps=32,
        batch_size=8,
        sequence_length=128,
        engine="simulation",
        device="cpu",
        roofline_flops=None,
        resumed_from=None,
        flops_per_token=2e7,
    )
    yield evaluated(names, 0)


def evaluated(names: list[str], number: int) -> Evaluated:
    """Return a validation on all silos."""
    loss = 3 + 6 / (1 + number)
    return Evaluated(
        round=number,
        per_silo={name: evaluation_of(loss, 10_000) for name in names},
        loss=loss,
        perplexity=evaluation_of(loss, 1)["perplexity"],
        tokens_trained=number * 32 * 1024 * len(names),
        bytes_up=0,
        bytes_down=0,
        seconds=1.0,
    )


def one_round(names: list[str], number: int) -> Iterator[Event]:
    """Yield the events of a round in which all take part."""
    yield RoundStarted(round=number, cohort=names, global_step=32 * (number - 1))
    for name in names:
        yield SiloFinished(
            round=number,
            silo=name,
            steps=32,
            tokens=32 * 1024,
            loss=3.1 + 6 / number,
            loss_last=3.0 + 6 / number,
            learning_rate=0.003,
            seconds={"total": 3.2, "training": 2.8, "load": 0.2, "save": 0.1},
            bytes_up=12_926_976,
            bytes_down=12_926_976,
            update_norm=3.7,
            tokens_per_second=11540.9,
            mfu=None,
            gradient_norm=1.4,
        )
    yield RoundFinished(
        round=number,
        global_step=32 * number,
        tokens=number * 32 * 1024 * len(names),
        train_loss=3.1 + 6 / number,
        pseudo_gradient_norm=3.0,
        silo_cosine=0.4,
        consensus=0.5,
        parameter_norm=100.0,
        bytes_up=12_926_976 * len(names),
        bytes_down=12_926_976 * len(names),
        seconds={
            "round": 6.0,
            "training": 2.8,
            "fold": 0.5,
            "outer": 0.1,
            "evaluate": 1.0,
            "checkpoint": 0.2,
            "overhead": 3.2,
        },
    )
    yield evaluated(names, number)


def main() -> None:
    """Write such a file, and measure."""
    made = parser(__doc__)
    made.add_argument("--silos", type=int, default=1000)
    made.add_argument("--rounds", type=at_least(1), default=300)
    given = made.parse_args()
    report = Report(given)
    names = [f"hospital-{number:04}" for number in range(given.silos)]
    rows = []

    def took(what: str, began: tuple[float, float], sent: int | None = None) -> None:
        wall, worked = time.perf_counter() - began[0], time.process_time() - began[1]
        size = "" if sent is None else f"{sent / 1e3:.0f}"
        rows.append([what, f"{wall:.2f}", f"{worked:.2f}", size])

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "many"
        run.mkdir()
        (run / "config.yaml").write_text(f"rounds: {given.rounds}\n")
        with (run / "events.jsonl").open("w") as file:
            file.writelines(event.to_json() + "\n" for event in begin(names, given.rounds))
            for number in range(1, given.rounds):
                file.writelines(event.to_json() + "\n" for event in one_round(names, number))
        size = (run / "events.jsonl").stat().st_size / 1e6
        LiveRun("warm", _small(Path(folder) / "small")).state()
        live = LiveRun("many", run)
        began = time.perf_counter(), time.process_time()
        state = live.state()
        took("first page", began, len(json.dumps([state.html, state.charts])))
        while live.has_more:
            state = live.state()
        took("all events read", began)
        with (run / "events.jsonl").open("a") as file:
            file.writelines(event.to_json() + "\n" for event in one_round(names, given.rounds))
        time.sleep(12)
        began = time.perf_counter(), time.process_time()
        news = live.since(state.version)
        took("one more round", began, len(json.dumps([news["html"], news["charts"]])))
    report.table(
        f"A page on a run of {given.silos:,} silos and {given.rounds} rounds, {size:.0f} MB of events",
        ["", "s", "CPU s", "kB sent"],
        rows,
    )
    report.close()


def _small(run: Path) -> Path:
    """Return a run that warms templates and imports."""
    run.mkdir()
    (run / "config.yaml").write_text("rounds: 1\n")
    lines = [event.to_json() + "\n" for event in begin(["one"], 1)]
    (run / "events.jsonl").write_text("".join(lines))
    return run


if __name__ == "__main__":
    main()
