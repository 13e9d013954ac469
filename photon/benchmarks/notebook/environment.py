"""The tools an agent has: look at the files, write and run a cell, answer.

The interface is that of Aviary's environments: ``reset`` gives what an agent sees first, ``call`` takes one
action and gives what it sees then.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from photon.benchmarks.notebook.document import Notebook, cut
from photon.benchmarks.notebook.kernel import Kernel
from photon.benchmarks.notebook.sandbox import Limits, Shut
from photon.errors import printable

#: Characters of a cell, of an answer; cells of a notebook.
MOST_CODE, MOST_ANSWER, MOST_CELLS = 100_000, 10_000, 60
_MOST_LISTED = 200

_LIST = f"""
import json, os
def _photon_list(folder, room):
    found = {{}}
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        if room[0] == 0:
            found["..."] = "more"
            break
        room[0] -= 1
        if entry.is_dir(follow_symlinks=False):
            found[entry.name] = _photon_list(entry.path, room)
        else:
            found[entry.name] = entry.stat(follow_symlinks=False).st_size
    return found
print(json.dumps(_photon_list(".", [{_MOST_LISTED}])))
del _photon_list
"""


def _tool(name: str, about: str, arguments: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": arguments, "required": required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


#: The tools, as OpenAI's API has them.
TOOLS = (
    _tool("list_workdir", "List the files of the work folder, with their sizes in bytes.", {}, []),
    _tool(
        "edit_cell",
        "Append a cell of Python code to the notebook, or replace the code of an earlier one, and run the "
        "notebook. The notebook with its outputs is what you get.",
        {
            "contents": {"type": "string", "description": "The code of the cell."},
            "idx": {"type": ["integer", "null"], "description": "The cell to replace; null appends one."},
        },
        ["contents"],
    ),
    _tool(
        "submit_answer",
        "Give the answer to the question. This ends the work.",
        {"answer": {"type": "string", "description": "The answer, as short as the question allows."}},
        ["answer"],
    ),
)
TOOL_NAMES = tuple(tool["function"]["name"] for tool in TOOLS)


@dataclass(frozen=True)
class Observation:
    """What an agent sees after an action.

    Attributes
    ----------
    text, images
        What it is told, and PNG images in base64 that go with it.
    fault
        What was wrong with the action, by a short name, or None.
    done
        Whether an answer was given.
    """

    text: str
    images: tuple[str, ...] = ()
    fault: str | None = None
    done: bool = False


class NotebookEnvironment:
    """A notebook over a capsule's data, and the tools to work in it.

    Parameters
    ----------
    data
        Name in the work folder to the file or folder that is seen there, read-only.
    rerun
        ``notebook``: each edit runs all cells in a kernel that is new, so what the notebook holds is what its
        code gives. ``cell``: only the cell that was edited runs, in the kernel as it is.
    images
        Whether the agent is shown images.
    """

    def __init__(
        self,
        data: Mapping[str, Path],
        limits: Limits,
        how: Shut,
        *,
        rerun: Literal["notebook", "cell"] = "notebook",
        images: bool = False,
    ) -> None:
        self.notebook = Notebook()
        self.answer: str | None = None
        self._rerun, self._images = rerun, images
        self._kernel = Kernel(data, limits, how)

    def close(self) -> None:
        """End the kernel."""
        self._kernel.close()

    def __enter__(self) -> "NotebookEnvironment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, name: str, arguments: Any) -> Observation:
        """Do what a tool does.

        Parameters
        ----------
        name, arguments
            As a model gave them; what cannot be done is no error here, but something the model is told.

        Raises
        ------
        RunError
            If no kernel can be started.
        """
        if name not in TOOL_NAMES:
            names = ", ".join(TOOL_NAMES)
            return Observation(
                f"There is no tool {printable(name)[:100]}; use one of {names}.", fault="unknown tool"
            )
        if not isinstance(arguments, dict):
            return Observation("The arguments of a tool are a JSON object.", fault="wrong arguments")
        known = next(tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name)
        wrong = [key for key in arguments if key not in known["properties"]]
        missing = [key for key in known["required"] if not isinstance(arguments.get(key), str)]
        if wrong or missing:
            what = (
                f"{name} has no argument {printable(wrong[0])[:100]}"
                if wrong
                else f"{name} needs a text {missing[0]}"
            )
            return Observation(f"{what}.", fault="wrong arguments")
        # Half of a character, which a model may write, is none in a file.
        arguments = {
            key: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
            for key, value in arguments.items()
        }
        if name == "list_workdir":
            return self._list()
        if name == "edit_cell":
            return self._edit(arguments["contents"], arguments.get("idx"))
        self.answer = cut(arguments["answer"], MOST_ANSWER)
        return Observation("The answer was taken.", done=True)

    def _list(self) -> Observation:
        ran = self._kernel.run(_LIST)
        text = "".join(str(output.get("text", "")) for output in ran.outputs)
        if ran.error is not None or ran.stopped is not None:
            return Observation(f"The files cannot be listed: {ran.stopped or ran.error}", fault="no list")
        return Observation(cut(text.strip()))

    def _edit(self, contents: str, index: Any) -> Observation:
        cells = len(self.notebook)
        if isinstance(index, bool) or not (index is None or isinstance(index, int)):
            return Observation("idx is the number of a cell, or null.", fault="wrong arguments")
        if index is not None and not 0 <= index < cells:
            return Observation(
                f"There is no cell {index}; the notebook has {cells}.", fault="wrong arguments"
            )
        if index is None and cells >= MOST_CELLS:
            return Observation(f"The notebook has {cells} cells, and may have no more.", fault="too much")
        if len(contents) > MOST_CODE:
            return Observation(f"A cell has {MOST_CODE} characters at most.", fault="too much")
        place = self.notebook.put(contents, index)
        self._run(place)
        told = self.notebook.shown(images=self._images)
        return Observation(told.text, told.images)

    def _run(self, edited: int) -> None:
        if self._rerun == "cell":
            self.notebook.keep(edited, self._kernel.run(self.notebook.sources[edited]))
            return
        self._kernel.start()
        lost = False
        for place, source in enumerate(self.notebook.sources):
            if lost:
                self.notebook.clear(place, "not run, for the kernel is gone")
                continue
            ran = self._kernel.run(source)
            self.notebook.keep(place, ran)
            lost = ran.lost


def as_arguments(text: str) -> Any:
    """Return the arguments that a model wrote as JSON, or None where it is none."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
