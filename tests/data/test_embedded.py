import ast
import hashlib
import importlib.metadata
import io
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import textwrap
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from photon.data import embedded, installed, source_text
from photon.data.documents import Document
from photon.data.prepared import PreparedData

ROOT = str(Path(__file__).parents[2])
SMALL = {"prose": 1_800_000, "python": 700_000, "cpp": 500_000}


@pytest.fixture(scope="module")
def silos():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "BUDGET_BYTES", SMALL)
        return embedded.embedded_documents()


class _Stripped(ast.NodeTransformer):
    """What the removal of docstrings means, said over the tree and not over the text."""

    def _strip(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if not node.body and not isinstance(node, ast.Module):
            node.body.append(ast.Pass())
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _strip


def comments(code):
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


AWKWARD = [
    'class A:\n    """Only this."""\n\nx = 1\n',
    'def f(): "one line"\n',
    'def f(): "one line"; return 1\n',
    'async def f():\n    """Doc."""  # a comment stays\n    return 1\n',
    'def f():\n    """Doc."""\n\n    def g():\n        "inner"\n    return g\n',
    '"""Module."""\n\nx = 1  # kept\n',
    'class Ä:\n    """Ünicode …"""; y = "ß"\n',
    'if True:\n    def f():\n        """Two.\n\n        Lines.\n        """\n        return """text"""\n',
    'try:\n    pass\nexcept ValueError:\n    class E:\n        "in a handler"\n',
    'match 1:\n    case 1:\n        def f():\n            "in a case"\n',
    'def f():\n    (\n        "in brackets"\n        " of two parts"\n    )\n    return 2\n',
    'def f():\n    "first" \\\n    " continued"\n    return 2\n',
    'x = 1\n"""a bare string later is no docstring"""\n',
    'class A:\n    """Doc."""\n\n    # a comment before the field\n    x: int = 1\n',
]


@pytest.mark.parametrize("code", AWKWARD)
def test_code_without_docstrings_means_the_same(code):
    stripped = source_text.code_without_docstrings(code)
    assert ast.dump(ast.parse(stripped)) == ast.dump(_Stripped().visit(ast.parse(code)))
    assert comments(stripped) == comments(code)


@pytest.mark.parametrize("name", ["json/decoder.py", "argparse.py", "asyncio/queues.py", "dataclasses.py"])
def test_real_modules_mean_the_same_without_docstrings(name):
    code = Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8")
    stripped = source_text.code_without_docstrings(code)
    assert ast.dump(ast.parse(stripped)) == ast.dump(_Stripped().visit(ast.parse(code)))
    assert set(comments(stripped)) <= set(comments(code))


def test_python_banner_goes_and_other_comments_stay():
    code = textwrap.dedent(
        """\
        #!/some/machine/bin/python
        # Copyright 2020 Somebody.
        #
        # Licensed under the Apache License, Version 2.0

        # This module counts things.
        import os

        # Copyright in the middle stays.
        """
    )
    assert source_text.without_python_banner(code) == (
        "# This module counts things.\n\nimport os\n\n# Copyright in the middle stays.\n"
    )
    assert source_text.without_python_banner("#!/bin/python\nx = 1\n") == "x = 1\n"
    assert source_text.without_python_banner("# About.\nx = 1\n") == "# About.\n\nx = 1\n"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("/* Copyright (c) X */\n#pragma once\nint f();\n", "#pragma once\nint f();\n"),
        ("#pragma once\n\n// Copyright X\n// Licensed so\n\nint f();\n", "#pragma once\n\nint f();\n"),
        ("// About f.\nint f();\n", "// About f.\nint f();\n"),
        ("// About f.\n\n/* license: MIT */\nint f();\n", "int f();\n"),
        ("int f(); // Copyright\n", "int f(); // Copyright\n"),
        (
            "#if !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)\n"
            "#pragma once\nint f();\n\n#else\n"
            '#error "either TORCH_STABLE_ONLY or"\n#endif  // !defined(TORCH_STABLE_ONLY)\n',
            "#pragma once\n\nint f();\n",
        ),
    ],
)
def test_cpp_banner(header, expected):
    assert source_text.without_cpp_banner(header) == expected


