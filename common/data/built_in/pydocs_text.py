"""Makes the documents of the data set `pydocs`: language reference, docstrings and source of the running Python.

Modules are parsed, never imported: importing some has side effects, or needs packages that are not installed.
"""

import ast
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

SKIPPED_PACKAGES = frozenset("antigravity encodings idlelib lib2to3 pydoc_data test this turtledemo".split())
"""Packages of tables, tests or demonstrations. The topics in `pydoc_data` become documents of kind "reference"."""
TESTS = frozenset(("test", "tests", "idle_test"))
"""Folders of tests, which are skipped."""
DATA_SHARE = 0.5
"""A file with a larger share of its lines inside tables of constants is data, not text, and is skipped."""
LITERALS = (ast.Dict, ast.List, ast.Set, ast.Tuple)
CONSTANT = (*LITERALS, ast.Constant, ast.Load, ast.UnaryOp, ast.USub)
NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Document(NamedTuple):
    """One record; its split follows from `family`."""

    text: str
    module: str
    """Dotted name of the module, or the topic."""
    kind: str
    """"reference", "docstrings" or "library"."""
    family: str
    """Documents of one family share a split: a module's top-level package, or a topic."""


class Documents(NamedTuple):
    """All documents in a fixed order, and how many files could not be read."""

    found: list[Document]
    unreadable: int


def documents(limit: int | None = None, tick: Callable[[], object] = lambda: None) -> Documents:
    """Returns the documents of the running Python.

    Args:
      limit: the most topics, and the most files; None: no limit.
      tick: progress callback, called once per file.
    """
    found = [Document(topics[name], name, "reference", f"topic {name}") for name in islice(sorted(topics), limit)]
    unreadable = 0
    for module, path in islice(modules(standard_library()), limit):
        tick()
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):  # a UnicodeDecodeError is a ValueError
            unreadable += 1
            continue
        found += module_documents(module, text, tree)
    return Documents(found, unreadable)


def standard_library() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (dotted name, file) of the modules to read, sorted by name."""
    named = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        wanted = parts[0] in sys.stdlib_module_names and parts[0] not in SKIPPED_PACKAGES and TESTS.isdisjoint(parts)
        if wanted:
            named[".".join(parts).removesuffix(".__init__")] = path
    yield from sorted(named.items())


def module_documents(module: str, text: str, tree: ast.Module) -> Iterator[Document]:
    """Yields a document of a module's docstrings, if it has any, and one of its source, unless it is mostly data."""
    family = module.partition(".")[0]
    sections = [f"{heading}\n\n{doc}" for heading, doc in docstrings(tree, module)]
    if sections:
        yield Document("\n\n\n".join(sections) + "\n", module, "docstrings", family)
    if text.strip() and data_share(text, tree) <= DATA_SHARE:
        yield Document(text, module, "library", family)


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, docstring) of a module and its definitions, in the order of the file.

    >>> tree = ast.parse("class A:\\n  'Things.'\\n  def f(self, x=1):\\n    'Does it.'")
    >>> list(docstrings(tree, "m"))
    [('class m.A', 'Things.'), ('m.A.f(self, x=1)', 'Does it.')]
    """

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, NAMED):
                inner = f"{name}.{child.name}"
                if doc := ast.get_docstring(child):
                    yield _heading(child, inner), doc
                yield from visit(child, inner)
            elif isinstance(child, ast.If | ast.Try | ast.With):
                yield from visit(child, name)  # definitions that depend on the platform

    if doc := ast.get_docstring(tree):
        yield f"module {module}", doc
    yield from visit(tree, module)


def _heading(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    return f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"


def data_share(text: str, tree: ast.Module) -> float:
    """Returns the share of lines that are inside literal tables (dicts, lists, ...) of constants.

    >>> text = "x = [\\n  1,\\n  2,\\n]\\nprint(x)\\n"
    >>> data_share(text, ast.parse(text))
    0.8
    """
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, LITERALS) and all(isinstance(inside, CONSTANT) for inside in ast.walk(node)):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines) / max(len(text.splitlines()), 1)
