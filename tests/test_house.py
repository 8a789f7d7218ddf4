"""The house keeps its own rules: sizes of files and functions, one name for one thing, a README that shows its tree."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PACKAGES = ("common", "gpt", "t5like", "experiments", "twinstack", "benchmarks")
FILE_LINES, BODY_LINES = 350, 50

SAME_NAME = {
    "Layer": "a layer of either family, and of PyTorch's model beside it",
    "Decoder": "the decoder of a model, and of PyTorch's model beside it",
}
"""Names of classes that two files may define, each with the reason."""


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (TOP / folder).rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def test_files_can_be_read_in_one_sitting() -> None:
    long = {str(path.relative_to(TOP)): n for path in files(*PACKAGES, "tests") if (n := lines(path)) > FILE_LINES}
    assert not long


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_functions_are_short() -> None:
    """Pallas kernels are one function each by nature."""
    paths = [path for path in files(*PACKAGES) if "kernels" not in path.parts]
    long = [
        f"{path.relative_to(TOP)}: {function.name}, {count} lines"
        for path in paths
        for function in functions(ast.parse(path.read_text()))
        if (count := body_lines(function)) > BODY_LINES
    ]
    assert not long


def test_one_class_name_means_one_thing() -> None:
    found = defaultdict(list)
    for path in files(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(TOP)))
    assert not {name: where for name, where in found.items() if len(where) > 1 and name not in SAME_NAME}


def test_experiments_holds_studies_at_first_sight() -> None:
    """A file there is a study with its card on top, or one of the few modules from which studies are made."""
    made_from = {"__init__", "families", "find", "members", "run", "search", "study"}
    for path in (TOP / "experiments").glob("*.py"):
        if path.stem not in made_from:
            text = path.read_text()
            assert f"def {path.stem}()" in text, path
            assert "Command" in (ast.get_docstring(ast.parse(text)) or ""), f"{path} has no card"


def tree_in_readme() -> dict[str, str]:
    """Returns the paths that the README's picture of the house shows, with what it says of each."""
    house = (TOP / "README.md").read_text().split("## The house\n")[1]
    picture = [line for line in house.split("\n\n")[0].splitlines() if line.strip()]
    shown, above = {}, dict[int, str]()
    for line in picture:
        if not (entry := re.match(r"( {4,})(\S+(?:/|\.py)) +(\S.*)", line)):
            continue
        indent, name, about = len(entry[1]), entry[2], entry[3]
        above = {depth: path for depth, path in above.items() if depth < indent}
        path = above[max(above)] + name if above else name
        if name.endswith("/"):
            above[indent] = path
        shown[path] = about
    return shown


def test_the_readme_shows_every_room() -> None:
    """Each folder down to the rooms of `common`, its `data` and `experiments`, and nothing that is not there."""
    shown = tree_in_readme()
    assert all((TOP / path).exists() for path in shown), [path for path in shown if not (TOP / path).exists()]
    rooms = {f"{folder}/" for folder in (*PACKAGES, "tests", "docs")}
    for parent in ("common", "common/data", "experiments"):
        rooms |= {f"{parent}/{path.name}/" for path in (TOP / parent).iterdir() if (path / "__init__.py").exists()}
    assert rooms - set(shown) == set()


@pytest.mark.parametrize("phrase", ["left out", "passed over", "what is given", "comes so", "of its own kind"])
def test_docstrings_and_messages_use_the_fields_words(phrase: str) -> None:
    """Skipped, the callback: CONTRIBUTING, "Words"."""
    found = [
        f"{path.relative_to(TOP)}:{number}"
        for path in files(*PACKAGES)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if phrase in line
    ]
    assert not found
