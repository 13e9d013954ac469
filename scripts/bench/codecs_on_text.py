"""Validation perplexity over every preset of the link, at equal tokens.

    python scripts/bench/codecs_on_text.py run --minutes 30    # go on with what is missing
    python scripts/bench/codecs_on_text.py table               # what there is, as a page of docs/results

Every run is a whole federation of two silos in this process, on text that the installation brings, dealt
out evenly, with one learning rate for all. Its result is one JSON file; a run that has one is not done
again, so the script may be stopped at any time. The same seed draws the same weights and the same text.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convergence import ADAM, SETTINGS, dealt_evenly
from text_runs import Runs, federate, load, parsers, temporary_folder

PRESETS = ["dense", "int8", "int4", "sparseloco", "e3m0", "topk", "sign", "fp8", "powersgd", "bf16"]
RECIPES = {"Photon": ["strategy=photon", ADAM], "DiLoCo": ["strategy=diloco", ADAM]}
CLIENTS = 2
RATE = 0.008


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "run":
        run_missing(arguments)
    else:
        write_page(arguments.folder, arguments.output)


def run_missing(arguments: argparse.Namespace) -> None:
    runs, steps = Runs(arguments.folder, arguments.minutes), arguments.steps
    for seed in arguments.seeds:
        for preset, recipe, local_steps in itertools.product(
            arguments.presets, arguments.recipes, arguments.local_steps
        ):
            name = f"{recipe}-{preset}-{steps}-H{local_steps}-seed{seed}"
            runs.once(name, partial(train, arguments.data, recipe, preset, steps, local_steps, seed))


def train(data: Path, recipe: str, preset: str, steps: int, local_steps: int, seed: int) -> dict[str, Any]:
    rounds = steps // local_steps
    overrides = [
        *SETTINGS,
        *RECIPES[recipe],
        f"link={preset}",
        f"optimizer.lr={RATE}",
        f"data.path={dealt_evenly(data, CLIENTS)}",
        f"cohort={CLIENTS}",
        f"local_steps={local_steps}",
        f"rounds={rounds}",
        f"evaluation.every={rounds}",
        f"seed={seed}",
    ]
    with temporary_folder() as run_dir:
        summary = federate(overrides, run_dir)
    replies = rounds * CLIENTS
    result: dict[str, Any] = {
        "recipe": recipe,
        "preset": preset,
        "steps": steps,
        "local_steps": local_steps,
        "seed": seed,
    }
    result["perplexity"] = summary and summary["perplexity"]["final"]
    if summary:
        sent = summary["bytes"]
        result["parameters"] = summary["parameters"]
        result["payload_up"] = sent["per_group"]["params"]["up"] / replies
        result["bytes_up"] = sum(one["up"] for one in sent["per_client"].values()) / replies
        result["bytes_down"] = sum(one["down"] for one in sent["per_client"].values()) / replies
    return result


# --- the page ---------------------------------------------------------------------------------------


def write_page(folder: Path, output: Path) -> None:
    results = load(folder)
    lines = [
        "# Codecs on text: the figures",
        "",
        f"Written by `python scripts/bench/codecs_on_text.py table` from {len(results)} runs: {CLIENTS}",
        f"silos, batch 4 × 64 tokens, peak rate {RATE}. *Dense* is the perplexity against that of",
        "`link=dense` with the same seed. Bytes are those of one reply; the payload is what the tensors",
        "take, the rest are names, codings, order and report. What they mean is in",
        "[the link](../link.md#on-text).",
        "",
    ]
    cells = sorted({(one["steps"], one["local_steps"]) for one in results})
    for recipe, cell in itertools.product(RECIPES, cells):
        lines += table(
            [one for one in results if (one["recipe"], one["steps"], one["local_steps"]) == (recipe, *cell)],
            f"{recipe}, {cell[0]} local steps, {cell[1]} a round",
        )
    output.write_text("\n".join(lines).rstrip() + "\n")
    print(f"{output}: {len(results)} runs")


def table(results: Sequence[dict[str, Any]], title: str) -> Iterator[str]:
    by_seed = {(one["preset"], one["seed"]): one for one in results}
    if not results:
        return
    yield f"## {title}"
    yield ""
    yield "| `link=` | Perplexity | Dense, each seed | Bits a parameter up | Payload, of float32 | Bytes up |"
    yield "|---|---:|---:|---:|---:|---:|"
    for preset in PRESETS:
        seeds = [seed for name, seed in by_seed if name == preset]
        runs = [by_seed[preset, seed] for seed in seeds]
        if not runs:
            continue
        if any(one["perplexity"] is None for one in runs):
            yield f"| {preset} | diverged | | | | |"
            continue
        against = [
            f"{100 * (one['perplexity'] / by_seed['dense', seed]['perplexity'] - 1):+.2f} %"
            for one, seed in zip(runs, seeds, strict=True)
            if ("dense", seed) in by_seed
        ]
        bits = 8 * runs[0]["payload_up"] / runs[0]["parameters"]
        mean = statistics.fmean(one["perplexity"] for one in runs)
        yield (
            f"| {preset} | {mean:.2f} | {', '.join(against)} | "
            f"{bits:.3f} | 1/{32 / bits:.1f} | {runs[0]['bytes_up']:,.0f} |"
        )
    yield ""


def parse_arguments() -> argparse.Namespace:
    made, run = parsers(__doc__, folder="runs/codecs", output="docs/results/link.md")
    run.add_argument("--data", type=Path, default=Path(".photon/convergence"), help="folder of the text")
    run.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    run.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    run.add_argument("--steps", type=int, default=256, help="local steps of each silo in a run")
    run.add_argument("--local-steps", nargs="+", type=int, default=[16, 64], help="of a round")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    return made.parse_args()


if __name__ == "__main__":
    main()
