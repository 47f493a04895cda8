"""Relative costs of forward passes of several rows, used until this machine has been measured.

Measured on two cores of AMD Zen 4 and Zen 5 servers (docs/experiments.md); a processor with other kernels
differs by tens of percent, which the prior's deviation allows for. More threads make the matrix products,
which are the cost of further rows, cheaper, but not reading the weights: the exponents in `_THREADS` are an
assumption.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgespec.costs import SIZES, TYPICAL

_THREADS = ((8, 0.7), (4, 0.85))  # minimum number of threads, exponent of the relative cost


def _shape(*relative: float) -> dict[int, float]:
    return dict(zip(SIZES, relative, strict=True))


_ONNX = _shape(1.0, 1.16, 1.4, 1.6, 1.9, 2.1, 2.65, 3.7, 5.0, 7.0, 9.1)
_PRIORS: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("llama.cpp", "k"): _shape(1.0, 1.85, 2.55, 3.0, 3.8, 4.3, 5.1, 6.6, 6.4, 9.2, 10.8),
    ("llama.cpp", "4"): _shape(1.0, 1.6, 2.2, 2.2, 2.9, 3.4, 3.9, 5.2, 5.6, 8.3, 10.5),
    ("llama.cpp", "5"): _shape(1.0, 1.9, 2.15, 2.25, 3.0, 3.3, 3.8, 4.7, 6.6, 10.0, 13.5),
    ("llama.cpp", "8"): _shape(1.0, 1.6, 1.9, 2.0, 2.4, 2.7, 3.3, 4.4, 5.1, 7.4, 9.4),
    ("llama.cpp", "16"): _shape(1.0, 1.35, 1.5, 1.65, 1.8, 1.9, 2.1, 2.5, 2.9, 3.7, 4.4),
    ("ik", "k"): _shape(1.0, 1.3, 1.75, 2.25, 2.4, 2.7, 3.2, 4.6, 5.7, 8.3, 10.3),
    ("ik", "4"): _shape(1.0, 1.6, 2.0, 2.1, 2.2, 2.3, 2.5, 3.6, 4.1, 6.3, 7.9),
    ("ik", "5"): _shape(1.0, 1.7, 1.95, 2.15, 2.6, 2.9, 3.1, 3.8, 4.5, 6.0, 7.5),
    ("ik", "8"): _shape(1.0, 1.6, 1.9, 2.1, 2.3, 2.5, 2.8, 3.8, 4.6, 6.5, 8.0),
    ("ik", "16"): _shape(1.0, 1.25, 1.4, 1.4, 1.35, 1.4, 1.65, 2.0, 2.2, 2.7, 3.2),
    ("onnx", "4"): _ONNX,
}
_SMALL = 10 << 20  # bytes of weights; below this a pass is mostly overhead
_OVERHEAD = _shape(1.0, 1.05, 1.08, 1.1, 1.13, 1.16, 1.22, 1.35, 1.5, 1.7, 1.9)
_FAMILIES = {
    "Q4_0": "4", "IQ4_NL": "4", "Q4_1": "4", "MXFP4": "4", "Q5_0": "5", "Q5_1": "5", "Q8_0": "8",
    "F16": "16", "BF16": "16", "F32": "16",
}  # fmt: skip


def relative_costs(engine: str, types: Mapping[str, int], threads: int) -> Mapping[int, float]:
    """Return the costs of batches of SIZES rows relative to one row.

    `types`: bytes of weights by type; `engine`: a BackendName, or "onnx".
    """
    if sum(types.values()) < _SMALL:
        return _OVERHEAD
    largest = max(types, key=lambda name: types[name], default="")
    family = "4" if engine == "onnx" else _FAMILIES.get(largest, "k")
    shape = _PRIORS.get((engine, family), TYPICAL)
    exponent = next((power for least, power in _THREADS if threads >= least), 1.0)
    return {n: relative**exponent for n, relative in shape.items()}
