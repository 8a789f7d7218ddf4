"""The folder of real corpora, for tests that read them."""

import os
from pathlib import Path

import pytest

from common.data.corpora import by_name as corpora

SHARED = Path(os.environ.get(corpora.FOLDER_VARIABLE) or Path(__file__).parents[3] / "../shared/data")


real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: set {corpora.FOLDER_VARIABLE}")
