"""The notebook: cells with what they gave, as a file that Jupyter opens and as text that a model reads."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from photon.benchmarks.notebook.kernel import Ran

#: Characters of a cell's output that a model reads: the first and the last half of so many.
MOST_SHOWN = 3_000
#: Images that a model is shown at one time, and bytes of one.
_MOST_IMAGES, _MOST_IMAGE = 8, 4 << 20
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


@dataclass(frozen=True)
class Shown:
    """A notebook as a model reads it.

    Attributes
    ----------
    text
        Markdown: each cell's code, and its output cut to `MOST_SHOWN` characters.
    images
        PNG images in base64, which the text has markers of.
    """

    text: str
    images: tuple[str, ...] = ()


class Notebook:
    """Code cells and their outputs; always valid in the format of Jupyter, whatever a kernel sent."""

    def __init__(self) -> None:
        self._book = new_notebook(
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                "language_info": {"name": "python"},
            }
        )

    def __len__(self) -> int:
        return len(self._book.cells)

    @property
    def sources(self) -> list[str]:
        """The code of each cell."""
        return [cell.source for cell in self._book.cells]

    def put(self, source: str, index: int | None) -> int:
        """Append a cell, or replace the code of cell ``index``; return its index."""
        if index is None:
            # Identifiers of cells have a pattern; these are the same in each run.
            self._book.cells.append(new_code_cell(source, id=f"cell-{len(self)}"))
            return len(self) - 1
        self._book.cells[index].source = source
        return index

    def keep(self, index: int, ran: Ran) -> None:
        """Keep what came of a cell; outputs that no notebook could hold are left out and named."""
        cell = self._book.cells[index]
        outputs = [output for output in ran.outputs if _is_valid(output)]
        notes = [] if len(outputs) == len(ran.outputs) else ["an output that is no output was left out"]
        if ran.stopped is not None:
            after = "; its kernel is gone, and with it every variable" if ran.lost else ""
            notes.append(f"the cell was stopped: {ran.stopped}{after}")
        outputs += [new_output("stream", name="stderr", text=f"[{note}]\n") for note in notes]
        cell.outputs = [nbformat.from_dict(output) for output in outputs]
        counts = [output.get("execution_count") for output in outputs]
        cell.execution_count = next((count for count in counts if isinstance(count, int)), index + 1)

    def clear(self, index: int, note: str) -> None:
        """Say of a cell that it has not run."""
        self._book.cells[index].outputs = [new_output("stream", name="stderr", text=f"[{note}]\n")]
        self._book.cells[index].execution_count = None

    def as_dict(self) -> dict[str, Any]:
        """Return the notebook as it is written to a file (nbformat 4.5)."""
        nbformat.validate(self._book)
        # As a file has it: plain dictionaries, texts as texts.
        return dict(nbformat.from_dict(self._book))

    def text(self) -> str:
        """Return the notebook as the text of a file."""
        return nbformat.writes(self._book)

    def statistics(self) -> dict[str, int]:
        """Return the numbers of cells, of cells that ended with an error, and of images."""
        outputs = [output for cell in self._book.cells for output in cell.outputs]
        return {
            "cells": len(self),
            "errors": sum(output.output_type == "error" for output in outputs),
            "images": sum("image/png" in output.get("data", {}) for output in outputs),
        }

    def shown(self, *, images: bool) -> Shown:
        """Return the notebook as a model reads it, with or without its images."""
        return shown(self._book.cells, images=images)


def shown(cells: Sequence[Any], *, images: bool) -> Shown:
    """Return cells as a model reads them: html, latex and markdown outputs are left out."""
    parts: list[str] = []
    found: list[str] = []
    for number, cell in enumerate(cells):
        parts.append(f"### Cell {number}\n```python\n{cell['source']}\n```")
        said = []
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture is not None and _is_image(picture):
                if images and len(found) < _MOST_IMAGES:
                    found.append(picture)
                    said.append(f"<image {len(found)}>\n")
                else:
                    said.append("<an image, not shown>\n")
            else:
                said.append(_plain(output))
        text = cut("".join(said).rstrip("\n"))
        if text:
            parts.append(f"### Output {number}\n```\n{text}\n```")
    return Shown("\n".join(parts) or "(the notebook is empty)", tuple(found))


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text of at most ``most`` characters and a marker of how many are left out in the middle."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n<{len(text) - 2 * half} characters left out>\n{text[-half:]}"


def _plain(output: Any) -> str:
    kind = output["output_type"]
    if kind == "stream":
        text = str(output["text"])
    elif kind == "error":
        text = "\n".join(str(line) for line in output.get("traceback", []))
        text = text or f"{output.get('ename', '')}: {output.get('evalue', '')}"
    else:
        text = str(output.get("data", {}).get("text/plain", ""))
    text = _ESCAPES.sub("", text)
    return text if not text or text.endswith("\n") else text + "\n"


def _is_image(picture: Any) -> bool:
    if not isinstance(picture, str) or len(picture) > _MOST_IMAGE:
        return False
    try:
        return base64.b64decode(picture, validate=False)[:8] == b"\x89PNG\r\n\x1a\n"
    except (binascii.Error, ValueError):
        return False


def _is_valid(output: dict[str, Any]) -> bool:
    if output.get("output_type") not in ("stream", "error", "execute_result", "display_data"):
        return False
    try:
        nbformat.validate(nbformat.from_dict(output), ref=output["output_type"], version=4, version_minor=5)
    except (nbformat.ValidationError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True
