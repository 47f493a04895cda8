"""The scaling of rotary positions comes from the file: nothing overrides it, at any context size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_tiny

from edgespec.core import EdgespecError
from edgespec.models.gguf.model import LlamaModel, LlamaOptions

TEXT = np.random.default_rng(2).integers(0, 256, 200).tolist()
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


def logits(folder: Path, engine: str, context: int = 256, **file: Any) -> np.ndarray:
    path = write_tiny(folder / "model.gguf", "llama", **file)
    cache = "f32" if engine == "llama.cpp" else "f16"
    options = LlamaOptions(
        context=context, threads=1, engine=engine, type_k=cache, type_v=cache, flash_attention=False
    )
    with LlamaModel(path, options) as model:
        return model.sequence().forward(TEXT, 8).copy()


@pytest.mark.parametrize("context", [256, 1024])
def test_linear_scaling_is_a_factor_of_all_frequencies(tmp_path, context):
    found = logits(tmp_path, "llama.cpp", context, keys=LINEAR)
    np.testing.assert_allclose(found, logits(tmp_path, "llama.cpp", context, frequencies=4.0), atol=1e-3)
    assert np.abs(found - logits(tmp_path, "llama.cpp", context)).max() > 0.1


def test_yarn_is_neither_linear_nor_nothing(tmp_path):
    found = logits(tmp_path, "llama.cpp", keys=YARN)
    for other in ({}, LINEAR, {**YARN, "rope.scaling.factor": 8.0}):
        assert np.abs(found - logits(tmp_path, "llama.cpp", keys=other)).max() > 1e-2
    np.testing.assert_allclose(found, logits(tmp_path, "llama.cpp", 1024, keys=YARN), atol=1e-3)


@pytest.mark.parametrize("keys", [LINEAR, YARN])
def test_engines_scale_alike(ik, tmp_path, keys):
    found = logits(tmp_path, ik, keys=keys)
    np.testing.assert_allclose(found, logits(tmp_path, "llama.cpp", keys=keys), atol=0.03)


def test_frequencies_that_ik_would_ignore(ik, tmp_path):
    with pytest.raises(EdgespecError, match=r"rotary frequencies .*: use the engine llama\.cpp"):
        logits(tmp_path, ik, frequencies=4.0)
