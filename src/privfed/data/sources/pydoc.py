"""``pydoc``: the docstrings of the running Python's standard library, labelled by topic.

A text classification task that needs no download: the text is a docstring, the label the chapter of the
library reference that its module belongs to, and each top-level module is a natural client. The texts hold
neither module names nor signatures of their own, which would give the label away.

Python files are read with :mod:`ast`, never imported. Built-in and extension modules have no source to read;
their docstrings are had by introspection of a fixed list of modules that import without side effects.
The rows depend on the Python version, and for extension modules on the platform; the digest tells them apart.
"""

from __future__ import annotations

import ast
import importlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from types import ModuleType

from privfed.data.config import DataConfig
from privfed.data.load import BUILT_IN_CLIENT, SOURCES
from privfed.data.rows import RawDataset, RawTable
from privfed.data.sources.pydoc_topics import LEFT_OUT, TOPIC_OF, public_name
from privfed.errors import ConfigError, DataError, nearest

MIN_WORDS = 3

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "__pycache__", "lib-dynload"})

# Extension modules beside those of sys.builtin_module_names. None opens a window, touches a device or prints
# (readline does, an escape sequence on some terminals, and is left out).
_EXTENSION_MODULES = (
    "_asyncio", "_bisect", "_blake2", "_bz2", "_contextvars", "_csv", "_ctypes", "_curses",
    "_curses_panel", "_datetime", "_decimal", "_elementtree", "_hashlib", "_heapq", "_json", "_lzma",
    "_multiprocessing", "_opcode", "_pickle", "_posixsubprocess", "_queue", "_random", "_socket",
    "_sqlite3", "_ssl", "_statistics", "_struct", "_uuid", "_zoneinfo", "array", "binascii", "cmath",
    "fcntl", "grp", "math", "mmap", "pyexpat", "resource", "select", "syslog", "termios", "unicodedata",
    "zlib",
)  # fmt: skip
_NO_TOPIC = frozenset({"xxsubtype", "_typing"})

_Documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@SOURCES.register("pydoc")
def read_pydoc(config: DataConfig) -> RawDataset:
    """Return the docstrings as columns ``text``, ``label`` (topic) and ``client_id`` (top-level module).

    Raises:
        ConfigError: If the table asks for other columns.
        DataError: If the standard library has no source files here.
    """
    _check_columns(config)
    texts: list[str] = []
    labels: list[str] = []
    clients: list[str] = []
    unknown: set[str] = set()
    for module, docstring in (*_from_files(), *_from_extensions()):
        text = " ".join(docstring.split())
        name = public_name(module)
        if len(text.split()) < MIN_WORDS:
            continue
        if name not in TOPIC_OF:
            unknown.add(module)
            continue
        texts.append(text)
        labels.append(TOPIC_OF[name])
        clients.append(name)
    if not texts:
        raise DataError(
            f"The standard library in {sysconfig.get_path('stdlib')!r} has no source files, "
            "expected *.py there: use a Python that comes with them, or another data set."
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return RawDataset(
        name="pydoc",
        train=RawTable(origin="pydoc", columns={"text": texts, "label": labels, BUILT_IN_CLIENT: clients}),
        source=f"Docstrings of the standard library of {sys.implementation.name} {version} (PSF licence).",
        notes=(f"modules without a topic left out: {', '.join(sorted(unknown))}",) if unknown else (),
    )


def _check_columns(config: DataConfig) -> None:
    columns = {"text": config.text, "label": config.label, "client": config.client or BUILT_IN_CLIENT}
    expected = {"text": "text", "label": "label", "client": BUILT_IN_CLIENT}
    for key, name in columns.items():
        if name != expected[key]:
            raise ConfigError(
                f"[data] has {key} = {name!r}, but the built-in data set 'pydoc' has the columns "
                f"{', '.join(expected.values())}.{nearest(name, expected.values())} Remove {key}."
            )


def _from_files() -> Iterator[tuple[str, str]]:
    """Yield (top-level module, docstring) of the Python files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - LEFT_OUT):
        single = root / f"{module}.py"
        files = [single] if single.is_file() else sorted((root / module).rglob("*.py"))
        for file in files:
            if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts):
                for docstring in _docstrings(file):
                    yield module, docstring


def _docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a file's module, classes and functions, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources are none of the caller's business
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and samples that are not meant to compile
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, *_Documented)):
            docstring = ast.get_docstring(node, clean=True)
            if docstring:
                yield docstring
        stack.extend(reversed(list(_statements(node))))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements (and handlers) inside ``node``; expressions hold no docstrings."""
    for name in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, name, None)
        if isinstance(children, list):
            yield from children


def _from_extensions() -> Iterator[tuple[str, str]]:
    """Yield (top-level module, docstring) of the built-in and extension modules, in a fixed order."""
    names = {*sys.builtin_module_names, *_EXTENSION_MODULES} & sys.stdlib_module_names
    for name in sorted(names - LEFT_OUT - _NO_TOPIC):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not built on this platform
        for docstring in _introspected(module):
            yield name, docstring


def _introspected(module: ModuleType) -> Iterator[str]:
    """Yield the docstrings of an extension module, its functions, and its types and their members."""
    if isinstance(module.__doc__, str):
        yield cleandoc(module.__doc__)
    for _, value in sorted(vars(module).items()):
        if isinstance(value, type) and not _is_foreign(value, module):
            yield from _own_docs(value)
            for name, member in sorted(vars(value).items()):
                # "Return self==value." and its like are the same in every type of every topic.
                if not name.startswith("__"):
                    yield from _own_docs(member)
        elif callable(value) and not isinstance(value, type) and not _is_foreign(value, module):
            yield from _own_docs(value)


def _is_foreign(value: object, module: ModuleType) -> bool:
    """Whether ``value`` was put into ``module`` from outside, e.g. by ``site`` or by a library's patch."""
    home = str(getattr(value, "__module__", None) or module.__name__).partition(".")[0]
    return public_name(home) != public_name(module.__name__) or hasattr(value, "__code__")


def _own_docs(value: object) -> Iterator[str]:
    docstring = getattr(value, "__doc__", None)
    # A plain constant answers with the docstring of its type; that is the type's, not its own.
    if isinstance(docstring, str) and (isinstance(value, type) or docstring != type(value).__doc__):
        yield cleandoc(docstring)
