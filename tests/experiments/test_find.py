"""Studies are found by name, in installed packages, and in files; a mistake in a file is one line with its place."""

import sys
from pathlib import Path

import pytest

from common.errors import UserError
from experiments import find
from experiments.first_light import first_light

GOOD = """\
import dataclasses

from experiments.first_light import first_light


@dataclasses.dataclass
class Widths:
    values: tuple[int, ...] = (1, 2)


def study():
    return dataclasses.replace(first_light(), name=f"mine_{len(Widths().values)}")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str, name: str = "my_study.py") -> str:
    Path(name).write_text(text)
    return name


def refused(name: str) -> str:
    with pytest.raises(UserError) as caught:
        find.load(name)
    return str(caught.value)


@pytest.mark.parametrize("name", find.OWN)
def test_own_studies_have_the_name_of_their_module(name: str) -> None:
    assert find.load(name).name == name


def test_a_file_is_a_study(here: Path) -> None:
    """By a relative or a whole path; it may define classes, and may be named as no module can be."""
    for path in (written(GOOD), str(here / written(GOOD, "2nd study-of.mine.py"))):
        find.check_name(path)
        assert find.load(path).name == "mine_2"


def test_a_file_is_read_anew(here: Path) -> None:
    assert find.load(written(GOOD)).name == "mine_2"
    assert find.load(written(GOOD.replace("(1, 2)", "(1, 2, 3)"))).name == "mine_3"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("import dataclasses\n\nstudy = 1 / 0\n", "line 3", "ZeroDivisionError: division by zero"),
        (
            "def helper():\n    return {}['width']\n\n\ndef study():\n    return helper()\n",
            "line 2",
            "KeyError: 'width'",
        ),
        ("def study():\n    return (\n", "line 2", "SyntaxError: '(' was never closed"),
        ("import nonesuch\n", "line 1", "ModuleNotFoundError: No module named 'nonesuch'"),
        (
            "import json\n\n\ndef study():\n    return json.loads('{')\n",
            "line 5",
            "JSONDecodeError: Expecting property",
        ),
        (
            "from experiments.first_light import first_light\n\n\ndef study():\n"
            "    return first_light().selected({'family': ['3']})\n",
            "line 5",
            "no arm has family=3; there are family=gpt,t5like",
        ),
    ],
    ids=["at import", "in a helper", "syntax", "a missing package", "in a library", "a mistake in a field"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["relative", "whole"])
def test_an_error_in_a_file_names_its_line(text: str, place: str, message: str, whole: bool, here: Path) -> None:
    path = f"{here}/{written(text)}" if whole else written(text)
    said = refused(path)
    assert said.startswith(f"{path}, {place}: {message}") and "\n" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "my_study.py has no function study(); it must return a Study"),
        ("study = 3\n", "my_study.py has no function study(); it must return a Study"),
        ("def study():\n    pass\n", "my_study.py: study() returned NoneType; it must return a Study"),
    ],
)
def test_a_file_without_a_study(text: str, message: str) -> None:
    assert refused(written(text)) == message


def test_a_missing_file_is_an_error_before_anything_is_imported() -> None:
    with pytest.raises(UserError, match=r"mine/my_study\.py is no file; `twinstack new my_study` writes a study"):
        find.check_name("mine/my_study.py")


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert refused("frist_light").startswith("unknown study 'frist_light': did you mean 'first_light'? Valid: ")


@pytest.fixture
def installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs a package that names three studies, one of them with the name of one of ours."""
    folder = here / "site"
    (folder / "theirs-1.0.dist-info").mkdir(parents=True)
    (folder / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = ("theirs = theirs:made", "broken = theirs:broken", "first_light = theirs:made")
    (folder / "theirs-1.0.dist-info" / "entry_points.txt").write_text("\n".join(["[twinstack.studies]", *points]))
    (folder / "theirs.py").write_text(GOOD.replace("def study", "def made") + "\n\ndef broken():\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "theirs", raising=False)


@pytest.mark.usefixtures("installed")
class TestInstalledPackages:
    def test_their_studies_follow_ours(self) -> None:
        assert find.names() == (*find.OWN, "theirs", "broken")
        find.check_name("theirs")
        assert "theirs" not in sys.modules
        assert find.load("theirs").name == "mine_2"

    def test_ours_come_first(self) -> None:
        assert find.load("first_light") == first_light()

    def test_their_errors_keep_their_traceback(self) -> None:
        with pytest.raises(ZeroDivisionError):
            find.load("broken")

    def test_a_near_miss_is_proposed(self) -> None:
        assert "did you mean 'theirs'?" in refused("teirs")
