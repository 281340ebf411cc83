"""How the tests are spread over test processes."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process for their shared fixtures; start the files with slow tests first.

    A notebook shares nothing with the next and takes a minute or two: each goes wherever a process is free. Slow
    files first, so that no process waits at the end for the one long file that another began last.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable: the order within stays
    for item in items:
        apart = item.path.name == "test_notebooks.py"
        item.add_marker(pytest.mark.xdist_group(item.name if apart else item.path.as_posix()))
