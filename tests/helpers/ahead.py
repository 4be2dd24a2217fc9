"""Runs that begin with the session, on the core that most tests leave idle, for the tests that need them later.

    @ahead
    def printed(folder: Path) -> str:
        (text,) = outputs(start("program", cwd=folder))
        return text

makes a fixture of what the function returns. Such functions run one after another in a thread, in the order of the
tests that need them. They change nothing in this process and read nothing that tests change: processes of their own do
the work, which ``launching`` starts in the environment that the session had at its start.

Tests marked ``alone`` measure time. They come last, and the first of them waits until nothing else runs.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

# By module and name.
_functions: dict[tuple[str, str], Callable[[Path], Any]] = {}
_started: dict[tuple[str, str], Future] = {}
_thread = ThreadPoolExecutor(1)
_folders = ExitStack()


def ahead(function: Callable[[Path], Any]) -> Callable[[], Any]:
    """A fixture of what the function returns for an empty folder."""
    key = function.__module__, function.__name__
    _functions[key] = function

    @pytest.fixture(scope="module", name=function.__name__)
    def result() -> Any:
        return _started[key].result()

    return result


def order(items: list[pytest.Item]) -> None:
    """Move tests that measure time to the end."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def begin(items: list[pytest.Item]) -> None:
    """Begin what the tests need."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        for name in item.fixturenames:
            key = item.module.__name__, name
            if key in _functions and key not in _started:
                folder = _folders.enter_context(tempfile.TemporaryDirectory(prefix=name))
                _started[key] = _thread.submit(_functions[key], Path(folder))


def finish() -> None:
    """Wait until nothing runs."""
    wait(_started.values())


def end() -> None:
    """Begin nothing more, and remove the folders."""
    _thread.shutdown(cancel_futures=True)
    _folders.close()
