"""Fixtures of tests of model runtimes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgespec.models.runtime import Model, ModelSequence


@pytest.fixture
def sequence(model: Model) -> Iterator[ModelSequence]:
    """An empty sequence of the test file's `model`."""
    sequence = model.sequence()
    yield sequence
    sequence.close()
