"""The papers' suites of in-context-learning tasks, by name, with the examples before each question."""

from dataclasses import dataclass

from photon.errors import PhotonError, printable


@dataclass(frozen=True)
class Asked:
    """A task that is asked for.

    Attributes
    ----------
    name
        What it is called in the results.
    file
        Name of its task file, without folder and suffix.
    registered
        Its name in lm-eval's own list, or None where that has no such task.
    shots
        Worked examples before each question.
    suites
        The suites it was asked for with; none where it was named itself.
    """

    name: str
    file: str
    registered: str | None
    shots: int = 0
    suites: tuple[str, ...] = ()


#: Tasks that go by other names in task files or in lm-eval: name, file, name in lm-eval.
_NAMES = {
    name: (file or name, registered)
    for name, file, registered in (
        ("bigbench_qa_wikidata", "", "bigbench_qa_wikidata_generate_until"),
        ("coqa", "", "coqa"),
        ("dyck", "bigbench_dyck_languages", "bigbench_dyck_languages_multiple_choice"),
        ("elementary_math", "bigbench_elementary_math_qa", "bigbench_elementary_math_qa_multiple_choice"),
        ("jeopardy", "jeopardy_all", None),
        ("lambada", "lambada_openai", "lambada_openai"),
        ("lsat_ar", "agi_eval_lsat_ar", "agieval_lsat_ar"),
        ("lsat_lr", "agi_eval_lsat_lr", "agieval_lsat_lr"),
        ("lsat_rc", "agi_eval_lsat_rc", "agieval_lsat_rc"),
        ("openbook_qa", "", "openbookqa"),
        ("operators", "bigbench_operators", "bigbench_operators_generate_until"),
        ("sat_en", "agi_eval_sat_en", "agieval_sat_en"),
        ("simple_arithmetic_nospaces", "", None),
        ("simple_arithmetic_withspaces", "", None),
        ("siqa", "", "social_iqa"),
        ("squad", "", "squad_completion"),
        ("strange_stories", "bigbench_strange_stories", "bigbench_strange_stories_multiple_choice"),
        ("strategy_qa", "bigbench_strategy_qa", "bigbench_strategyqa_multiple_choice"),
        ("svamp", "", None),
        ("winograd", "winograd_wsc", "wsc273"),
    )
}

#: Task and shots. Photon's is the gauntlet of its paper; the others are asked without examples.
SUITES: dict[str, dict[str, int]] = {
    "photon": {
        **{"jeopardy": 3, "bigbench_qa_wikidata": 3, "arc_easy": 3, "arc_challenge": 3, "mmlu": 5},
        **{"triviaqa": 3, "copa": 0, "siqa": 3, "commonsense_qa": 0, "piqa": 0, "openbook_qa": 10},
        **{"strange_stories": 0, "strategy_qa": 0, "lambada": 0, "hellaswag": 0, "winograd": 3},
        **{"winogrande": 5, "elementary_math": 1, "dyck": 5, "operators": 3},
        **{"simple_arithmetic_nospaces": 5, "simple_arithmetic_withspaces": 5, "gsm8k": 0, "svamp": 5},
        **{"lsat_ar": 5, "squad": 3, "boolq": 0, "coqa": 0, "lsat_rc": 5, "lsat_lr": 5, "sat_en": 5},
    },
    "desloc": {"arc_challenge": 0, "arc_easy": 0, "piqa": 0, "hellaswag": 0},
    "abbie": {"hellaswag": 0, "lambada": 0, "arc_easy": 0, "commonsense_qa": 0},
}


def asked_tasks(names: str, shots: int | None = None) -> list[Asked]:
    """Return the tasks of a list of names of tasks and suites, with commas between, each once.

    Parameters
    ----------
    names
        As given on the command line. A task that two suites have is asked once, where both have it with the
        same number of examples.
    shots
        Examples before each question, in place of the suites' numbers and of none.

    Raises
    ------
    PhotonError
        If the list is empty, or asks for a task with different numbers of examples.
    """
    asked: dict[str, Asked] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        suite = SUITES.get(name)
        for task, own in (suite or {name: 0}).items():
            file, registered = _NAMES.get(task, (task, task))
            wanted = own if shots is None else shots
            earlier = asked.get(task)
            if earlier is not None and earlier.shots != wanted:
                raise PhotonError(
                    f"--tasks {printable(names)}: {printable(task)} is asked for with {earlier.shots} and "
                    f"with {wanted} examples; ask for one suite at a time, or set --shots"
                )
            suites = (*(earlier.suites if earlier else ()), *((name,) if suite else ()))
            asked[task] = Asked(task, file, registered, wanted, suites)
    if not asked:
        raise PhotonError("--tasks names no task; give some with commas between, such as lambada,arc_easy")
    return list(asked.values())
