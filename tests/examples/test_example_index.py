"""What the index and the docstrings of the examples promise."""

import doctest
import importlib
import re
import sys

import pytest
from launching import ROOT

EXAMPLES = ROOT / "examples"


def test_the_index_names_every_example_and_config():
    index = (EXAMPLES / "README.md").read_text()
    files = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh") and path.name != "__init__.py"]
    for path in [*files, *(ROOT / "configs").glob("*.yaml")]:
        assert path.name in index, f"{path.name} is missing in examples/README.md"
    for named in re.findall(r"(?:examples|configs)/[\w./]+\.\w+", index):
        assert (ROOT / named).exists(), f"examples/README.md names {named}"


@pytest.mark.parametrize("name", ["digits_vit", "gpt", "hf_finetune", "token_shards"])
def test_docstring_examples(name):
    if requirement := {"digits_vit": "sklearn", "hf_finetune": "transformers"}.get(name):
        pytest.importorskip(requirement)
    failed, tried = doctest.testmod(importlib.import_module(f"examples.{name}"))
    assert tried > 0 and failed == 0


@pytest.mark.parametrize(("name", "package"), [("digits_vit", "sklearn.datasets"), ("hf_finetune", "transformers")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"examples.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"examples/{name}.py needs .*: pip install"):
        importlib.import_module(f"examples.{name}")
