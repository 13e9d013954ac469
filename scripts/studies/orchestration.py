"""Who reads whom: a learnt policy beside fixed ones, with agents whose skills are numbers and with SmolLM2.

    python scripts/studies/orchestration.py run --minutes 45             # go on with what is missing
    python scripts/studies/orchestration.py run --smollm2 models/smollm2 --arc arc_easy.jsonl.gz
    python scripts/studies/orchestration.py table                        # docs/results/orchestration.md

Simulated agents are those of `simulated_agents.py`. SmolLM2-135M-Instruct, as `photon import` writes it, is
served by `photon serve` and asked questions of ARC-easy, a JSON Lines file of ``query``, ``choices`` and
``gold``.
"""

import math
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import Result, Results, Runs
from served_agents import REAL, TEMPERATURES, Place, asked, written_questions
from simulated_agents import Simulated, Skills
from study import Study, paragraph
from tables import percent, save_figure, table
from torch import Tensor

SEEDS = (0, 1, 2, 3, 4)
TRAINED, JUDGED = 8000, 4000
#: Finding and checking.
SKILLS = ((0.35, 0.8), (0.35, 0.65), (0.35, 0.5), (0.5, 0.8))
MAIN = SKILLS[0]
FIXED = ("parallel", "full", "rule")

#: Ours: several graphs of each question, whose mean is the baseline, and a smaller price.
_OURS = {"updates": 800, "graphs": 8, "lambda_sp": 0.03}
LEARNT: Mapping[str, Mapping[str, Any]] = {
    "as published": {
        "policy": {"logit_scale": "1", "logit_bias": None},
        "training": {"lr": 0.1, "updates": 50, "sparsity_norm": "raw"},
    },
    "Gram": {},
    "Gram, ours": {"policy": {"dropout": 0.0, "logit_bias": -2.0}, "training": _OURS},
    "learnt scale": {
        "policy": {"dropout": 0.0, "learn_scale": True, "logit_bias": 0.0},
        "training": _OURS,
    },
    "asymmetric": {
        "policy": {"dropout": 0.0, "logits": "asymmetric", "logit_bias": 0.0},
        "training": _OURS,
    },
}
#: Those that other skills are tried with.
ELSEWHERE = ("asymmetric",)
#: Agents that a policy of ten is tried with.
NUMBERS = (5, 10, 15, 20)
#: Silos of the federation, rounds, and the policy that they train.
SILOS, ROUNDS, TOGETHER = 4, 20, "asymmetric"


# --- simulated agents ------------------------------------------------------------------------------


def figures(world: Simulated, edges: Tensor) -> dict[str, Any]:
    """Return what graphs of all questions come to."""
    from photon.orchestration.figures import changes

    questions = torch.arange(len(world))
    after = world.answers(questions, edges)
    before = world.answers(questions, torch.zeros_like(edges))
    found = changes(before.tolist(), after.tolist())
    calls = world.skills.agents + edges.any(-2).sum(-1).float().mean()
    return {
        "accuracy": round(float(after.float().mean()), 4),
        "calls": round(float(calls), 3),
        "edges": round(float(edges.sum((-2, -1)).float().mean()), 2),
        **{key: round(found[key] or 0.0, 4) for key in ("rescue", "harm")},
    }


def fixed(skills: Skills, name: str, seed: int, first: int = 2000) -> Result:
    """Judge one of the ways that learn nothing."""
    from photon.orchestration.graph import allowed, contributions, ranks

    world = Simulated(skills, JUDGED, seed=first + seed)
    questions = torch.arange(len(world))
    may = allowed(ranks(contributions(world.drafts(questions))))
    edges = {"parallel": torch.zeros_like(may), "full": may, "rule": may & world.unlike(questions)}[name]
    return {**of(skills, name, seed), **figures(world, edges)}


def of(skills: Skills, policy: str, seed: int) -> Result:
    return {"finding": skills.finding, "checking": skills.checking, "policy": policy, "seed": seed}


def learnt(skills: Skills, name: str, seed: int, *, shuffled: bool = False) -> Result:
    """Train a policy, and judge it on other questions, by likely edges and by drawn ones."""
    from photon.orchestration.policy import Policy
    from photon.orchestration.reinforce import Reinforce

    method = method_named(name)
    policy = Policy(method.policy, skills.size, seed=seed)
    world = Simulated(skills, TRAINED, seed=1000 + seed, shuffled=shuffled)
    *_, last = Reinforce(policy, method.training, seed=seed).steps(world, method.training.updates)
    other = Simulated(skills, JUDGED, seed=2000 + seed, shuffled=shuffled)
    found = {**of(skills, name, seed), **judged(policy, other, seed), "training_edges": round(last.edges, 2)}
    return {**found, "shuffled": True} if shuffled else found


