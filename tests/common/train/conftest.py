from collections.abc import Iterator

import pytest

from tests.tiny import QUICK, jax_settings


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    with jax_settings(QUICK):
        yield
