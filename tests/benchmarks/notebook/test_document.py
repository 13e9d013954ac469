"""Notebooks are valid whatever a kernel sends, and what a model reads of them is bounded."""

import base64
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

from photon.benchmarks.notebook.document import Notebook, cut, shown  # noqa: E402
from photon.benchmarks.notebook.kernel import Ran  # noqa: E402

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and more").decode()


def result(data: dict[str, Any]) -> dict[str, Any]:
    return {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": data}


def notebook(*outputs: dict[str, Any], **more: Any) -> Notebook:
    made = Notebook()
    made.keep(made.put("x", None), Ran(list(outputs), **more))
    return made


def test_a_notebook_opens_in_jupyter() -> None:
    stream = {"output_type": "stream", "name": "stdout", "text": "hello\n"}
    error = {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mE\x1b[0m: v"]}
    made = notebook(stream, error, result({"text/plain": "2", "image/png": PNG}))
    read = nbformat.reads(made.text(), as_version=4)
    nbformat.validate(read)
    assert read.cells[0].source == "x"
    assert [output.output_type for output in read.cells[0].outputs] == ["stream", "error", "execute_result"]
    assert made.statistics() == {"cells": 1, "errors": 1, "images": 1}


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stdout", "text": 3},
        {"output_type": "stream"},
        {"output_type": "no such type"},
        {"output_type": "error", "ename": None, "evalue": "", "traceback": "x"},
        {"output_type": "display_data", "data": [], "metadata": {}},
    ],
)
def test_an_output_that_is_none_is_left_out_and_named(output: dict[str, Any]) -> None:
    made = notebook(output)
    nbformat.validate(nbformat.reads(made.text(), as_version=4))
    assert "an output that is no output was left out" in made.shown(images=False).text


def test_output_is_cut_in_the_middle() -> None:
    text = "a" * 5_000 + "b" * 5_000
    told = notebook({"output_type": "stream", "name": "stdout", "text": text}).shown(images=False).text
    assert "a" * 1_500 + "\n<7000 characters left out>\n" + "b" * 1_500 in told
    assert "a" * 1_501 not in told
    assert cut("x" * 3_000) == "x" * 3_000


def test_html_is_not_shown_and_escapes_are_taken_away() -> None:
    made = notebook(
        result({"text/html": "<b>table</b>", "text/plain": "table", "text/latex": "$x$"}),
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[1;31mE\x1b[0m: v"]},
    )
    assert (
        made.shown(images=True).text == "### Cell 0\n```python\nx\n```\n### Output 0\n```\ntable\nE: v\n```"
    )


def test_images_are_numbered_and_may_be_left_out() -> None:
    made = notebook(result({"image/png": PNG}), result({"image/png": "no image", "text/plain": "plain"}))
    assert made.shown(images=True).images == (PNG,)
    assert "<image 1>\nplain" in made.shown(images=True).text
    assert made.shown(images=False).images == ()
    assert "<an image, not shown>" in made.shown(images=False).text


def test_what_was_stopped_says_so() -> None:
    told = notebook(stopped="it took more than 2 s").shown(images=False).text
    assert "[the cell was stopped: it took more than 2 s]" in told
    told = notebook(stopped="the kernel ended", lost=True).shown(images=False).text
    assert "its kernel is gone, and with it every variable" in told


def test_a_kept_notebook_is_shown_as_a_fresh_one() -> None:
    made = notebook(result({"text/plain": "2"}))
    assert shown(made.as_dict()["cells"], images=False) == made.shown(images=False)
