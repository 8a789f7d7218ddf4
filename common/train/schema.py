"""The schema that the JSON files of a run directory are written in."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

SCHEMA_VERSION = 1


def check_schema(found: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where `path`, which holds `found`, was written by another version."""
    if (schema := found.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
        raise UserError(
            f"{path} has run schema {json.dumps(schema)}, this version reads {SCHEMA_VERSION}: use the version that "
            "wrote it, or another --run-dir"
        )
