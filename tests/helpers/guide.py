"""The Python of the guide, to be run as it is printed."""

import re
from typing import Any

from training import ROOT


def names_defined_in(heading: str) -> dict[str, Any]:
    """Run the Python below a heading of the third level; what it defines. What it registers stays registered."""
    section = (ROOT / "examples/guide.md").read_text().partition(f"\n### {heading}\n")[2]
    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", re.split(r"\n##", section)[0], flags=re.S)
    exec(block, names)
    return names
