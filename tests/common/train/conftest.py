"""The runs that tests of training compare with."""

import pytest

from common.train.loop import fit
from tests.common.train.runs import Unbroken
from tests.tiny import Observer, task


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unbroken]:
    """A finished run of each family, which no test changes."""
    made = {}
    for family in ("gpt", "t5like"):
        folder, observer, of = tmp_path_factory.mktemp(family) / "arm", Observer(), task(family)
        made[family] = Unbroken(task=of, folder=folder, fitted=fit(of, folder, observer), observer=observer)
    return made
