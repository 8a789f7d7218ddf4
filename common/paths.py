"""Paths that users give: where to read, and where results go, which is looked at before the work begins."""

import errno
import os
import re
import stat
import sys
from pathlib import Path

from common.errors import UserError

_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")
_PROJECT = Path(__file__).resolve().parents[1]
_NO_FAULT_OF_PATHS = (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def user_path(text: str, what: str = "") -> Path:
    """The path that `text` names, `~` replaced. Raises UserError, beginning with `what`, for what can name none.

    >>> user_path("runs/first").as_posix()
    'runs/first'
    >>> user_path("")
    Traceback (most recent call last):
        ...
    common.errors.UserError: '' is no path: it is empty
    """
    shown = f"{what} {text!r}".lstrip()
    if not text.strip():
        raise UserError(f"{shown} is no path: it is empty")
    if "\0" in text:
        raise UserError(f"{shown} is no path: it holds a NUL character")
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{shown} is no path: it is not UTF-8") from None
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{shown} is no path: there is no user {text[1:].partition('/')[0]!r}") from None
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{shown} is no path: its links lead in a circle") from None
    return path


def check_file(path: Path, what: str) -> None:
    """Raises UserError, beginning with `what`, where no file can be written to `path`."""
    if descriptor(path) is not None:
        return
    found = _stat(path, what)
    if found is None:
        _check_parent(path, what)
    elif stat.S_ISDIR(found.st_mode):
        raise UserError(f"{what} {path} is a folder: give the name of a file")
    elif not os.access(path, os.W_OK):
        raise UserError(f"{what} {path} cannot be written to: {_why(path)}")
    elif stat.S_ISREG(found.st_mode):
        _check_parent(path.resolve(), what)  # where its successor is written beside it


def check_folder(path: Path, what: str) -> None:
    """Raises UserError, beginning with `what`, where `path` is no folder that can be written in, nor can become one."""
    found = _stat(path, what)
    if found is None:
        _check_parent(path, what)
    elif not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{what} {path} is a file: give the name of a folder")
    elif not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path} cannot be written in: {_why(path)}")
    elif path.resolve() == Path(path.resolve().anchor):
        raise UserError(f"{what} {path} is the root of the file system: give the name of a folder in it")


def descriptor(path: Path) -> int | None:
    """The number of this process's open file that a path such as /dev/stdout stands for.

    >>> descriptor(Path("/dev/stdout")), descriptor(Path("/dev/null"))
    (1, None)
    """
    match = _DESCRIPTOR.fullmatch(str(path))
    if match is None:
        return None
    return int(match[2]) if match[2] else {"stdout": 1, "stderr": 2}[match[1]]


def is_special(path: Path) -> bool:
    """Whether there is something at `path` that is written to rather than replaced: a device, a pipe, a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return descriptor(path) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def as_user_error(error: OSError) -> UserError | None:
    """The error about a path as one of the user's; None for an error that names no path, or one of the program's own.

    >>> str(as_user_error(FileNotFoundError(2, "No such file or directory", "prompts.txt")))
    'prompts.txt: no such file or directory'
    """
    if error.errno == errno.ENOSPC:
        return UserError(f"{error.filename or 'a file'} cannot be written: there is no space left on its disk")
    if error.filename is None or isinstance(error.filename, int) or error.errno in _NO_FAULT_OF_PATHS:
        return None
    path = Path(os.fsdecode(error.filename))
    if _is_installed(path.absolute()):
        return None
    reason = error.strerror or type(error).__name__
    return UserError(f"{path}: {reason[:1].lower()}{reason[1:]}")


def _is_installed(path: Path) -> bool:
    """Whether a path lies in Python's installation or in a package of this project, and so is no user's."""
    if path.is_relative_to(sys.prefix):
        return True
    package = path.relative_to(_PROJECT).parts[:1] if path.is_relative_to(_PROJECT) else ()
    return bool(package) and (_PROJECT / package[0] / "__init__.py").is_file()


def _stat(path: Path, what: str) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{what} {path}: {(error.strerror or '').lower()}") from None


def _check_parent(path: Path, what: str) -> None:
    """Checks that a path that is not there yet can be made in its nearest existing parent folder."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{what} {path} cannot be made: {parent} is a file")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.absolute().parts):
        raise UserError(f"{what} {path} cannot be made: a name may have {longest} bytes")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path} cannot be made: {parent} {_why(parent)}")


def _why(path: Path) -> str:
    read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    return "is on a read-only disk" if read_only else "may not be written by this user"
