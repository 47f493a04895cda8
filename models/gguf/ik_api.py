"""Bindings of ik_llama.cpp's llama.h as built by ik-llama-cpp-python 0.1.5: structs and the functions used.

The package's own module is not used: it loads the library that an environment variable names, and lacks most
of these functions. Functions have llama.cpp's names where only the name differs.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, TypeAlias

_Fields: TypeAlias = list[tuple[str, Any]]


def _fields(kind: Any, names: str) -> _Fields:
    return [(name, kind) for name in names.split()]


llama_log_callback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
llama_progress_callback = ctypes.CFUNCTYPE(c_bool, c_float, c_void_p)
ggml_eval_callback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
ggml_abort_callback = ctypes.CFUNCTYPE(c_bool, c_void_p)


class llama_batch(ctypes.Structure):  # noqa: N801 - as in llama.h, like the two below
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
        *_fields(c_int32, "all_pos_0 all_pos_1 all_seq_id"),
    ]


class llama_model_params(ctypes.Structure):  # noqa: N801
    _fields_ = [
        ("devices", c_char_p),
        *_fields(c_int32, "n_gpu_layers mla split_mode main_gpu max_gpu ncmoe type_k type_v"),
        ("max_ctx_size", c_uint32),
        *_fields(c_int32, "n_seq_max n_ubatch amb fit_margin"),
        ("fit", c_bool),
        *_fields(c_int32, "worst_graph_tokens type_k_first type_k_last type_v_first type_v_last"),
        *_fields(c_int32, "n_k_first n_k_last n_v_first n_v_last"),
        *_fields(c_void_p, "tensor_split rpc_servers"),
        ("progress_callback", llama_progress_callback),
        *_fields(c_void_p, "progress_callback_user_data kv_overrides tensor_buft_overrides"),
        *_fields(
            c_bool, "vocab_only use_mmap use_mlock check_tensors repack_tensors use_thp validate_quants"
        ),
        *_fields(c_bool, "merge_qkv merge_up_gate_exps mtp dry_run flash_attn"),
    ]


class llama_context_params(ctypes.Structure):  # noqa: N801
    _fields_ = [
        *_fields(c_uint32, "seed n_ctx n_batch n_ubatch n_seq_max n_threads n_threads_batch"),
        *_fields(c_int32, "max_extra_alloc worst_case_tokens rope_scaling_type pooling_type attention_type"),
        *_fields(c_float, "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor"),
        *_fields(c_float, "yarn_beta_fast yarn_beta_slow"),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", ggml_eval_callback),
        ("cb_eval_user_data", c_void_p),
        *_fields(c_int32, "type_k type_v type_reduce type_k_first type_k_last type_v_first type_v_last"),
        *_fields(c_int32, "n_k_first n_k_last n_v_first n_v_last"),
        *_fields(c_bool, "logits_all embeddings offload_kqv flash_attn"),
        *_fields(c_int32, "mla_attn attn_max_batch"),
        *_fields(c_bool, "fused_moe_up_gate grouped_expert_routing fused_up_gate fused_mmad rope_cache"),
        ("graph_reuse", c_bool),
        ("min_experts", c_int32),
        ("thresh_experts", c_float),
        *_fields(c_bool, "only_active_experts k_cache_hadamard v_cache_hadamard"),
        *_fields(c_bool, "split_mode_graph_scheduling scheduler_async mtp"),
        ("mtp_op_type", c_int32),
        ("abort_callback", ggml_abort_callback),
        *_fields(c_void_p, "abort_callback_data offload_policy cuda_params"),
    ]


_P, _I, _B, _S = c_void_p, c_int32, c_bool, c_char_p

# Where only the name differs from llama.cpp's.
_RENAMED = {
    "llama_model_free": "llama_free_model",
    "llama_tokenize": "llama_vocab_tokenize",
    "llama_token_to_piece": "llama_token_to_piece_vocab",
    "llama_state_seq_get_size_ext": "llama_state_seq_get_size",
    "llama_state_seq_get_data_ext": "llama_state_seq_get_data",
    "llama_state_seq_set_data_ext": "llama_state_seq_set_data",
}
# The result, then the arguments.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, llama_log_callback, _P),
    "llama_backend_init": (None,),
    "llama_print_system_info": (_S,),
    "llama_supports_gpu_offload": (_B,),
    "llama_model_default_params": (llama_model_params,),
    "llama_context_default_params": (llama_context_params,),
    "llama_model_load_from_file": (_P, _S, llama_model_params),
    "llama_model_free": (None, _P),
    "llama_init_from_model": (_P, _P, llama_context_params),
    "llama_free": (None, _P),
    "llama_n_ctx": (c_uint32, _P),
    "llama_n_batch": (c_uint32, _P),
    "llama_n_threads": (c_uint32, _P),
    "llama_n_threads_batch": (c_uint32, _P),
    "llama_set_n_threads": (None, _P, c_uint32, c_uint32),
    "llama_decode": (_I, _P, llama_batch),
    "llama_synchronize": (None, _P),
    "llama_get_logits": (POINTER(c_float), _P),
    "llama_kv_cache_seq_rm": (_B, _P, _I, _I, _I),
    "llama_state_seq_get_size_ext": (c_size_t, _P, _I, c_uint32),
    "llama_state_seq_get_data_ext": (c_size_t, _P, _P, c_size_t, _I, c_uint32),
    "llama_state_seq_set_data_ext": (c_size_t, _P, _P, c_size_t, _I, c_uint32),
    "llama_model_chat_template": (_S, _P, _S),
    "llama_model_has_encoder": (_B, _P),
    "llama_model_is_recurrent": (_B, _P),
    "llama_model_is_hybrid": (_B, _P),
    "llama_model_get_vocab": (_P, _P),
    "llama_vocab_n_tokens": (_I, _P),
    "llama_vocab_bos": (_I, _P),
    "llama_vocab_eos": (_I, _P),
    "llama_vocab_get_add_bos": (_B, _P),
    "llama_vocab_get_text": (_S, _P, _I),
    "llama_vocab_is_eog": (_B, _P, _I),
    "llama_token_get_attr": (c_int, _P, _I),
    "llama_tokenize": (_I, _P, _S, _I, POINTER(_I), _I, _B, _B),
    "llama_token_to_piece": (_I, _P, _I, _S, _I, _I, _B),
    "ggml_get_name": (_S, _P),
    "ggml_get_data": (_P, _P),
    "ggml_nelements": (ctypes.c_int64, _P),
}


class Functions:
    """The value of `Backend.C` for ik_llama.cpp: its functions, bound, and the types they take."""

    llama_batch = llama_batch
    llama_log_callback = llama_log_callback
    llama_progress_callback = llama_progress_callback
    ggml_eval_callback = ggml_eval_callback

    def __init__(self, path: Path) -> None:
        """Raises OSError if the library cannot be loaded, AttributeError if a function is missing."""
        # Local symbols, ctypes' default on every system: llama.cpp's functions have the same names.
        lib = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(lib, _RENAMED.get(name, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"Edgespec does not bind ik_llama.cpp's {name}")
