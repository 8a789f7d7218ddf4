"""Checks paths that users give: what to read, and where to write results, which is checked before the work begins."""

import errno
import os
import re
import stat
import sys
from pathlib import Path

from common.errors import UserError

_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr)|/(?:dev|proc/self)/fd/(\d+)")
_PROJECT = Path(__file__).resolve().parents[1]
_NOT_ABOUT_THE_PATH = (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def user_path(text: str, what: str = "") -> Path:
    """Returns the path that `text` names, with `~` expanded.

    Raises UserError, with `what` in front, if `text` cannot be a path.

    >>> user_path("runs/first").as_posix()
    'runs/first'
    >>> user_path("")
    Traceback (most recent call last):
        ...
    common.errors.UserError: '' is not a path: it is empty
    """
    shown = f"{what} {text!r}".lstrip()
    if not text.strip():
        raise UserError(f"{shown} is not a path: it is empty")
    if "\0" in text:
        raise UserError(f"{shown} is not a path: it contains a NUL character")
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{shown} is not a path: it is not UTF-8") from None
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{shown} is not a path: there is no user {text[1:].partition('/')[0]!r}") from None
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{shown} is not a path: its links form a cycle") from None
    return path


def check_file(path: Path, what: str) -> None:
    """Raises UserError, with `what` in front, if a file cannot be written at `path`."""
    if descriptor(path) is not None:
        return
    status = _stat(path, what)
    if status is None:
        _check_creatable(path, what)
    elif stat.S_ISDIR(status.st_mode):
        raise UserError(f"{what} {path} is a folder: give the name of a file")
    elif not os.access(path, os.W_OK):
        raise UserError(f"{what} {path} cannot be written to: {_why_not_writable(path)}")
    elif stat.S_ISREG(status.st_mode):
        _check_creatable(path.resolve(), what)  # its replacement is written into the same folder


def check_folder(path: Path, what: str) -> None:
    """Raises UserError, with `what` in front, if `path` is not a writable folder and cannot be created as one."""
    status = _stat(path, what)
    if status is None:
        _check_creatable(path, what)
    elif not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{what} {path} is a file: give the name of a folder")
    elif not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path} cannot be written in: {_why_not_writable(path)}")
    elif path.resolve() == Path(path.resolve().anchor):
        raise UserError(f"{what} {path} is the root of the file system: give the name of a folder in it")


def descriptor(path: Path) -> int | None:
    """Returns the file descriptor of this process that a path such as /dev/stdout stands for; None for other paths.

    >>> descriptor(Path("/dev/stdout")), descriptor(Path("/dev/null"))
    (1, None)
    """
    match = _DESCRIPTOR.fullmatch(str(path))
    if match is None:
        return None
    return int(match[2]) if match[2] else {"stdout": 1, "stderr": 2}[match[1]]


def is_special(path: Path) -> bool:
    """Whether `path` is a device, pipe or socket: something to write to, not to replace."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return descriptor(path) is not None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def as_user_error(error: OSError) -> UserError | None:
    """Converts an error about a user's path; returns None if it names no path, or one of the program's own files.

    >>> str(as_user_error(FileNotFoundError(2, "No such file or directory", "prompts.txt")))
    'prompts.txt: no such file or directory'
    """
    if error.errno == errno.ENOSPC:
        return UserError(f"{error.filename or 'a file'} cannot be written: there is no space left on its disk")
    if error.filename is None or isinstance(error.filename, int) or error.errno in _NOT_ABOUT_THE_PATH:
        return None
    path = Path(os.fsdecode(error.filename))
    if _is_installed(path.absolute()):
        return None
    reason = error.strerror or type(error).__name__
    return UserError(f"{path}: {reason[:1].lower()}{reason[1:]}")


def _is_installed(path: Path) -> bool:
    """Whether `path` lies in the Python installation or in a package of this project, so that it is not a user's."""
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


def _check_creatable(path: Path, what: str) -> None:
    """Raises UserError unless an absent `path` can be created in its nearest existing parent folder."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{what} {path} cannot be created: {parent} is a file")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in path.absolute().parts):
        raise UserError(f"{what} {path} cannot be created: a name may have at most {longest} bytes")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{what} {path} cannot be created: {parent} {_why_not_writable(parent)}")


def _why_not_writable(path: Path) -> str:
    read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    return "is on a read-only disk" if read_only else "may not be written by this user"
