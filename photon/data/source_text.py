"""What is text in source files: documentation without code, code without documentation and notices."""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_NOTICE = re.compile(r"copyright|licen[sc]e|SPDX-|all rights reserved", re.IGNORECASE)
_CPP_COMMENT = re.compile(r"/\*.*?\*/\s*|(?://[^\n]*\n)+\s*", re.DOTALL)
_CPP_GUARD = re.compile(r"\s*(#pragma once\s*)?")
_HEADING = re.compile(r"[^\n]{1,40}\n\s*[-=~]{3,}\s*|(Examples?|Notes?|Returns?)\s*:{1,2}\s*")
# Recent torch wraps every header in the same condition.
_TORCH_WRAPPER = re.compile(
    r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n"
    r"|\n#else\n#error [^\n]*TORCH_STABLE_ONLY[^\n]*\n#endif[^\n]*\s*\Z"
)
_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parse(text: str) -> ast.Module | None:
    """Return the syntax tree of a module, or None if this Python cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def documented_share(text: str) -> float:
    """Return about what share of a module's characters is in docstrings."""
    # Ten times faster than parsing, and near enough to leave out modules with little to say.
    return sum(map(len, text.split('"""')[1::2])) / max(len(text), 1)


def documentation(tree: ast.Module) -> str:
    """Join the docstrings of a module with the texts that it hands to ``add_docstr`` and its like."""
    texts: list[str] = []
    for node in _statements(tree):
        if (docstring := _docstring(node)) is not None:
            texts.append(docstring.text)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            texts += [
                part.value
                for part in ast.walk(node.value)
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and len(part.value) > 200
            ]
    cleaned = (_without_doctests(text) for text in texts)
    return "\n\n\n".join(dict.fromkeys(text for text in cleaned if text)) + "\n"


def code_without_docstrings(text: str, tree: ast.Module | None = None) -> str:
    """Remove the docstrings of a module's source; comments and layout stay.

    A body that holds nothing but its docstring becomes ``pass``, so the result parses and does the same.
    """
    lines = [line.encode() for line in text.split("\n")]  # ast counts columns in bytes
    docstrings = [found for node in _statements(tree or ast.parse(text)) if (found := _docstring(node))]
    for docstring in sorted(docstrings, key=lambda docstring: -docstring.place.lineno):
        place = docstring.place
        first, last = place.lineno - 1, (place.end_lineno or place.lineno) - 1
        before, after = lines[first][: place.col_offset], lines[last][place.end_col_offset :]
        merged = before + b"pass" + after if docstring.alone else before + after.lstrip(b"; ")
        blank_follows = last + 1 < len(lines) and not lines[last + 1].strip()
        if merged.strip():
            lines[first : last + 1] = [merged.rstrip()]
        else:
            lines[first : last + 1 + blank_follows] = []
    return without_python_banner(b"\n".join(lines).decode())


def without_python_banner(text: str) -> str:
    """Remove the first line for the shell, and comment blocks with notices before the first statement."""
    # An installer writes its own interpreter's place there.
    lines = text.split("\n")[text.startswith("#!") :]
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].startswith("#")):
        start += 1
    blocks = re.split(r"\n(?:[ \t]*\n|#[ \t]*\n)+", "\n".join(lines[:start]))
    # A notice often goes on after an empty comment line: what stands above its last block belongs to it.
    last = max((index for index, block in enumerate(blocks) if _NOTICE.search(block)), default=-1)
    kept = "\n\n".join(block for block in blocks[last + 1 :] if block.strip())
    body = "\n".join(lines[start:])
    return (f"{kept}\n\n{body}" if kept else body).strip("\n") + "\n"


def without_cpp_banner(text: str) -> str:
    """Remove the comments with copyright or licence notices that open a C++ file."""
    text = _TORCH_WRAPPER.sub("", text)
    guard = _CPP_GUARD.match(text)
    start = guard.end() if guard else 0
    end = start
    while comment := _CPP_COMMENT.match(text, end):
        end = comment.end()
        if _NOTICE.search(comment.group()):
            start = end
    opening = "#pragma once\n\n" if guard and guard.group(1) else ""
    return opening + text[start:].strip("\n") + "\n"


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk statements only: several times faster than ``ast.walk``, which visits every expression."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        for name in ("handlers", "cases", "finalbody", "orelse", "body"):
            children = getattr(node, name, None)
            if isinstance(children, list):
                stack.extend(reversed(children))


@dataclass(frozen=True)
class _Docstring:
    place: ast.Expr
    text: str
    alone: bool  # nothing else is in the body of a class or function


def _docstring(node: ast.AST) -> _Docstring | None:
    if not isinstance(node, _SCOPES) or not node.body:
        return None
    match node.body[0]:
        case ast.Expr(value=ast.Constant(value=str(text))) as place:
            return _Docstring(place, text, len(node.body) == 1 and not isinstance(node, ast.Module))
    return None


def _without_doctests(text: str) -> str:
    """Drop interpreter sessions, mostly printed arrays, and the headings that stood over nothing else."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        kept = []
        for line in paragraph.split("\n"):
            if line.lstrip().startswith(">>>"):
                break
            kept.append(line.rstrip())
        if any(kept):
            paragraphs.append("\n".join(kept))
    return "\n\n".join(
        paragraph
        for paragraph, following in zip(paragraphs, [*paragraphs, ""][1:], strict=True)
        if not (_HEADING.fullmatch(paragraph) and (not following or _HEADING.match(following)))
    )
