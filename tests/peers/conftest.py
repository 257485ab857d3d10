"""What several comparisons need."""

from pathlib import Path

import pytest

import llmlab
from llmlab.errors import Unreachable


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The small real model's file; where it cannot be had a skip, which is a failure under CI."""
    try:
        return llmlab.fetch("smollm2-135m", progress=False)
    except Unreachable as error:
        pytest.skip(str(error))
