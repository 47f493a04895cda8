"""The memory of a GGUF model, computed from its tensors' shapes without loading it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import GgufSummary
from edgespec.models.gguf.native import Backend, BackendName, LlamaOptions
from edgespec.models.gguf.running_state import most_bytes, wanted_snapshots
from edgespec.models.memory import first_that_fits, require_memory, shorter

_BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "f32": 32.0}
_CACHE_BLOCKS = {"q8_0": 32, "q4_0": 32}
_TENSOR = re.compile(r"blk\.(\d{1,4})\.([\w.]+)\.weight")


def require_gguf_memory(name: str, summary: GgufSummary, options: LlamaOptions, shares_passes: bool) -> None:
    """Raise TooLargeError unless there is memory for the GGUF model `name`, loaded with `options`.

    `shares_passes`: see native.Backend.
    """
    state = running_state(summary)
    shares_passes = shares_passes and not state
    whole = summary.context_length or 0  # by default, divided among sequences that share passes
    sequences = options.sequences if options.context or not shares_passes else 1
    caches = gguf_cache(summary, options, sequences * (options.context or whole))
    snapshots = wanted_snapshots(summary.architecture) if options.engine == "llama.cpp" else 0
    caches += options.sequences * (state * (1 + snapshots) + most_bytes(state))
    logits = options.max_rows * summary.vocab_size * 4
    adapters = sum(one.path.stat().st_size for one in options.adapters)
    require_memory(
        name,
        gguf_weights(summary, mtp=options.mtp) + adapters,
        caches,
        logits,
        0 if shares_passes else options.sequences,
    )


def fitting(
    name: str, summary: GgufSummary, options: LlamaOptions, library: Backend, note: Callable[[str], None]
) -> LlamaOptions:
    """Return `options` or, where memory is short, the largest smaller ones that they allow.

    Then `note` receives a line. Raises TooLargeError if nothing fits.
    """
    candidates: list[LlamaOptions] = []
    for one in options.smaller_contexts():
        candidates.append(one)
        if options.auto_cache and has_small_cache(summary, library.name):
            candidates.append(one.with_cache("q8_0"))
    found = first_that_fits(
        candidates, lambda one: require_gguf_memory(name, summary, one, library.shares_passes)
    )
    if found.context != options.context:
        note(shorter(name, options.context, found.context))
    if found.type_k != options.type_k:
        note(f"memory is short: the KV cache of {name} is of 8 bits, which changes its output a little")
    return found


def has_small_cache(summary: GgufSummary, engine: BackendName) -> bool:
    """Whether the engine can keep the keys and values of this model in 8 bits."""
    if engine == "ik" and summary.number("attention.sliding_window"):
        return False  # its flash attention is wrong there, and without it the engine crashes
    return all(size % _CACHE_BLOCKS["q8_0"] == 0 for size in _heads(summary))


def _heads(summary: GgufSummary) -> tuple[int, int]:
    """Return how many numbers the keys and the values of a head have."""
    number = summary.number
    size = number("embedding_length") // max(number("attention.head_count"), 1)
    return number("attention.key_length") or size, number("attention.value_length") or size


def refuse_cache_types(name: str, summary: GgufSummary, options: LlamaOptions, library: Backend) -> None:
    """Raise EdgespecError for cache types on which an engine would abort."""
    for numbers, kind in zip(_heads(summary), (options.type_k, options.type_v), strict=True):
        if kind not in library.cache_types:
            known = ", ".join(library.cache_types)
            raise EdgespecError(f"{library.name} has no {kind} cache: choose one of {known}")
        if numbers % _CACHE_BLOCKS.get(kind, 1):
            raise EdgespecError(
                f"a {kind} cache does not support the attention heads of {name}, "
                f"{numbers} numbers each: choose f16"
            )


def running_state(summary: GgufSummary) -> int:
    """Return the bytes of one state of the recurrent layers, 0 if there are none: float32."""
    number = summary.number
    layers = number("block_count") - number("nextn_predict_layers")
    numbers = 0
    for name, tensor in summary.tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None or int(found[1]) >= layers:
            continue
        if found[2] in ("ssm_conv1d", "shortconv.conv"):
            numbers += (tensor.shape[0] - 1) * tensor.shape[1]
            if found[2] == "ssm_conv1d":
                numbers += number("ssm.state_size") * number("ssm.inner_size")
    return 4 * numbers


def gguf_weights(summary: GgufSummary, *, mtp: bool = False) -> int:
    """Return the bytes of the tensors that are loaded, layers for multi-token prediction only if `mtp`."""
    if mtp:
        return summary.tensor_bytes
    layers = summary.number("block_count") - summary.number("nextn_predict_layers")
    unused = (
        tensor.bytes
        for name, tensor in summary.tensors.items()
        if (found := _TENSOR.fullmatch(name)) and int(found[1]) >= layers > 0
    )
    return summary.tensor_bytes - sum(unused)


def gguf_cache(summary: GgufSummary, options: LlamaOptions, positions: int) -> int:
    """Return the bytes of the keys and values of `positions`, in all layers."""
    widths = list(_widths(summary))
    keys, values = (sum(pair[i] for pair in widths) for i in (0, 1))
    bits = keys * _BITS[options.type_k] + values * _BITS[options.type_v]
    return int(positions * bits // 8)


def _widths(summary: GgufSummary) -> Iterator[tuple[int, int]]:
    """Yield the widths of the keys and values of a position, for each layer: those of its projections.

    Metadata is not sufficient, because values that differ by layer are arrays there. Recurrent layers have
    no keys and values, and the last layers of some models share those of others.
    """
    last = summary.number("block_count")
    last -= summary.number("nextn_predict_layers") + summary.number("attention.shared_kv_layers")
    layers: dict[int, dict[str, int]] = {}
    for name, tensor in summary.tensors.items():
        if (found := _TENSOR.fullmatch(name)) and int(found[1]) < last:
            layers.setdefault(int(found[1]), {})[found[2]] = tensor.shape[-1]
    heads = max(1, summary.number("attention.head_count"))
    for rows in layers.values():
        if "attn_k" in rows:
            yield rows["attn_k"], rows.get("attn_v", 0)
        elif "attn_kv_a_mqa" in rows:  # compressed; for files without attn_k_b, llama.cpp caches more
            yield rows["attn_kv_a_mqa"], 0
        elif "attn_qkv" in rows and not any(name.startswith("ssm_") for name in rows):
            shared = max(1, summary.number("attention.head_count_kv") or heads)
            width = rows["attn_qkv"] * shared // (heads + 2 * shared)
            yield width, width