def moved(skills: Skills, name: str, seed: int) -> Result:
    """Train a policy with ten agents, and judge it with other numbers of them."""
    from photon.orchestration.policy import Policy
    from photon.orchestration.reinforce import Reinforce

    method = method_named(name)
    policy = Policy(method.policy, skills.size, seed=seed)
    world = Simulated(skills, TRAINED, seed=1000 + seed)
    list(Reinforce(policy, method.training, seed=seed).steps(world, method.training.updates))
    found = {}
    for agents in NUMBERS:
        others = replace(skills, agents=agents)
        judge = Simulated(others, JUDGED, seed=3000 + seed)
        found[str(agents)] = {
            "policy": judged(policy, judge, seed)["sampled"],
            **{one: fixed(others, one, seed, first=3000) for one in ("parallel", "rule")},
        }
    accuracy = found[str(skills.agents)]["policy"]["accuracy"]
    return {"moved": name, "seed": seed, "accuracy": accuracy, "agents": found}


def judged(policy: Any, world: Simulated, seed: int) -> Result:
    from photon.orchestration.graph import contributions, likeliest, ranks, sampled

    embeddings = world.drafts(torch.arange(len(world)))
    rank = ranks(contributions(embeddings))
    with torch.no_grad():
        logits = policy.eval()(embeddings)
    drawn = sampled(logits, rank, torch.Generator().manual_seed(seed))
    return {**figures(world, likeliest(logits, rank)), "sampled": figures(world, drawn)}


def method_named(name: str) -> Any:
    from photon.orchestration.method import method_of

    return method_of(LEARNT[name], name)


