"""The family of docs/adding_a_family.md is one like any other."""

import re

import pytest

from tests.harness.guides import ROOT, follow


@pytest.mark.slow
def test_following_the_page(tmp_path):
    tests, doctor = follow(ROOT / "docs" / "adding_a_family.md", tmp_path)
    assert int(re.search(r"(\d+) passed", tests)[1]) >= 30, tests
    assert "chunk average: right" in doctor
