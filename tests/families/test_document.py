"""What is said of the families is what they are: the table of docs/models.md, and the data it is written from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmllm.families import FAMILIES
from dmllm.families.document import families, markdown
from dmllm.samplers.config import DecodeConfig

ROOT = Path(__file__).parent.parent.parent


def test_the_page_of_models_is_current():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == markdown(), "docs/models.md is stale; type: dmllm models --markdown > docs/models.md"


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_what_a_family_says_of_itself_is_so(family):
    assert family is FAMILIES.load(family.name)
    tests = re.findall(r"tests/[\w/]+\.py", family.verified)
    assert tests or "nothing recorded" in family.verified, "verified names the test that does it"
    assert all((ROOT / path).is_file() for path in tests)
    assert re.search(r"arXiv:\d{4}\.\d{5}|https?://|\w+/\w+", family.source)
    assert family.example, "a tiny config.json, so that a random model can be made"
    assert all(len(quirk) == 3 and all(quirk) for quirk in family.quirks)
    if family.native is None:  # whose settings are its own
        DecodeConfig(**family.decode)
