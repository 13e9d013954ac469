"""Grade the predictions that the authors publish again, and compare with what they recorded.

    python scripts/bixbench/regrade.py --data DIR

`DIR` holds the .csv files of `bixbench-v1.5_results/zero_shot_baselines` and of
`bixbench_results/baseline_eval_data`, from the authors' repository; they are not part of this one. Every
letter must have its recorded grade, and as upstream no rule may contradict that of an open answer.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Literal

from photon.benchmarks.bixbench.predictions import grade_predictions, read_predictions
from photon.benchmarks.bixbench.settings import GradeSettings

#: File to answers, right ones, and those that refuse.
COUNTS = {
    "gpt-4o-grader-mcq-refusal-True": (205, 8, 185),
    "gpt-4o-grader-mcq-refusal-False": (205, 74, 0),
    "claude-3-5-sonnet-latest-grader-mcq-refusal-True": (205, 17, 161),
    "claude-3-5-sonnet-latest-grader-mcq-refusal-False": (205, 70, 0),
    "bixbench_llm_baseline_refusal_True_mcq_gpt-4o_1.0": (296, 32, 232),
    "bixbench_llm_baseline_refusal_False_mcq_gpt-4o_1.0": (296, 95, 0),
    "bixbench_llm_baseline_refusal_True_mcq_claude-3-5-sonnet-latest_1.0": (296, 41, 217),
    "bixbench_llm_baseline_refusal_False_mcq_claude-3-5-sonnet-latest_1.0": (296, 100, 0),
}
#: Files of open answers, of which rules alone decide some.
OPEN = ("gpt-4o-grader-openended", "claude-3-5-sonnet-latest-grader-openended")


def choices(file: Path) -> tuple[tuple[int, int, int], int]:
    """Return the counts of a file of letters, and how many grades differ from the recorded ones."""
    rows = read_predictions(file)
    found = grade_predictions(rows, GradeSettings(), None)
    states = [verdict.state for verdict in found]
    differing = sum(
        (verdict.correct, verdict.state == "refused") != (row["grade"] == "1", row["sure"] == "True")
        for row, verdict in zip(rows, found, strict=True)
    )
    return (len(states), states.count("correct"), states.count("refused")), differing


def opened(file: Path, partial: Literal["words", "upstream"] = "upstream") -> tuple[int, int]:
    """Return how many open answers rules decide, and how many of these contradict the recorded grade."""
    rows = read_predictions(file)
    found = grade_predictions(rows, GradeSettings(partial_match=partial), None)
    pairs = [(row, one) for row, one in zip(rows, found, strict=True) if one.by in ("text", "part", "range")]
    return len(pairs), sum(one.correct != (row["grade"] == "1") for row, one in pairs)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the .csv files")
    folder, wrong = parser.parse_args().data, 0
    for name, expected in COUNTS.items():
        counts, differing = choices(folder / f"{name}.csv")
        wrong += differing + (counts != expected)
        print(f"{name}: {counts[1]} of {counts[0]} right, {counts[2]} refused, {differing} unlike the record")
    for name in OPEN:
        decided, differing = opened(folder / f"{name}.csv")
        wrong += differing
        print(f"{name}: {decided} decided by rules, {differing} unlike the record")
    if wrong:
        raise SystemExit("some grades are not those that were recorded")


if __name__ == "__main__":
    main()
