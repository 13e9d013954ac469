"""Text in the packages that are installed beside Photon: which are read, and where it lies in them.

The packages are found without importing them, and only dependencies that Photon always has are read, so
development tools in the same environment do not change what is found.
"""

import importlib.metadata
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

STDLIB = "stdlib"
PROSE_PACKAGES = (
    STDLIB,
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "mpmath",
    "networkx",
    "numpy",
    "pandas",
    "pyarrow",
    "sympy",
    "torch",
    "transformers",
)
CODE_PACKAGES = (
    STDLIB,
    "PIL",
    "aiohttp",
    "click",
    "datasets",
    "flwr",
    "fsspec",
    "httpx",
    "huggingface_hub",
    "hydra",
    "jinja2",
    "joblib",
    "matplotlib",
    "networkx",
    "numpy",
    "omegaconf",
    "pandas",
    "psutil",
    "pydantic",
    "requests",
    "rich",
    "torch",
    "transformers",
)
DISTRIBUTIONS = (
    "aiohttp",
    "alembic",
    "anyio",
    "attrs",
    "certifi",
    "cffi",
    "charset-normalizer",
    "click",
    "contourpy",
    "cryptography",
    "cycler",
    "datasets",
    "dill",
    "fastapi",
    "filelock",
    "flwr",
    "fonttools",
    "frozenlist",
    "fsspec",
    "grpcio",
    "h11",
    "hf-xet",
    "httpx",
    "huggingface-hub",
    "hydra-core",
    "idna",
    "jinja2",
    "joblib",
    "jsonschema",
    "kiwisolver",
    "markdown-it-py",
    "markupsafe",
    "matplotlib",
    "mpmath",
    "msgpack",
    "multidict",
    "multiprocess",
    "networkx",
    "numpy",
    "omegaconf",
    "packaging",
    "pandas",
    "pathspec",
    "pillow",
    "prompt-toolkit",
    "propcache",
    "protobuf",
    "psutil",
    "pyarrow",
    "pycryptodome",
    "pydantic",
    "pydantic-core",
    "pygments",
    "pyparsing",
    "python-dateutil",
    "pyyaml",
    "ray",
    "regex",
    "requests",
    "rich",
    "safetensors",
    "six",
    "sqlalchemy",
    "starlette",
    "sympy",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "typer",
    "typing-extensions",
    "urllib3",
    "uvicorn",
    "websockets",
    "xxhash",
    "yarl",
)

# Tests, vendored copies, character tables, generated code, and what some distributors of Python leave out.
SKIPPED_FOLDERS = frozenset(
    {
        "_generated",
        "_vendor",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "generated",
        "idlelib",
        "include",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "testing",
        "tests",
        "tkinter",
        "turtledemo",
        "vendor",
    }
)
# transformers/models repeats one model file hundreds of times with other names.
SKIPPED_PREFIXES = ("transformers/models/", "flwr/proto/")
# What torch's build writes, and the copies made for another vendor's compiler.
SKIPPED_HEADER_FOLDERS = frozenset({"generated", "hip", "miopen"})
SKIPPED_HEADER_PREFIXES = ("ATen/ops/", "caffe2/core/macros.h", "ittnotify", "sleef.h")

_LICENCE_NAME = re.compile(r"(^|[-_.])(licen[sc]es?|copying|notice)([-_.]|$)", re.IGNORECASE)
# Of package descriptions: comments and tags, badges and other pictures.
_MARKUP = re.compile(
    r"<!--(?:.|\n)*?-->|</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>|^[ \t]*(?:\.\. image::|:target:|:alt:|\[?!\[).*\n",
    re.MULTILINE | re.IGNORECASE,
)


def modules() -> Iterator[tuple[str, str, Path]]:
    """Find the modules of all packages: the package, a name that is the same everywhere, and the file."""
    for package in sorted({*PROSE_PACKAGES, *CODE_PACKAGES}):
        root = _package_folder(package)
        if root is None:
            continue
        for path in _files(root, (".py",), SKIPPED_FOLDERS):
            source = f"{package}/{path}"
            if not source.startswith(SKIPPED_PREFIXES):
                yield package, source, root / path


def headers() -> Iterator[tuple[str, str, Path]]:
    """Find torch's headers, told as `modules` tells of modules."""
    root = _package_folder("torch")
    if root is None or not (root / "include").is_dir():
        return
    include = root / "include"
    for header in _files(include, (".h", ".hpp", ".cuh", ".inl"), SKIPPED_HEADER_FOLDERS):
        if not str(header).startswith(SKIPPED_HEADER_PREFIXES):
            yield "torch", f"torch/include/{header}", include / header


def topics() -> list[tuple[str, str]]:
    """Read what Python's ``help`` says of the language, where the distributor left it in."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return []
    return [
        (f"{STDLIB}/pydoc_data/topics/{name}", text.strip() + "\n") for name, text in sorted(texts.items())
    ]


def descriptions() -> list[tuple[str, str]]:
    """Read what each distribution says about itself: the body of its METADATA."""
    found = []
    for name in DISTRIBUTIONS:
        metadata = _distribution_text(name, "METADATA")
        _, _, body = metadata.partition("\n\n")
        found.append((f"{name}/METADATA", _MARKUP.sub("", body).strip() + "\n"))
    return found


def licence_files() -> Iterator[tuple[str, Path]]:
    """Find the licence texts of all distributions: a name that is the same everywhere, and the file."""
    for name in DISTRIBUTIONS:
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if not _LICENCE_NAME.search(file.name) or file.suffix in {".py", ".pyc", ".h", ".js", ".json"}:
                continue
            path = Path(str(file.locate()))
            if path.is_file():
                yield _licence_source(name, file), path


def read_text(path: Path) -> str | None:
    """Return a file's text with plain line ends, or None if it is not text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n")


def _package_folder(package: str) -> Path | None:
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _files(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Iterator[PurePosixPath]:
    """Walk the files below ``root``, as paths relative to it."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith("config-")]
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in files:
            if name.endswith(suffixes) and not name.startswith(("_sysconfigdata", "__config__")):
                yield below / name


def _distribution_text(name: str, file: str) -> str:
    try:
        return importlib.metadata.distribution(name).read_text(file) or ""
    except (importlib.metadata.PackageNotFoundError, UnicodeDecodeError):
        return ""


def _licence_source(name: str, file: PurePosixPath) -> str:
    # "numpy-2.4.6.dist-info/licenses/LICENSE.txt" becomes "numpy/licenses/LICENSE.txt"
    first, *rest = file.parts
    return "/".join([name, *rest] if first.endswith(".dist-info") else [name, first, *rest])