def test_documentation_gathers_docstrings_without_interpreter_sessions():
    long = "An explanation given to a function. " * 8
    tree = ast.parse(
        textwrap.dedent(
            f'''\
            """Module text."""
            add_docstr(thing, """{long}""")
            print("short")
            class A:
                """Class text.

                Examples
                --------
                >>> A()
                <A at 12345>

                Notes
                -----
                Something to note.
                """
                def f(self):
                    """Function text."""
                    x = "no docstring"
            '''
        )
    )
    text = source_text.documentation(tree)
    assert text == (
        f"Module text.\n\n\n{long.strip()}\n\n\n"
        "Class text.\n\nNotes\n-----\nSomething to note.\n\n\nFunction text.\n"
    )


TEXT = "the quick brown fox jumps over lazy dogs while many silent readers ponder curious questions"
WORDS = TEXT.split()


def prose(words, seed=0):
    chooser = random.Random(seed)
    return textwrap.fill(" ".join(chooser.choice(WORDS) + chooser.choice("aeiou") for _ in range(words)))


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (prose(200), True),
        (prose(20), False),
        ("\n".join(["the same line again and again"] * 100), False),
        ("\n".join(f"{n}, {n * n}, {n**3}" for n in range(200, 400)), False),
        (prose(200) + "\n" + "x" * 2000, False),
        ("\n".join(chr(0x4E00 + n) * 3 + " ab" for n in range(300)), False),
        (prose(60_000), False),
    ],
    ids=["prose", "short", "repetition", "numbers", "minified", "characters", "huge"],
)
def test_rubbish_is_left_out(text, worth):
    assert embedded._is_worth_reading(text) is worth


def test_files_that_cannot_be_read_are_skipped(tmp_path, monkeypatch):
    root = tmp_path / "click"
    (root / "tests").mkdir(parents=True)
    good = f'"""{prose(200)}"""\n\n' + "\n".join(f"def {w}_{n}(): return {w!r}" for n, w in enumerate(WORDS))
    (root / "good.py").write_text(good)
    (root / "tests" / "test_it.py").write_text(good)
    (root / "broken.py").write_text(good + "\ndef (:\n")
    (root / "latin.py").write_bytes(b"# \xe9\n" + good.encode())
    (root / "nul.py").write_bytes(good.encode() + b"\0")
    (root / "made.py").write_text("# Generated by a tool. DO NOT EDIT!\n" + good)
    monkeypatch.setattr(installed, "_package_folder", lambda package: root if package == "click" else None)
    documents = embedded.embedded_documents()
    assert [document.source for document in documents["python"]] == ["click/good.py"]
    assert documents["cpp"] == []
    assert "return 'fox'" in documents["python"][0].text
    assert prose(200)[:50] not in documents["python"][0].text


def test_silos_hold_what_their_names_say(silos):
    assert list(silos) == ["cpp", "legal", "prose", "python"]
    for name, documents in silos.items():
        sources = [document.source for document in documents]
        assert sources == sorted(set(sources)), name
        size = sum(len(document.text.encode()) for document in documents)
        if name == "legal":
            assert 100_000 < size < 2_000_000
        else:
            assert SMALL[name] <= size < SMALL[name] + embedded.MAXIMUM_CHARACTERS * 1.2
    # topics alone fill a third of the small prose silo, so packages are compared in the code silo
    share = Counter(document.source.split("/")[0] for document in silos["python"])
    assert len(share) > 10
    for document in random.Random(0).sample(silos["python"], 40):
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, source_text._SCOPES):
                assert ast.get_docstring(node) is None, document.source
    assert all(document.source.startswith("torch/include/") for document in silos["cpp"])
    headers = [re.search(r"#include|#pragma once|#ifndef", document.text) for document in silos["cpp"]]
    assert sum(map(bool, headers)) > 0.95 * len(headers)
    assert not any("TORCH_TARGET_VERSION" in document.text[:200] for document in silos["cpp"])
    licence = " ".join(document.text for document in silos["legal"])
    assert all(word in licence for word in ("Redistribution", "WARRANTIES", "sublicense", "Apache License"))


def test_no_place_of_this_machine_appears(silos):
    places = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("stdlib") if sys.base_prefix != "/usr" else "",
        str(Path(embedded.__file__).parents[2]),
        sys.executable,
        str(Path(sys.executable).resolve()),
    } - {"", "/usr/bin/python3"}
    for documents in silos.values():
        for document in documents:
            assert not document.source.startswith("/")
            assert ".dist-info" not in document.source
            for place in places:
                assert place not in document.text, (document.source, place)


