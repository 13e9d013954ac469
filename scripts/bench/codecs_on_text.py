"""Validation perplexity over every preset of the link, at equal tokens.

    python scripts/bench/codecs_on_text.py run --minutes 30    # go on with what is missing
    python scripts/bench/codecs_on_text.py table               # what there is, as a page of docs/results

Every run is a whole federation of two silos in this process, on text that the installation brings, dealt
out evenly, with one learning rate for all. Its result is one JSON file; a run that has one is not done
again, so the script may be stopped at any time. The same seed draws the same weights and the same text.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convergence import ADAM, COMMON, load, prepared

PRESETS = ["dense", "int8", "int4", "sparseloco", "e3m0", "topk", "sign", "fp8", "powersgd", "bf16"]
RECIPES = {"Photon": ["strategy=photon", ADAM], "DiLoCo": ["strategy=diloco", ADAM]}
CLIENTS = 2
RATE = 0.008


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "run":
        run_missing(arguments, time.monotonic() + 60 * arguments.minutes)
    else:
        write_page(arguments.folder, arguments.output)


def run_missing(arguments: argparse.Namespace, until: float) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for preset, recipe, local_steps in itertools.product(
            arguments.presets, arguments.recipes, arguments.local_steps
        ):
            path = arguments.folder / f"{recipe}-{preset}-{arguments.steps}-H{local_steps}-seed{seed}.json"
            if path.exists() or time.monotonic() > until:
                continue
            result = train(arguments.data, recipe, preset, arguments.steps, local_steps, seed)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(result, indent=1))
            temporary.replace(path)
            print(f"{path.stem}: perplexity {result['perplexity']}", flush=True)


def train(data: Path, recipe: str, preset: str, steps: int, local_steps: int, seed: int) -> dict[str, Any]:
    from photon.config import compose
    from photon.errors import RunError
    from photon.federation.run import prepare_run, run_inprocess

    rounds = steps // local_steps
    run_dir = Path(tempfile.mkdtemp(prefix="photon-codecs-"))
    config = compose(
        [
            *COMMON,
            *RECIPES[recipe],
            f"link={preset}",
            f"optimizer.lr={RATE}",
            f"data.path={prepared(data, CLIENTS)}",
            f"cohort={CLIENTS}",
            f"local_steps={local_steps}",
            f"rounds={rounds}",
            f"evaluation.every={rounds}",
            f"seed={seed}",
            f"run_dir={run_dir}",
        ]
    )
    began = time.process_time()
    try:
        summary = run_inprocess(prepare_run(config), resume=False)
    except RunError as error:
        if "diverged" not in str(error) and "finite" not in str(error):
            raise
        summary = None
    shutil.rmtree(run_dir)
    replies = rounds * CLIENTS
    result: dict[str, Any] = {
        "recipe": recipe,
        "preset": preset,
        "steps": steps,
        "local_steps": local_steps,
        "seed": seed,
    }
    result["cpu_seconds"] = time.process_time() - began
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
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do runs that are missing")
    run.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    run.add_argument("--data", type=Path, default=Path(".photon/convergence"), help="folder of the text")
    run.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    run.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    run.add_argument("--steps", type=int, default=256, help="local steps of each silo in a run")
    run.add_argument("--local-steps", nargs="+", type=int, default=[16, 64], help="of a round")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    page = commands.add_parser("table", help="write the page")
    page.add_argument("--output", type=Path, default=Path("docs/results/link.md"))
    for command in (run, page):
        command.add_argument("--folder", type=Path, default=Path("runs/codecs"), help="the results")
    return made.parse_args()


if __name__ == "__main__":
    main()
