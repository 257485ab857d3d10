"""`pytest tests/bench` runs the files named bench_*.py."""

import pytest


def pytest_collect_file(file_path, parent):
    named = file_path.name.startswith("bench_") and file_path.suffix == ".py"
    if named and not parent.session.isinitpath(file_path):     # pytest itself collects a file that is named
        return pytest.Module.from_parent(parent, path=file_path)
    return None
