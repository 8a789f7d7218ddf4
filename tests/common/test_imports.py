"""The arrows of the house: `experiments -> t5like, gpt -> common`, and inside `common` one list of rooms.

Sources are read, not imported, so imports inside functions count too.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
FAMILIES = ("gpt", "t5like")

ROOMS = {
    "allocator": "settings of the C library; it needs no other room",
    "errors": "every room raises UserError",
    "json_text": "JSON is read in one place; it needs no other room",
    "terminal": "foreign text is made safe to print; it needs no other room",
    "trees": "nested dicts of any values",
    "ranges": "the types of numbers in configs; raises UserError",
    "paths": "checks paths that users give",
    "progress": "progress bars for whoever reads or writes long",
    "files": "reads and writes files at checked paths",
    "config_types": "reads the annotations of configs; raises UserError",
    "config": "dataclasses from and to JSON, for every config",
    "sizes": "completes the sizes of a layer for configs",
    "recipe": "configs that ledgers and modules share; needs ranges only",
    "compute": "counts FLOPs and bytes from configs; knows no module",
    "analysis": "statistics of plain numbers",
    "sharding": "meshes and logical axes, for all array work",
    "data": "makes batches; its layouts need the ledger's sums",
    "kernels": "attention over sharded arrays",
    "nn": "blocks built on kernels; reads the layout of prompts",
    "model": "the protocol of a family's module, in terms of batches and blocks",
    "weights": "model folders and foreign checkpoints; needs configs and files, no module",
    "infer": "decodes and scores with any model",
    "train": "trains any model, from data or from stored weights",
    "evals": "measures what infer returns",
    "report": "shows what train and evals have written",
}
"""The files and folders of `common`, lowest first. A room imports itself and those before it."""

Sources = Mapping[str, str]
"""Text of each module by its dotted name."""


def read_sources(*packages: str) -> dict[str, str]:
    files = [file for package in packages for file in (TOP / package).rglob("*.py")]
    return {".".join(file.relative_to(TOP).with_suffix("").parts): file.read_text() for file in files}


def imported(name: str, text: str) -> Iterator[str]:
    """Yields the dotted name of every module that `name` imports, by any statement and at any depth.

    `from common import model` yields `common.model`; `from common.model import Model` yields `common.model.Model`,
    which may be a module or something in one.
    """
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                above = package[: len(package) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in aliases)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def arrows(sources: Sources) -> Iterator[tuple[str, str]]:
    return ((name, target) for name, text in sources.items() for target in imported(name, text))


def foreign_imports(sources: Sources, allowed: Mapping[str, Iterable[str]]) -> list[str]:
    """Lists imports of a package of ours that the importing package may not use."""
    ours = {"common", "experiments", "twinstack", "tests", "benchmarks", *FAMILIES}
    return [
        f"{name} imports {target}"
        for name, target in arrows(sources)
        if (package := target.partition(".")[0]) in ours and package not in allowed[name.partition(".")[0]]
    ]


def room(module: str) -> str:
    """Returns the room of a module of `common`; "" for the package itself and for modules outside it."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0].replace("__init__", "") if package == "common" else ""


def upward_imports(sources: Sources, rooms: Iterable[str] = ROOMS) -> list[str]:
    """Lists imports from a lower room of `common` of a higher one, and rooms that are not in the list."""
    height = {name: place for place, name in enumerate(rooms)}
    unknown = sorted({room(name) for name in sources} - {"", *height})
    return [f"common/{name} is not in ROOMS" for name in unknown] + [
        f"{name} imports {target}"
        for name, target in arrows(sources)
        if room(target) and room(name) in height and height.get(room(target), len(height)) > height[room(name)]
    ]


def cycle(sources: Sources) -> list[str]:
    """Returns a cycle of rooms that import each other, its first room again at the end; empty if there is none."""
    below: dict[str, set[str]] = {room(name): set() for name in sources if room(name)}
    for name, target in arrows(sources):
        if room(name) in below and room(target) in below and room(target) != room(name):
            below[room(name)].add(room(target))

    def search(path: list[str]) -> list[str]:
        for target in sorted(below[path[-1]]):
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in finished and (found := search([*path, target])):
                return found
        finished.add(path[-1])
        return []

    finished: set[str] = set()
    return next(filter(None, (search([name]) for name in sorted(below))), [])


def family_names(text: str) -> list[str]:
    """Lists a family's name wherever it occurs in a file: identifiers, strings, docstrings, comments.

    GPT-2 is somebody else's model.
    """
    return re.findall(r"gpt(?!-?\d)|t5_?like", text, re.IGNORECASE)


def test_packages_import_only_those_below():
    allowed = {"common": ["common"], **{family: ["common", family] for family in FAMILIES}}
    assert not foreign_imports(read_sources(*allowed), allowed)


def test_rooms_of_common_import_only_those_below():
    assert not upward_imports(read_sources("common"))


def test_rooms_of_common_make_no_cycle():
    assert not cycle(read_sources("common"))


def test_common_names_no_family():
    files = [file for file in (TOP / "common").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    named = {str(file.relative_to(TOP)): family_names(f"{file.name}\n{file.read_text()}") for file in files}
    assert not {file: names for file, names in named.items() if names}


@pytest.mark.parametrize(
    "statement",
    [
        "import experiments.cli",
        "from experiments import cli",
        "import gpt",
        "from twinstack import DataConfig",
        "def late():\n    from t5like.model import T5Like",
        "if TYPE_CHECKING:\n    from gpt.config import GptConfig",
        "importlib.import_module('t5like.model')",
        "from ..gpt import model",
    ],
)
def test_a_planted_import_of_a_package_above_is_found(statement):
    assert len(foreign_imports({"common.planted": statement}, {"common": ["common"]})) == 1


def test_a_planted_import_of_the_sibling_is_found():
    sources = {"gpt.model": "from t5like import config", "t5like.model": "from t5like import config"}
    allowed = {family: ["common", family] for family in FAMILIES}
    assert foreign_imports(sources, allowed) == ["gpt.model imports t5like.config"]


@pytest.mark.parametrize(
    "statement",
    [
        "from common.report.tables import splits",
        "from common import report",
        "import common.report",
        "from ..report import tables",
        "def late():\n    import common.report.html as html",
        "from common import unheard_of",
    ],
)
def test_a_planted_upward_import_is_found(statement):
    assert len(upward_imports({"common.data.planted": statement})) == 1


def test_imports_of_the_own_room_and_of_lower_ones_are_none():
    assert not upward_imports({"common.data.planted": "from common.data import batch\nimport common.errors, numpy"})


def test_a_room_that_is_not_in_the_list_is_found():
    assert upward_imports({"common.planted.room": ""}) == ["common/planted is not in ROOMS"]


def test_a_planted_cycle_is_found():
    sources = {
        "common.a.x": "from common.b import y",
        "common.b.y": "def late():\n    from common.c.z import something",
        "common.c.z": "import common.a.x",
        "common.d": "import common.a.x, common.errors",
    }
    assert cycle(sources) == ["a", "b", "c", "a"]
    assert not cycle(sources | {"common.c.z": "import common.c.w"})


@pytest.mark.parametrize(
    "text",
    ["x = gpt_config", "class GptModel: ...", '"""As T5Like does."""', "'t5_like'", "# what GPT does", "GPT = 'GPT-2'"],
)
def test_a_planted_name_of_a_family_is_found(text):
    assert len(family_names(text)) == 1


def test_models_of_others_may_be_named():
    assert not family_names("GPT2 = Recipe()  # GPT-2; T5 and T5X too")
