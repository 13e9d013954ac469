"""What models are told. The words are this project's own; the forms of answers are the paper's."""

from photon.benchmarks.bixbench.choices import Choices
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.notebook.document import Shown

_TASK = """\
You answer a question on biological data by analysing the data in a Jupyter notebook (Python). The data \
lies in the notebook's work folder, read-only; there is no network. Look at the files first, compute what \
the question needs, and submit an answer that is as short as it can be: a number, a name, a range.

Question: {question}"""

_BY_TOOLS = """

Work with the tools, one call at a time; submit_answer ends the work."""

_BY_TEXT = """

Each of your messages is one action, in one of these forms:

To see the files, write the line
ACTION: list_workdir

To add a cell and run the notebook, write the line and the code
ACTION: edit_cell
```python
...
```
(with a number after edit_cell, that cell is replaced)

To answer, which ends the work, write
<answer>...</answer>"""

_REFUSED_NOTE = "If you cannot tell, choose the option that says so. "
_FORCED_NOTE = "Choose one even if you are not sure. "

_CHOICE = """\
{before}Question: {question}

{options}

{note}Answer with the letter of one option between tags, as in <answer>B</answer>."""

_OPEN = """\
Question: {question}

Answer as briefly as the question allows, between tags, as in <answer>0.25</answer>."""

_FINISHED = """\
A notebook was written to answer a question. Here it is:

{notebook}

The answer that was given: {answer}

"""

#: Asked again when an action is none.
NO_CALL = "That was no action. Call one of the tools: list_workdir, edit_cell or submit_answer."
NO_TEXT = (
    "That was no action. Write one of the three forms: ACTION: list_workdir, ACTION: edit_cell, <answer>."
)

#: Of an earlier state of the notebook, in place of it.
OLD_STATE = "(an earlier state of the notebook)"

RUBRIC = """\
You grade an answer against the right one. It is correct if it says the same: the same value within \
rounding, the same name or another word for it, the same finding. It is refused if it says that the question \
cannot be answered. Everything else is incorrect.

Question: {question}
Right answer: {ideal}
Answer: {answer}

Reply with one of: <grade>correct</grade>, <grade>incorrect</grade>, <grade>refused</grade>."""

RANGE_RUBRIC = """\
You grade an answer against a range, both ends inside. It is correct if its value lies in the range, in \
whatever form it is written. It is refused if it says that the question cannot be answered. Everything else \
is incorrect.

Question: {question}
Range: {ideal}
Answer: {answer}

Reply with one of: <grade>correct</grade>, <grade>incorrect</grade>, <grade>refused</grade>."""


def task(question: Question, *, by_text: bool) -> str:
    """Return what an agent is told first."""
    return _TASK.format(question=question.text) + (_BY_TEXT if by_text else _BY_TOOLS)


def open_question(question: Question) -> str:
    """Return what a model without tools is asked."""
    return _OPEN.format(question=question.text)


def choice(question: Question, choices: Choices, finished: tuple[Shown, str | None] | None) -> str:
    """Return what a model is asked that chooses; ``finished`` is an agent's notebook and answer."""
    before = ""
    if finished is not None:
        notebook, answer = finished
        before = _FINISHED.format(notebook=notebook.text, answer=answer or "(none)")
    note = _FORCED_NOTE if choices.refusal is None else _REFUSED_NOTE
    return _CHOICE.format(
        before=before, question=question.text, options="\n".join(choices.lines()), note=note
    )