def federated(skills: Skills, way: str, seed: int) -> Result:
    """Train a policy in one place, in a federation of one, in one of several silos, or at a silo alone."""
    from photon.orchestration.federated import Federated
    from photon.orchestration.policy import Policy
    from photon.orchestration.reinforce import Reinforce

    method = method_named(TOGETHER)
    policy = Policy(method.policy, skills.size, seed=seed)
    share = TRAINED // SILOS
    silos = {str(one): Simulated(skills, share, seed=1000 + 10 * seed + one) for one in range(SILOS)}
    updates = method.training.updates
    if way in ("centralised", "federation of one"):
        world = Simulated(skills, TRAINED, seed=1000 + seed)
        if way == "centralised":
            list(Reinforce(policy, method.training, seed=seed).steps(world, updates))
        else:
            rounds = Federated(policy, method.training, {"all": world}, seed=seed).rounds(
                ROUNDS, updates // ROUNDS
            )
            list(rounds)
    elif way == "one silo alone":
        list(Reinforce(policy, method.training, seed=seed).steps(silos["0"], updates))
    else:
        list(Federated(policy, method.training, silos, seed=seed).rounds(ROUNDS, updates // ROUNDS))
    total = sum((float(value.double().sum()) for value in policy.state_dict().values()), 0.0)
    found = judged(policy, Simulated(skills, JUDGED, seed=2000 + seed), seed)
    return {"way": way, "seed": seed, "parameters": total.hex(), **found}


WAYS = ("centralised", "federation of one", f"{SILOS} silos", "one silo alone")


# --- what is run -----------------------------------------------------------------------------------


def options(run: ArgumentParser) -> None:
    run.add_argument("--data", type=Path, default=Path(".photon/orchestration"), help="folder of answers")
    run.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct, as `photon import` writes it")
    run.add_argument("--arc", type=Path, help="questions of ARC-easy")
    run.add_argument("--questions", type=int, default=30, help="how many of them")
    run.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts of the study")


def run_missing(runs: Runs, arguments: Namespace) -> None:
    torch.set_num_threads(1)
    for part in arguments.only:
        PARTS[part](runs, arguments)


def run_main(runs: Runs, _: Namespace) -> None:
    """Do all policies with the first skills."""
    for seed in SEEDS:
        run_skills(runs, MAIN, seed, LEARNT)


def run_skills(runs: Runs, numbers: tuple[float, float], seed: int, policies: Iterable[str]) -> None:
    skills, name = Skills(*numbers), f"f={numbers[0]:g} c={numbers[1]:g}"
    for policy in FIXED:
        runs.once(f"{name} {policy} s{seed}", partial(fixed, skills, policy, seed))
    for policy in policies:
        runs.once(f"{name} {policy} s{seed}", partial(learnt, skills, policy, seed))


def run_others(runs: Runs, _: Namespace) -> None:
    """Do some policies with the other skills."""
    for seed in SEEDS[:3]:
        for skills in SKILLS[1:]:
            run_skills(runs, skills, seed, ELSEWHERE)


def run_shuffled(runs: Runs, _: Namespace) -> None:
    for seed in SEEDS:
        shuffled = partial(learnt, Skills(*MAIN), TOGETHER, seed, shuffled=True)
        runs.once(f"shuffled {TOGETHER} s{seed}", shuffled)


def run_federated(runs: Runs, _: Namespace) -> None:
    for seed in SEEDS[:2]:
        for way in WAYS:
            runs.once(f"federated {way} s{seed}", partial(federated, Skills(*MAIN), way, seed))


def run_moved(runs: Runs, _: Namespace) -> None:
    for seed in SEEDS[:2]:
        runs.once(f"moved {TOGETHER} s{seed}", partial(moved, Skills(*MAIN), TOGETHER, seed))


def run_real(runs: Runs, arguments: Namespace) -> None:
    if arguments.smollm2 is None or arguments.arc is None:
        return
    target = arguments.data / f"arc-easy-{arguments.questions}.jsonl"
    questions = written_questions(arguments.arc, target, arguments.questions)
    place = Place(arguments.smollm2, questions, arguments.data, arguments.questions)
    for policy in REAL:
        runs.once(f"SmolLM2 {policy} {place.number}", partial(asked, place, policy))


PARTS = {
    "main": run_main,
    "shuffled": run_shuffled,
    "federated": run_federated,
    "others": run_others,
    "moved": run_moved,
    "smollm2": run_real,
}


# --- the page --------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean and standard deviation of shares, in percent."""
    mean = f"{100 * statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def runs_of(results: Results, skills: tuple[float, float], policy: str) -> list[Result]:
    return [
        one
        for one in results
        if "finding" in one
        and not one.get("shuffled")
        and (one["finding"], one["checking"], one["policy"]) == (*skills, policy)
    ]


def mean_of(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(one[key] for one in runs)


def mixed(results: Results, skills: tuple[float, float], calls: float) -> float | None:
    """Return the accuracy of the rule in as many questions as make these calls, parallel in the others."""
    ends = [runs_of(results, skills, name) for name in ("parallel", "rule")]
    if not all(ends):
        return None
    (low, high), (cheap, dear) = ([mean_of(one, key) for one in ends] for key in ("accuracy", "calls"))
    return low + (high - low) * min(1.0, (calls - cheap) / (dear - cheap))


def sections(results: Results) -> Iterator[str]:
    for skills in SKILLS:
        yield from simulated_section(results, skills)
    yield from overall_section(results)
    yield from leak_section(results)
    yield from federated_section(results)
    yield from moved_section(results)
    yield from real_section(results)
    yield from paper_section()


def simulated_section(results: Results, skills: tuple[float, float]) -> Iterator[str]:
    rows = []
    for policy in (*FIXED, *LEARNT):
        runs = runs_of(results, skills, policy)
        if not runs:
            continue
        drawn = [one["sampled"] for one in runs if one.get("sampled")]
        for decided, parts in (("likely edges", runs), ("drawn edges", drawn)):
            if len(parts) == len(runs):
                same = mixed(results, skills, mean_of(parts, "calls"))
                rows.append(
                    [
                        policy,
                        "" if policy in FIXED else decided,
                        spread([one["accuracy"] for one in parts]),
                        f"{mean_of(parts, 'calls'):.1f}",
                        "" if policy in FIXED or same is None else f"{100 * same:.1f}",
                        f"{mean_of(parts, 'edges'):.1f}",
                        spread([one["rescue"] for one in parts]),
                        spread([one["harm"] for one in parts]),
                    ]
                )
    if not rows:
        return
    yield f"## Simulated agents that find {percent(skills[0])} and check {percent(skills[1])}"
    yield ""
    columns = ["Policy", "", "Accuracy, %", "Calls", "Rule at these calls", "Edges", "Rescue, %", "Harm, %"]
    yield from table(columns, rows, left=(0, 1))


def overall_section(results: Results) -> Iterator[str]:
    """Lay the policies that were tried with all skills side by side."""
    from photon.orchestration.figures import average_ranks

    found = {
        policy: [runs_of(results, skills, policy) for skills in SKILLS] for policy in (*FIXED, *ELSEWHERE)
    }
    if not all(all(parts) for parts in found.values()):
        return
    shown = {
        policy: [[one.get("sampled", one) for one in part] for part in parts]
        for policy, parts in found.items()
    }
    scores = {policy: [mean_of(one, "accuracy") for one in parts] for policy, parts in shown.items()}
    ranks = average_ranks(scores)
    yield "## Over all skills"
    yield ""
    rows = [
        [
            policy if policy in FIXED else f"{policy}, drawn edges",
            *(f"{100 * one:.1f}" for one in scores[policy]),
            f"{100 * statistics.fmean(scores[policy]):.1f}",
            f"{ranks[policy]:.2f}",
            f"{statistics.fmean(mean_of(one, 'calls') for one in parts):.1f}",
        ]
        for policy, parts in shown.items()
    ]
    columns = [f"{percent(find)}, {percent(check)}" for find, check in SKILLS]
    yield from table(["Policy", *columns, "Average, %", "Average rank", "Calls"], rows)


def leak_section(results: Results) -> Iterator[str]:
    runs = [one for one in results if one.get("shuffled")]
    if not runs:
        return
    yield "## A policy trained on shuffled labels"
    yield ""
    chance = 100 / Skills(*MAIN).classes
    likely, drawn = (
        spread([one["accuracy"] for one in part]) for part in (runs, [one["sampled"] for one in runs])
    )
    yield from paragraph(
        f"Judged by labels that are shuffled, too: {likely} % right by likely edges, {drawn} % by drawn "
        f"ones. Chance is {chance:g} %."
    )
    yield ""


def federated_section(results: Results) -> Iterator[str]:
    rows = []
    found = {way: {one["seed"]: one for one in results if one.get("way") == way} for way in WAYS}
    for way, runs in found.items():
        if runs:
            parts = list(runs.values())
            equal = [
                one["parameters"] == found[WAYS[0]][seed]["parameters"]
                for seed, one in runs.items()
                if seed in found[WAYS[0]]
            ]
            rows.append(
                [
                    way,
                    spread([one["accuracy"] for one in parts]),
                    f"{mean_of(parts, 'calls'):.1f}",
                    spread([one["sampled"]["accuracy"] for one in parts]),
                    f"{mean_of([one['sampled'] for one in parts], 'calls'):.1f}",
                    f"{sum(equal)} of {len(equal)}" if equal else "–",
                ]
            )
    if not rows:
        return
    yield "## Federated training of the policy"
    yield ""
    columns = ["Trained", "Likely edges, %", "Calls", "Drawn edges, %", "Calls", "Same bits as centralised"]
    yield from table(columns, rows)


def moved_section(results: Results) -> Iterator[str]:
    runs = [one for one in results if one.get("moved")]
    if not runs:
        return
    yield f"## The {TOGETHER} policy of ten agents, with other numbers of them"
    yield ""
    rows = []
    for number in NUMBERS:
        cells = [str(number)]
        for name in ("policy", "parallel", "rule"):
            parts = [one["agents"][str(number)][name] for one in runs]
            cells += [spread([one["accuracy"] for one in parts]), f"{mean_of(parts, 'calls'):.1f}"]
        rows.append(cells)
    columns = ["Agents", "Drawn edges, %", "Calls", "Parallel, %", "Calls", "Rule, %", "Calls"]
    yield from table(columns, rows)


def real_section(results: Results) -> Iterator[str]:
    runs = {one["policy"]: one for one in results if one.get("model") == "SmolLM2"}
    if not runs:
        return
    yield "## SmolLM2-135M-Instruct on ARC-easy"
    yield ""
    rows = []
    for policy in REAL:
        if one := runs.get(policy):
            error = math.sqrt(one["accuracy"] * (1 - one["accuracy"]) / one["judged"])
            rows.append(
                [
                    policy,
                    f"{100 * one['accuracy']:.1f} ± {100 * error:.1f}",
                    f"{one['calls']:.1f}",
                    f"{one['edges']:.1f}",
                    f"{one['rescued']} of {one['wrong_before']}",
                    f"{one['harmed']} of {one['right_before']}",
                    f"{(one['prompt_tokens'] + one['completion_tokens']) / one['judged']:,.0f}",
                ]
            )
    columns = ["Policy", "Accuracy, %", "Calls", "Edges", "Rescued", "Harmed", "Tokens a question"]
    yield from table(columns, rows)


#: AQUA-RAT, HumanEval, GSM8K, average and total tokens, from digests of the paper and not from its text.
PAPERS = (
    ("Single", "52.62", "50.41", "70.07", "57.70", "1.15 M"),
    ("CoT", "54.46", "45.93", "70.47", "56.95", "1.30 M"),
    ("SC", "56.82", "12.52", "71.53", "46.96", "11.22 M"),
    ("SelfOrg*", "56.46", "52.03", "72.60", "60.36", "28.41 M"),
    ("GPTSwarm", "55.91", "36.79", "69.33", "54.01", "38.02 M"),
    ("Nexa", "57.74", "51.42", "73.53", "60.90", "18.36 M"),
)


def paper_section() -> Iterator[str]:
    yield "## What the paper reports (second-hand)"
    yield ""
    yield from paragraph(
        "Qwen2.5-1.5B-Instruct, ten agents, accuracy in %. From two digests of 2605.15573 that agree; its "
        "text was not at hand. Not measured here: no model of that size was."
    )
    yield ""
    yield from table(["Method", "AQUA-RAT", "HumanEval", "GSM8K", "Average", "Tokens"], PAPERS)


def plot(results: Results, path: Path) -> None:
    """Draw accuracy over calls, a mark for each policy and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, skills in zip(axes, (MAIN, SKILLS[3]), strict=True):
        ends = [runs_of(results, skills, name) for name in ("parallel", "rule")]
        if all(ends):
            points = [[mean_of(one, key) for one in ends] for key in ("calls", "accuracy")]
            axis.plot(*points, color="0.7", zorder=0, label="rule in a share of the questions")
        for policy in (*FIXED, *LEARNT):
            runs = runs_of(results, skills, policy)
            if policy not in FIXED:
                runs = [one["sampled"] for one in runs]
            if runs:
                mark = "s" if policy in FIXED else "o"
                calls, right = ([one[key] for one in runs] for key in ("calls", "accuracy"))
                axis.plot(calls, right, mark, markersize=4, label=policy)
        axis.set_title(f"find {percent(skills[0])}, check {percent(skills[1])}", fontsize=9)
        axis.set_xlabel("calls per question")
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)


ABOUT = (
    f"Ten simulated agents (`scripts/studies/simulated_agents.py`) answer {JUDGED} questions that no "
    "policy was trained on; mean ± standard deviation over the seeds that have a line. Finding is how "
    "often a draft is right, checking how often an agent tells a right answer from a wrong one. Calls "
    "are drafts and second answers of a question. Rescue is the share of the questions wrong by the "
    "drafts alone that are right in the end, harm that of the right ones that are wrong. `rule` joins "
    "every two drafts that differ; rule at these calls is what it has when it is used in as many "
    "questions as make the same number of calls, and the drafts alone in the others. As published has "
    "the settings that digests of the paper give (Gram logits, no bias, Adam 0.1, 50 updates of 32, "
    "0.1 an edge), Gram our defaults (a bias, 0.001, 400 updates, a price on the share of edges). The "
    f"others are ours: {_OURS['graphs']} graphs a question whose mean is the baseline, "
    f"{_OURS['updates']} updates, and for two of them logits that can favour edges between unlike "
    "drafts, by a scale that is learnt or by two projections. An edge is there if it is likelier than "
    f"not, or drawn. The federation has {SILOS} silos with a quarter of the questions each, {ROUNDS} "
    "rounds, plain averaging and as many updates a silo as centralised training has. SmolLM2 is asked "
    f"at four temperatures ({TEMPERATURES[0]} to {TEMPERATURES[-1]}), with answers of 12 tokens at "
    "most; ± is the standard error of the share."
)

STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/orchestration.md",
    title="Who reads whom",
    about=lambda _: ABOUT,
    run=run_missing,
    sections=sections,
    options=options,
    plot=plot,
    plotted="Accuracy over calls",
    figure="accuracy",
)

if __name__ == "__main__":
    STUDY.main()
