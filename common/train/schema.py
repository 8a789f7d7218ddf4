"""The schema version of the JSON files in a run directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError

SCHEMA_VERSION = 1


def check_schema(found: Mapping[str, Any], path: Path) -> None:
    """Raises UserError if `found`, read from `path`, has another schema version."""
    if (schema := found.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION:
        raise UserError(
            f"{path} has run schema {json.dumps(schema)}, this version reads {SCHEMA_VERSION}: use the version that "
            "wrote it, or another --run-dir"
        )
