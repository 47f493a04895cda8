"""llama.cpp's quantizer in a process of its own: `requant` starts it and ends it.

It is one native call that cannot be interrupted, and that takes the process with it when it runs out of
memory or meets an assertion. Here it takes only this one.
"""

from __future__ import annotations

import ctypes
import os
import sys

from edgespec.models.gguf.backends import library

_FILE_TYPES = {  # enum llama_ftype
    **{"q4_0": 2, "iq4_nl": 25, "q8_0": 7, "f16": 1, "bf16": 32},
    **{"q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18},
}


def main(arguments: list[str]) -> int:
    """SOURCE OUT KIND MIX THREADS KEY VALUE: write SOURCE to OUT as KIND, with KEY = VALUE.

    MIX is "pure" for all matrices as KIND, anything else for llama.cpp's mixture under that name.

    KEY is a metadata key, VALUE a text of at most 127 bytes. 0, or what went wrong on standard error.
    """
    source, out, kind, mix, threads, key, value = arguments
    engine = library()
    C = engine.C  # noqa: N806 - the C API reads best under its own name
    params = C.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[kind]
    params.allow_requantize, params.pure = True, mix == "pure"
    params.nthread = int(threads)
    text = C.llama_model_kv_override_value(val_str=value.encode())
    override = C.llama_model_kv_override(C.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode(), text)
    params.kv_overrides = (C.llama_model_kv_override * 2)(override)  # an empty key ends the list
    code = int(C.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)))
    if code:
        sys.stderr.write(engine.last_log())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
