"""A repository to launch from."""

from pathlib import Path

import pytest

from tests.experiments.launching.jobs import git


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with two commits; the older one is checked out."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch=main")
    for text in ("older", "newer"):
        (root / "file").write_text(text)
        git(root, "add", "file")
        git(root, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "--message", text)
    git(root, "checkout", "--quiet", "--detach", "HEAD~1")
    return root