def test_only_packages_that_photon_always_has(silos):
    packages = {*installed.PROSE_PACKAGES, *installed.CODE_PACKAGES, *installed.DISTRIBUTIONS}
    for documents in silos.values():
        assert {document.source.split("/")[0] for document in documents} <= packages
    assert not packages & {"pytest", "ruff", "mypy", "hypothesis", "wandb", "_pytest"}


def test_no_licence_paragraph_appears_twice(silos):
    seen = Counter(
        re.sub(r"[^a-z]+", " ", paragraph.lower()).strip()
        for document in silos["legal"]
        for paragraph in re.split(r"\n\s*\n", document.text)
    )
    assert max(seen.values()) == 1


def digest(silos):
    state = hashlib.sha256()
    for name, documents in silos.items():
        for document in documents:
            state.update(f"{name}\0{document.source}\0{document.text}\0".encode())
    return state.hexdigest()


def test_another_process_reads_the_same_and_imports_no_package(silos):
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from photon.data import embedded\n"
        "embedded.BUDGET_BYTES = json.loads(sys.argv[2])\n"
        "silos, fingerprint = embedded.embedded_documents(), embedded.installation_fingerprint()\n"
        "heavy = [n for n in ('torch', 'transformers', 'datasets', 'pandas', 'sympy') if n in sys.modules]\n"
        "from tests.data.test_embedded import digest\n"
        "print(digest(silos), fingerprint, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT, json.dumps(SMALL)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert done.stdout.split() == [digest(silos), embedded.installation_fingerprint(), "[]"]


def test_fingerprint_changes_with_the_packages_read_and_with_nothing_else(monkeypatch):
    first = embedded.installation_fingerprint()
    assert re.fullmatch(r"[0-9a-f]{12}", first)
    real = importlib.metadata.version

    def with_other(package):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "99" if name == package else real(name)
        )
        embedded.installation_fingerprint.cache_clear()
        return embedded.installation_fingerprint()

    assert with_other("pytest") == first
    assert with_other("numpy") != first
    monkeypatch.setattr(embedded, "FORMAT", "photon-embedded/next")
    assert with_other("pytest") != first
    monkeypatch.undo()
    embedded.installation_fingerprint.cache_clear()


def test_path_tells_installation_and_sizes_apart(tmp_path):
    path = embedded.embedded_path(tmp_path, 256, 512)
    assert path.parent == tmp_path / "data"
    assert path.name == f"embedded-{embedded.installation_fingerprint()}-s256-v512"


def few_documents():
    return {
        name: [Document(f"{name}/{n}", prose(300, seed=100 * index + n)) for n in range(20)]
        for index, name in enumerate(["cpp", "prose"])
    }


def test_two_processes_prepare_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from photon.data import embedded\n"
        "from tests.data.test_embedded import few_documents\n"
        "def slow():\n"
        "    print('extracted', flush=True); time.sleep(1); return few_documents()\n"
        "embedded.embedded_documents = slow\n"
        "home = Path(sys.argv[2])\n"
        "print(embedded.ensure_embedded(home, sequence_length=16, vocab_size=300, progress=False))\n"
    )
    command = [sys.executable, "-c", code, ROOT, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    path = embedded.embedded_path(tmp_path, 16, 300)
    assert "".join(outputs).count("extracted") == 1
    assert all(str(path) in output for output in outputs)
    prepared = PreparedData.open(path)
    assert prepared.silo_names == ["cpp", "prose"]
    assert prepared.windows("prose", "train").shape[1] == 17
    assert prepared.manifest.seed == 0


def test_prepared_corpus_is_reused(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "embedded_documents", few_documents)
    path = embedded.ensure_embedded(tmp_path, sequence_length=16, vocab_size=300, progress=False)
    monkeypatch.setattr(embedded, "embedded_documents", lambda: pytest.fail("read again"))
    assert embedded.ensure_embedded(tmp_path, sequence_length=16, vocab_size=300, progress=False) == path


@pytest.mark.slow
def test_three_silos_hold_two_million_tokens(tmp_path):
    path = embedded.prepare_embedded(tmp_path / "corpus", sequence_length=256, progress=False)
    silos = PreparedData.open(path).manifest.silos
    for name in ("cpp", "prose", "python"):
        assert silos[name].train.tokens + silos[name].validation.tokens >= 2_200_000
    assert 30_000 < silos["legal"].train.tokens < 500_000
