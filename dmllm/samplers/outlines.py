"""JSON schemas as regular expressions, by outlines-core: the only file that knows it.

A schema's documents are written as outlines-core has them: properties in their order, one optional space where JSON
allows white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def schema_regex(schema: Mapping[str, Any]) -> str:
    """The regular expression of a JSON schema's documents. Raises ValueError where it is not understood."""
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        raise ImportError(
            "A JSON schema as a constraint needs outlines-core: pip install 'dmllm[constraints]'. Regular expressions "
            "and choices= work without."
        ) from None
    try:
        return build_regex_from_schema(json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise ValueError(f"constraint: the JSON schema is not understood: {error}") from None
