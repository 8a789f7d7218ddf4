"""The data set made from the running Python: its documents, its splits, and that builds are repeatable."""

import ast
import inspect
import os
import subprocess
import sys
import textwrap

import pytest

from common.data.built_in import pydocs, pydocs_text
from common.data.built_in.pydocs_text import (
    data_share,
    docstrings,
    documents,
    module_documents,
    modules,
    standard_library,
)
from common.data.built_in.shares import SPLIT_PER_MILLE, split_by_hash

SMALL = 40


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return pydocs.pydocs_builder(tmp_path_factory.mktemp("cache"), SMALL)


@pytest.fixture(scope="module")
def named():
    return dict(modules(standard_library()))


def read(builder) -> dict[str, list[dict[str, str]]]:
    sources = {name: builder.as_data_source(split=name) for name in builder.info.splits}
    found = {name: source.__getitems__(list(range(len(source)))) for name, source in sources.items()}
    return {
        name: [{key: text.decode() for key, text in record.items()} for record in records]
        for name, records in found.items()
    }


def test_records_contain_each_document_once(small):
    made, found = documents(SMALL).found, read(small)
    assert sorted((d.text, d.module, d.kind) for d in made) == sorted(
        (r["text"], r["module"], r["kind"]) for records in found.values() for r in records
    )
    assert {document.kind for document in made} == {"reference", "docstrings", "library"}
    assert small.info.metadata["unreadable_files"] == 0


def test_a_module_and_its_parts_are_in_one_split(small, named):
    for split, records in read(small).items():
        for record in records:
            name = record["module"]
            family = f"topic {name}" if record["kind"] == "reference" else name.split(".")[0]
            assert split_by_hash(family) == split
    assert split_by_hash("email") == "train" and {"email", "email.mime.text"} <= set(named)


def test_every_split_has_text(named):
    assert {split_by_hash(name.split(".")[0]) for name in named} == set(SPLIT_PER_MILLE)


def test_the_library_is_read_without_tests_tables_or_other_packages(named):
    for name in ("textwrap", "collections", "collections.abc", "json.decoder", "email.mime.text", "asyncio.events"):
        assert name in named
    for name in named:
        parts = name.split(".")
        assert parts[0] in sys.stdlib_module_names
        assert not {"test", "tests", "encodings", "idlelib", "turtledemo", "site-packages"} & set(parts), name
    assert len(named) > 250


@pytest.mark.parametrize("module", ["textwrap", "heapq", "json.encoder"])
def test_headings_and_docstrings_are_those_that_python_itself_finds(named, module):
    text = named[module].read_text("utf-8")
    found = dict(docstrings(ast.parse(text), module))
    imported = __import__(module, fromlist=["x"])
    assert found[f"module {module}"] == inspect.getdoc(imported)
    for name, value in vars(imported).items():
        if inspect.isclass(value) and value.__module__ == module and value.__doc__:
            assert found[f"class {module}.{name}"] == inspect.cleandoc(value.__doc__)


def test_every_object_with_a_docstring_has_a_heading():
    code = textwrap.dedent('''
        """About m."""
        import os
        if os.name:
            def f(a, *, b: int = 2) -> int:
                """Does f."""
                def inner(): "Inner."
        class A:
            def said(self): "Says."
            async def later(self): "Later."
            def unsaid(self): pass
            class B:
                """Is B."""
    ''')
    assert list(docstrings(ast.parse(code), "m")) == [
        ("module m", "About m."),
        ("m.f(a, *, b: int=2)", "Does f."),
        ("m.f.inner()", "Inner."),
        ("m.A.said(self)", "Says."),
        ("m.A.later(self)", "Later."),
        ("class m.A.B", "Is B."),
    ]
    first, second = module_documents("m", code, ast.parse(code))
    assert first.text.startswith("module m\n\nAbout m.\n\n\nm.f(") and first.kind == "docstrings"
    assert (second.text, second.kind, second.family) == (code, "library", "m")
    assert [d.kind for d in module_documents("m", "x = 1\n", ast.parse("x = 1\n"))] == ["library"]
    assert not list(module_documents("m", "", ast.parse("")))


def test_files_that_are_mostly_tables_are_skipped(named):
    table = '"""Doc."""\nx = {\n' + "    (1, -2): 'a',\n" * 9 + "}\n"
    assert data_share(table, ast.parse(table)) == pytest.approx(11 / 12)
    assert [d.kind for d in module_documents("m", table, ast.parse(table))] == ["docstrings"]
    kept = {document.module for document in documents().found if document.kind == "library"}
    assert "html.entities" not in kept and {"html.parser", "mimetypes", "textwrap"} <= kept


def test_unreadable_files_are_counted_and_the_rest_is_read(tmp_path, monkeypatch):
    files = {"abc.py": b"'Fine.'\n", "ast.py": b"'\xff'\n", "cmd.py": b"def (\n", "csv.py": b"x = '\0'\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "bz2.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "x.py").write_bytes(b"'Mine.'\n")
    monkeypatch.setattr(pydocs_text, "standard_library", lambda: tmp_path)
    ticks = []
    made = documents(tick=lambda: ticks.append(1))
    assert made.unreadable == 4 and len(ticks) == 5
    assert {d.module for d in made.found if d.kind != "reference"} == {"abc"}
    builder = pydocs.pydocs_builder(tmp_path / "cache")
    assert builder.info.metadata["unreadable_files"] == 4


def test_documents_do_not_depend_on_the_machine_and_modules_are_not_imported():
    code = f"""
import hashlib, sys
from common.data.built_in.pydocs_text import documents
print(hashlib.blake2b(repr(documents({SMALL})).encode()).hexdigest())
assert not {{"antigravity", "this", "tkinter", "aifc", "bdb"}} & set(sys.modules)
"""
    digests = set()
    for seed, encoding in (("1", "C"), ("2", "de_DE.UTF-8")):
        place = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": encoding}
        digests.add(subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, check=True).stdout)
    assert len(digests) == 1


def test_the_version_names_the_python_and_the_rules(monkeypatch, tmp_path):
    version = pydocs.maker_version()
    assert "{}.{}.{}".format(*sys.version_info[:3]) in version and sys.implementation.name in version
    monkeypatch.setattr(pydocs.platform, "python_version", lambda: "3.99.0")
    monkeypatch.setattr(pydocs, "SKIPPED_PACKAGES", frozenset())
    assert len({version, pydocs.maker_version(), pydocs.maker_version(5)}) == 3


def test_a_second_opening_builds_nothing_and_needs_no_tensorflow(tmp_path, monkeypatch, capfd):
    pydocs.pydocs_builder(tmp_path, 3)
    assert capfd.readouterr().out == ""
    monkeypatch.setattr(pydocs, "documents", lambda *_: pytest.fail("built again"))
    assert pydocs.pydocs_builder(tmp_path, 3).info.splits["train"].num_examples > 0
    assert not list((tmp_path / "tfds").glob(".*.part"))
    code = (
        "import sys, common.data.built_in.pydocs; print('tensorflow' in {name.split('.')[0] for name in sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
