"""A job: its bucket, its mesh, its compiled programs and its commit."""

import dataclasses
import os
import re
from pathlib import Path

import jax
import pytest

from common.errors import UserError
from common.sharding.shape import MeshShape
from experiments.launching import launch as launching
from experiments.launching import source
from experiments.launching.job import Bucket
from experiments.running.jax_setup import set_up_jax
from tests.experiments.launching.jobs import JOB, JOBS, TWO_SLICES, git


@pytest.mark.parametrize(
    "url",
    [
        *[
            "my-bucket",
            "s3://my-bucket",
            "gs://",
            "gs://My",
            "gs://my bucket",
            "gs://my-bucket;x",
            "gs://my-bucket/$(x)",
        ],
        *[
            "gs://my-bucket/a b",
            "gs://my-bucket/../other",
            "gs://my-bucket//me",
            "gs://my-bucket/me\n",
            "gs://my-bucket/'",
        ],
    ],
)
def test_an_invalid_bucket_is_refused(url):
    with pytest.raises(UserError, match="must be gs://BUCKET"):
        Bucket.of(url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "First Light"}, "nearest: first-light"),
        ({"run": "-x"}, "nearest: x"),
        ({"run": "a" * 41}, f"nearest: {'a' * 40}"),
        ({"run": "$(touch pwned)"}, "nearest: touch-pwned"),
        ({"zone": "us-east5"}, "such as us-east5-a"),
        ({"zone": "us-east5-a --quiet"}, "such as us-east5-a"),
    ],
)
def test_an_invalid_job_is_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(JOB, **change)


def test_the_mesh_must_match_the_slices():
    launching.check_mesh(MeshShape(data=4, fsdp=8), JOB)
    launching.check_mesh(MeshShape(replica=2, fsdp=8, tensor=4), TWO_SLICES)
    for mesh in (MeshShape(), MeshShape(fsdp=64)):
        with pytest.raises(
            UserError, match=f"{mesh} does not match 1 x v5p-64 .v5p:2x4x4: 32 chips.; nearest: train.mesh.fsdp=32$"
        ):
            launching.check_mesh(mesh, JOB)
    with pytest.raises(UserError, match="nearest: train.mesh.data=1$"):
        launching.check_mesh(MeshShape(fsdp=2), JOBS["one-chip"])
    for mesh in (MeshShape(fsdp=32), MeshShape(fsdp=64), MeshShape(replica=4, fsdp=16)):
        with pytest.raises(UserError, match="nearest: train.mesh.replica=2 train.mesh.fsdp=32$"):
            launching.check_mesh(mesh, TWO_SLICES)


def test_compiled_programs_are_cached_where_the_job_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "bucket"))
    try:
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "bucket")
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(Path(os.environ["TWINSTACK_CACHE"]) / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("name", ["file", "untracked"])
def test_uncommitted_changes_are_refused(repository, name):
    assert source.committed(repository) == git(repository, "rev-parse", "main~1")
    (repository / name).write_text("changed")
    with pytest.raises(UserError, match=re.escape(f"uncommitted changes ({name})")):
        source.committed(repository)


def test_a_folder_that_is_not_a_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a git checkout"):
        source.committed(tmp_path)
