import io
import math
import os

import numpy as np
import pytest
from rich.console import Console

from photon.data.inspect import divergences, inspect, jensen_shannon
from photon.data.prepare import prepare, prepare_documents
from photon.errors import PhotonError


def rendered(renderable) -> str:
    console = Console(file=io.StringIO(), width=150)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def folder(corpus, tmp_path):
    prepare_documents(corpus, tmp_path / "data", vocab_size=300, sequence_length=16, validation_fraction=0.2)
    return tmp_path / "data"


def kullback_leibler(p: list[float], q: list[float]) -> float:
    return sum(a * math.log2(a / b) for a, b in zip(p, q, strict=True) if a)


def test_divergence_in_bits_of_equal_disjoint_and_known_distributions():
    assert jensen_shannon(np.array([3, 1, 0]), np.array([6, 2, 0])) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(np.array([3, 1, 0]), np.array([0, 0, 7])) == pytest.approx(1)
    first, second = np.array([5, 3, 2, 0]), np.array([1, 1, 0, 9])
    p, q = [0.5, 0.3, 0.2, 0], [1 / 11, 1 / 11, 0, 9 / 11]
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = (kullback_leibler(p, middle) + kullback_leibler(q, middle)) / 2
    assert jensen_shannon(first, second) == pytest.approx(expected)
    matrix = divergences([first, second, first])
    assert matrix == pytest.approx(matrix.T)
    assert matrix[0, 2] == pytest.approx(0, abs=1e-12)
    assert matrix[0, 1] == matrix[1, 2] > 0.3


def test_the_figures_and_samples_are_shown(folder):
    text = rendered(inspect(folder, samples=2, verify=True))
    assert "2 (partition by-source, seed 0)" in text
    assert "17 tokens each, uint16" in text
    assert "agree with the manifest" in text
    assert text.count("low, train window") == text.count("high, train window") == 2
    # Texts of disjoint alphabets share little but white space.
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["high", "0.000"])
    assert float(row[2]) > 0.5
    assert "train window" not in rendered(inspect(folder, samples=0))


def test_duplicates_and_skipped_files_are_told_and_many_silos_summed_up(corpus, tmp_path):
    from photon.data.prepared import SourceSkipped

    doubled = {"x": [*corpus["low"], *corpus["low"][:7], *corpus["high"]]}
    prepare_documents(
        doubled,
        tmp_path / "data",
        partition="iid:14",
        vocab_size=300,
        sequence_length=8,
        skipped=[SourceSkipped(name="x", file="a[b].txt", reason="binary (it holds NUL bytes)")],
    )
    text = rendered(inspect(tmp_path / "data"))
    assert "7 exact duplicates were left out" in text
    assert "a[b].txt" in text
    assert "binary (it holds NUL bytes)" in text
    assert "median" in text


def test_verify_finds_a_changed_file(folder):
    file = folder / "silos/low/train.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    # As if the manifest had been copied after it: nothing but its content tells.
    (folder / "manifest.json").touch()
    inspect(folder)
    with pytest.raises(PhotonError, match="has changed"):
        inspect(folder, verify=True)


def test_names_with_markup_and_signs_that_cannot_be_printed_are_shown_as_they_are(make_text, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(make_text(number))
    for name in (b"[red]x[bold].txt", b"caf\xe9.txt", b"a\nb.txt"):
        (texts / os.fsdecode(name)).write_bytes(b"")
    output = tmp_path / os.fsdecode(b"[bold]out\xff")
    prepare({"a": [texts]}, output, vocab_size=300, sequence_length=16, validation_fraction=0.2)
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict"), width=300)
    console.print(inspect(output))
    console.file.seek(0)
    shown = console.file.read()
    for told in ("[red]x[bold].txt", "caf\\udce9.txt", "a\\nb.txt", "[bold]out\\udcff"):
        assert told in shown
