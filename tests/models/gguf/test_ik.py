"""ik_llama.cpp's seam: what is refused, struct layouts, and both engines in one process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgespec.core import EdgespecError
from edgespec.models.gguf import ik as module
from edgespec.models.gguf import ik_api
from edgespec.models.gguf.backends import library
from edgespec.models.gguf.ik import Ik, installed_library
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.vocab import first_difference

STRUCTS = [ik_api.llama_batch, ik_api.llama_model_params, ik_api.llama_context_params]


def pretend(monkeypatch: pytest.MonkeyPatch, version: str, folder: Path) -> None:
    package = SimpleNamespace(version=version, locate_file=lambda name: folder / name)
    monkeypatch.setattr(module, "distribution", lambda name: package)


def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "distribution", missing)
    with pytest.raises(EdgespecError, match=r"^ik-llama-cpp-python is not installed: pip install 'edgesp"):
        Ik()


@pytest.mark.parametrize("version", ["0.1.4", "0.1.50", "0.2.0"])
def test_another_version_is_refused_before_it_is_loaded(monkeypatch, tmp_path, version):
    pretend(monkeypatch, version, tmp_path)
    with pytest.raises(EdgespecError, match=rf"{version} is not the version .* \(0\.1\.5\): pip install"):
        Ik()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_broken_package_is_one_line(monkeypatch, tmp_path, content):
    folder = tmp_path / "ik_llama_cpp/lib"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "libllama.so").write_bytes(content)
    pretend(monkeypatch, "0.1.5", tmp_path)
    with pytest.raises(EdgespecError, match=r"is broken \(.*--force-reinstall") as caught:
        Ik()
    assert "\n" not in str(caught.value)


def test_the_environment_chooses_neither_library(ik, tmp_path, tiny_llama):
    """Both packages would load what these name; a path that does not exist would fail there."""
    code = (
        "from pathlib import Path; from edgespec.models.gguf.model import LlamaModel, LlamaOptions\n"
        "for engine in 'ik', 'llama.cpp':\n"
        f"    with LlamaModel(Path({str(tiny_llama)!r}), LlamaOptions(context=64, engine=engine)) as model:\n"
        "        print(model.sequence().forward([1]).shape)"
    )
    environment = {
        **os.environ,
        "IK_LLAMA_CPP_LIB_PATH": str(tmp_path / "evil.so"),
        "LLAMA_CPP_LIB_PATH": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["(1, 257)"] * 2, done.stderr


def test_defaults_are_those_of_the_source(ik):
    """Read through our structs: one field of a wrong size or in a wrong place and these would be shifted."""
    functions = library("ik").C
    model, context = functions.llama_model_default_params(), functions.llama_context_default_params()
    unset = dict.fromkeys(("n_k_first", "n_k_last", "n_v_first", "n_v_last"), -1)
    f16 = dict.fromkeys(("type_k", "type_v", "type_k_first", "type_k_last", "type_v_first", "type_v_last"), 1)
    assert values(model) == {
        **unset,
        **f16,
        **dict.fromkeys(("split_mode", "n_seq_max", "use_mmap", "flash_attn"), 1),
        "n_ubatch": 512,
    }
    assert values(context) == {
        **unset,
        **f16,
        **dict.fromkeys(("rope_scaling_type", "pooling_type", "attention_type"), -1),
        **dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1),
        **dict.fromkeys(("type_reduce", "n_seq_max", "offload_kqv", "flash_attn", "graph_reuse"), 1),
        **dict.fromkeys(("fused_moe_up_gate", "fused_up_gate", "fused_mmad"), 1),
        "seed": 0xFFFFFFFF,
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": 4,
        "n_threads_batch": 4,
        "max_extra_alloc": 256,
        "defrag_thold": -1,
        "mla_attn": 3,
        "min_experts": -1,
    }


def values(struct: ctypes.Structure) -> dict[str, float]:
    """The fields that are not zero, as numbers."""
    found = {}
    for name, *_ in struct._fields_:
        value = getattr(struct, name)
        if isinstance(value, int | float) and value:
            found[name] = float(value)
        else:
            assert not value, f"{name} is set"
    return found


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_is_where_the_compiler_puts_it(ik, tmp_path, struct):
    package = installed_library().parent.parent
    folders = [package / "include", package.parent / "include"]
    headers = next((f for f in folders if "repack_tensors" in header(f)), None)
    compiler = shutil.which("cc")
    if headers is None or compiler is None:
        pytest.skip("no C compiler, or another package's llama.h lies over the one of ik-llama-cpp-python")
    fields = [name for name, *_ in struct._fields_]
    kind = f"struct {struct.__name__}"
    sizes = [f"sizeof({kind})", *(f"offsetof({kind}, {field})" for field in fields)]
    source = tmp_path / "layout.c"
    lines = "".join(f'    printf("%zu\\n", {size});\n' for size in sizes)
    source.write_text(f'#include "llama.h"\nint main(void) {{\n{lines}    return 0;\n}}\n')
    program = tmp_path / "layout"
    subprocess.run([compiler, f"-I{headers}", source, "-o", program], check=True, timeout=60)
    printed = subprocess.run([program], capture_output=True, check=True, timeout=10).stdout
    assert [int(line) for line in printed.split()] == [
        ctypes.sizeof(struct),
        *(getattr(struct, field).offset for field in fields),
    ]


def header(folder: Path) -> str:
    path = folder / "llama.h"
    return path.read_text() if path.exists() else ""


def test_recurrent_models_are_refused(ik, tiny_mamba):
    with pytest.raises(EdgespecError, match=r"mamba\.gguf has recurrent layers.*use the engine llama\.cpp"):
        LlamaModel(tiny_mamba, LlamaOptions(context=64, engine=ik))


def test_contexts_of_their_own_have_the_threads_of_all(ik, tiny_llama):
    with LlamaModel(tiny_llama, LlamaOptions(context=256, sequences=2, engine=ik)) as model:
        first = model.sequence()
        model.set_threads(1, 1)
        second = model.sequence()
        assert [model._C.llama_n_threads(context) for context in model._contexts.values()] == [1, 1]
        second.close()
        assert model.sequence().id == second.id
        first.close()


def test_both_engines_decode_in_turns_in_one_process(ik, starter_path):
    def greedy(model: LlamaModel, steps: int):
        sequence, new = model.sequence(), model.vocab.tokenize("One, two, three, four,")
        for _ in range(steps):
            new = [int(sequence.forward(new)[0].argmax())]
            yield new[0]
        sequence.close()

    models = {}
    for engine in ("llama.cpp", "ik"):
        models[engine] = LlamaModel(starter_path, LlamaOptions(context=256, engine=engine))
    alone = {engine: list(greedy(model, 12)) for engine, model in models.items()}
    assert models["ik"].vocab.detokenize(alone["ik"]).startswith(" five, six, seven")
    turns = zip(*(greedy(model, 12) for model in models.values()), strict=True)
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == list(alone.values())
    assert first_difference(models["llama.cpp"].vocab, models["ik"].vocab) is None
    one, other = (model.vocab for model in models.values())
    assert one.control_texts() == other.control_texts()
    assert [one.piece(token) for token in range(one.size)] == [
        other.piece(token) for token in range(one.size)
    ]
    for model in models.values():
        model.close()
