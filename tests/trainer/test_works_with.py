"""What the README promises is what the tests do."""

import re

from test_launch import LAUNCHES
from trainer_rows import ROWS
from training import ROOT


def works_with():
    """The README's table: the features of each area."""
    text = (ROOT / "README.md").read_text().split("## Works with")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!area|---)([^|]+) \| ([^|]+) \|$", text, flags=re.M)
    return {area.strip(): {feature.strip() for feature in features.split(";")} for area, features in rows}


def test_the_table_works_with_names_what_is_tested_and_nothing_else():
    tested = {area: set() for area, _ in ROWS}
    for area, feature in ROWS:
        tested[area].add(feature)
    tested["launch"] |= set(LAUNCHES)
    assert works_with() == tested
