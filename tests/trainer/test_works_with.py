"""The guide's table "Works with" names the features that are tested, and no others."""

import re

from features import ROWS
from training import ROOT


def works_with() -> dict[str, list[str]]:
    """The features of each area, sorted."""
    text = (ROOT / "examples/guide.md").read_text().partition("## Works with\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!area|---)([^|]+) \| ([^|]+) \|$", text, flags=re.M)
    return {area.strip(): sorted(feature.strip() for feature in features.split(";")) for area, features in rows}


def test_the_table_works_with_names_what_is_tested_and_nothing_else():
    tested: dict[str, list[str]] = {}
    for area, feature in sorted(ROWS):
        tested.setdefault(area, []).append(feature)
    assert works_with() == tested
