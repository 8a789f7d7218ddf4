"""Finds studies: the project's own by name, those of installed packages by name, anybody's by the path of a file."""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, nearest
from common.paths import user_path

if TYPE_CHECKING:
    from experiments.study import Study

OWN = (
    "first_light",
    "ladder",
    "structure",
    "depth",
    "languages",
    "lengths",
    "multi30k",
    "multi30k_accelerator",
    "pydocs",
    "xl",
)
"""The project's studies: each is the function of that name in the module of that name."""
ENTRY_POINTS = "twinstack.studies"
"""Entry-point group in which other packages name functions that return a `Study`."""


def names() -> tuple[str, ...]:
    """Returns the names of the project's studies, then those of other installed packages."""
    return tuple(dict.fromkeys((*OWN, *_elsewhere())))


def check_name(name: str) -> None:
    """Raises UserError if there is no study of this name, or no file of this path; imports no study."""
    if _is_path(name):
        if not user_path(name).is_file():
            raise UserError(f"{name} is no file; `twinstack new {Path(name).stem}` writes a study to start from")
    elif name not in OWN and name not in names():
        raise UserError(f"unknown study {name!r}: {nearest(name, names())}; a file's name ends in .py")


def load(name: str) -> "Study":
    """Returns the study of this name, or the one that the function `study` in the Python file of this path returns.

    Raises UserError as `check_name` does, and where a file cannot be imported, has no such function, or fails.
    """
    from experiments.study import Study

    check_name(name)
    found = _in_own_words(name, _function(name))
    if not isinstance(found, Study):
        raise UserError(f"{name}: study() returned {type(found).__name__}; it must return a Study")
    return found


def _function(name: str) -> Callable[[], Any]:
    if _is_path(name):
        return functools.partial(_study_of_file, user_path(name))
    if name in OWN:
        function: Callable[[], Any] = getattr(importlib.import_module(f"experiments.{name}"), name)
        return function
    return lambda: _elsewhere()[name].load()()


def _study_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", f"study_{path.stem}"), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses that the file defines look themselves up there
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, "study", None)):
        raise UserError(f"{path} has no function study(); it must return a Study")
    return function()


def _in_own_words(name: str, function: Callable[[], Any]) -> Any:
    """Returns `function()`. An error in a user's file becomes one line that names the place in that file."""
    try:
        return function()
    except Exception as error:
        if not _is_path(name):
            raise
        path = str(user_path(name).absolute())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        if line is None and isinstance(error, UserError):  # about the file as a whole
            raise
        where = f"{name}, line {line}" if line else name
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: {what}") from error


def _is_path(name: str) -> bool:
    return name.endswith(".py")


def _elsewhere() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
