"""The code that a job runs: the checked-out commit, as a git bundle."""

import subprocess
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically

ROOT = Path(__file__).parents[2]


def committed(root: Path = ROOT) -> str:
    """The full hash of the commit checked out in `root`.

    Raises UserError if `root` is not a git checkout, or has changes that are not committed.
    """
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        changed = _git(root, "status", "--porcelain").decode().splitlines()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"{root} is not a git checkout: hosts run a commit, so launch from a clone") from None
    if changed:
        names = ", ".join(line[3:] for line in changed[:3]) + (", ..." if changed[3:] else "")
        raise UserError(f"{root} has uncommitted changes ({names}): hosts run a commit, so commit or stash them")
    return commit


def write_bundle(path: Path, root: Path = ROOT) -> None:
    """Writes a bundle that `git clone` can read: the checked-out commit with its history."""
    write_atomically(path, _git(root, "bundle", "create", "--quiet", "-", "HEAD"))


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout
