import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the processes that tests start, see there.
os.environ["PYTHONPATH"] = os.path.join(os.path.dirname(__file__), "helpers", "lean")

from collections.abc import Iterator

import ahead
import pytest
import torch
from replicas import Replicas

torch.set_num_threads(1)
# Here is nothing to collect, and an import of helpers/lean would hide packages from this process.
collect_ignore = ["helpers", "breaking.py", "trainer/features"]
collect_ignore_glob = ["*conftest.py"]


@pytest.fixture(scope="session")
def replicas() -> Iterator[Replicas]:
    pool = Replicas()
    yield pool
    pool.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    # What is imported stays: the collector need not look at it again and again.
    gc.freeze()
    if not session.config.option.collectonly:
        ahead.begin(session.items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("alone") is not None:
        ahead.finish()


def pytest_sessionfinish() -> None:
    ahead.end()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ahead.order(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
