"""A run as it might have been: plausible figures, every event, seeded."""

import math
import random
from collections.abc import Iterator

from photon.telemetry.events import (
    Checkpointed,
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunStarted,
    SiloFailed,
    SiloFinished,
)

SILOS = {
    # name: train tokens, validation tokens, unigram loss, loss that it tends to, how fast it gets there
    "cpp": (2_712_064, 135_168, 6.55, 3.35, 0.30),
    "legal": (184_320, 20_480, 6.91, 3.80, 0.17),
    "prose": (2_330_624, 118_784, 7.02, 4.35, 0.22),
    "python": (2_534_400, 126_976, 6.72, 3.60, 0.26),
}

START = 1_750_000_000.0


def synthetic_events(
    *, rounds: int = 10, seed: int = 0, strategy: str = "photon", speed: float = 1.0, extra_silos: int = 0
) -> Iterator[Event]:
    """Tell a whole run with one failed silo and one notice, up to the moment before ``run_finished``."""
    chance = random.Random(seed)
    silos = dict(SILOS)
    for number in range(extra_silos):
        silos[f"hospital-{number:02}"] = (900_000 + 10_000 * number, 40_000, 6.6, 3.9, 0.2)
    now = START
    step_tokens = 8 * 128
    yield RunStarted(
        time=now,
        run_id="7c2e91",
        name="quickstart",
        strategy=strategy,
        model="tiny",
        parameters=3_231_744,
        silos=[
            {"name": name, "train_tokens": train, "validation_tokens": validation, "unigram_loss": unigram}
            for name, (train, validation, unigram, _, _) in silos.items()
        ],
        rounds=rounds,
        cohort=3,
        local_steps=32,
        batch_size=8,
        sequence_length=128,
        engine="simulation",
        device="cpu, 2 threads, bf16",
        roofline_flops=4.1e11,
        resumed_from=None,
        flops_per_token=2.1e7,
    )

    def losses(progress: float) -> dict[str, float]:
        return {
            name: floor + (9.02 - floor) * math.exp(-rate * speed * progress) + chance.gauss(0, 0.01)
            for name, (_, _, _, floor, rate) in silos.items()
        }

    def evaluated(number: int, tokens: int) -> Evaluated:
        nonlocal now
        now += 1.1
        found = losses(float(number))
        weight = sum(silos[name][1] for name in silos)
        loss = sum(found[name] * silos[name][1] for name in silos) / weight
        return Evaluated(
            time=now,
            round=number,
            per_silo={
                name: {"loss": value, "perplexity": math.exp(value), "tokens": silos[name][1]}
                for name, value in found.items()
            },
            loss=loss,
            perplexity=math.exp(loss),
            tokens_trained=tokens,
            bytes_up=2_000 * len(silos),
            bytes_down=12_926_976 * len(silos),
            seconds=1.1,
        )

    yield evaluated(0, 0)
    yield Notice(time=now, level="info", message="bf16 trains 1.8 times as fast as fp32 here; using bf16")
    tokens = 0
    for number in range(1, rounds + 1):
        began = now
        cohort = sorted(chance.sample(sorted(silos), 3))
        yield RoundStarted(time=now, round=number, cohort=cohort, global_step=32 * (number - 1))
        current = losses(number - 0.4)
        slowest, done = 0.0, []
        for silo in cohort:
            if number == 4 and silo == cohort[-1]:
                now += 0.4
                reason = "the reply holds a value that is not finite (group params, tensor lm_head.weight)"
                yield SiloFailed(time=now, round=number, silo=silo, kind="rejected", reason=reason)
                continue
            training = 2.7 + chance.random()
            slowest = max(slowest, training)
            done.append(silo)
            now += training / 2
            yield SiloFinished(
                time=now,
                round=number,
                silo=silo,
                steps=32,
                tokens=32 * step_tokens,
                loss=current[silo],
                loss_last=current[silo] - 0.1,
                learning_rate=0.003 * 0.5 * (1 + math.cos(math.pi * number / rounds)),
                seconds={"total": training + 0.4, "training": training, "load": 0.2, "save": 0.1},
                bytes_up=12_926_976,
                bytes_down=12_926_976,
                update_norm=4.0 / math.sqrt(number) * (0.9 + 0.2 * chance.random()),
                tokens_per_second=32 * step_tokens / training,
                mfu=32 * step_tokens / training * 2.1e7 / 4.1e11,
                gradient_norm=1.4 / math.sqrt(number),
            )
        tokens += 32 * step_tokens * len(done)
        now += 0.3
        yield evaluated(number, tokens)
        now += 0.1
        path = f"checkpoints/round-{number:06}"
        yield Checkpointed(time=now, round=number, path=path, bytes=12_990_000, seconds=0.1)
        took = now - began
        yield RoundFinished(
            time=now,
            round=number,
            global_step=32 * number,
            tokens=tokens,
            train_loss=sum(current[silo] for silo in done) / len(done),
            pseudo_gradient_norm=2.9 / math.sqrt(number) * (0.95 + 0.1 * chance.random()),
            silo_cosine=0.55 - 0.03 * number + 0.04 * chance.random(),
            consensus=0.82 - 0.015 * number + 0.02 * chance.random(),
            parameter_norm=61.0 + 0.9 * number,
            bytes_up=12_926_976 * len(done),
            bytes_down=12_926_976 * len(cohort),
            seconds={
                "round": took,
                "training": slowest,
                "fold": 0.02,
                "outer": 0.01,
                "evaluate": 1.1,
                "checkpoint": 0.1,
                "overhead": took - slowest,
            },
        )
