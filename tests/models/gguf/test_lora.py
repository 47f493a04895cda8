"""LoRA adapters: the logits of merged weights, and one line for each file that does not fit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny
from tiny_attention import write_gemma3, write_qwen3moe
from tiny_hybrids import write_falcon_h1, write_qwen35
from tiny_lora import RANK, write_lora

from edgespec.core import EdgespecError
from edgespec.models.gguf.backends import cost_key
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.lora import Adapter, check_adapters, parse_adapter
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.mtp import MtpModel
from edgespec.models.state import load_state, save_state, state_key

OPTIONS = LlamaOptions(context=256, sequences=2, threads=1, type_k="f32", type_v="f32", flash_attention=False)
WRITERS = {
    "gemma3": write_gemma3, "qwen3moe": write_qwen3moe, "falcon-h1": write_falcon_h1,
    "llama": lambda path: write_tiny(path, "llama"),
}  # fmt: skip
TEXT = np.random.default_rng(1).integers(0, 256, 60).tolist()


@pytest.fixture(params=list(WRITERS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "model.gguf")


def logits(path: Path, *adapters: Adapter, rows: int = 4) -> np.ndarray:
    with LlamaModel(path, replace(OPTIONS, adapters=adapters)) as model:
        return model.sequence().forward(TEXT, rows).copy()


def merged(path: Path, adapter: Path, scale: float, out: Path) -> Path:
    """A copy of the model to whose weights the adapter was added."""
    out.write_bytes(path.read_bytes())
    target, pieces = check_gguf(path).tensors, {}
    with adapter.open("rb") as file:
        from gguf import GGUFReader

        for tensor in GGUFReader(file.name).tensors:
            pieces[tensor.name] = np.array(tensor.data)
    for name, tensor in target.items():
        if f"{name}.lora_a" in pieces:
            a, b = pieces[f"{name}.lora_a"], pieces[f"{name}.lora_b"]
            delta = a @ b.T if name == "token_embd.weight" else b @ a
            weights = np.memmap(out, np.float32, "r+", tensor.offset, tensor.shape[::-1])
            weights += scale * 8.0 / RANK * delta
            weights.flush()
    return out


def test_the_logits_are_those_of_merged_weights(model, tmp_path):
    names = [name for name, one in check_gguf(model).tensors.items() if len(one.shape) == 3]
    for number, bases in enumerate([(), names] if names else [()]):
        adapter = write_lora(tmp_path / f"{number}.gguf", model, *bases)
        found = logits(model, Adapter(adapter, 0.5))
        np.testing.assert_allclose(
            found, logits(merged(model, adapter, 0.5, tmp_path / "merged.gguf")), atol=2e-3
        )
        assert np.abs(found - logits(model)).max() > 0.1


def test_two_adapters_add_up_and_their_order_is_nothing(tmp_path):
    model = write_qwen3moe(tmp_path / "model.gguf")
    one = write_lora(tmp_path / "1.gguf", model, "token_embd.weight", "output.weight", dtype=np.float16)
    two = write_lora(tmp_path / "2.gguf", model, "blk.1.attn_q.weight", seed=8)
    both = merged(merged(model, one, 1.0, tmp_path / "m1.gguf"), two, -0.7, tmp_path / "m2.gguf")
    found = logits(model, Adapter(one), Adapter(two, -0.7))
    np.testing.assert_allclose(found, logits(both), atol=0.02)
    np.testing.assert_array_equal(found, logits(model, Adapter(two, -0.7), Adapter(one)))


def test_scale_0_is_the_model_without(model, tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", model)
    np.testing.assert_array_equal(logits(model, Adapter(adapter, 0.0)), logits(model))


def test_every_context_has_the_adapter_and_rollback_keeps_it(model, tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", model)
    with LlamaModel(model, replace(OPTIONS, adapters=(Adapter(adapter),))) as loaded:
        one, two = loaded.sequence(), loaded.sequence()
        expected = one.forward(TEXT)[0].copy()
        two.forward([*TEXT[:50], 1, 2, 3, 4], 5)
        two.rollback(50)
        last = two.forward(TEXT[len(two.tokens) :])[0]
        np.testing.assert_allclose(last, expected, atol=1e-3)


def test_states_and_costs_are_kept_apart(model, tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", model)
    other = write_lora(tmp_path / "b.gguf", model, seed=8)
    kinds = [(), (Adapter(adapter),), (Adapter(adapter, 0.5),), (Adapter(other),)]
    assert len({cost_key(replace(OPTIONS, adapters=one)) for one in kinds}) == 4
    keys, saved = set(), tmp_path / "state"
    for adapters in kinds:
        with LlamaModel(model, replace(OPTIONS, adapters=adapters)) as loaded:
            sequence = loaded.sequence()
            keys.add(state_key(sequence))
            assert not load_state(sequence, saved)
            sequence.forward(TEXT)
            assert save_state(sequence, saved)
    assert len(keys) == 4


def test_a_prediction_layer_stays_as_it_is(tmp_path):
    model = write_qwen35(tmp_path / "model.gguf", heads=1)
    adapter = write_lora(tmp_path / "a.gguf", model)
    options = replace(OPTIONS, sequences=1, mtp=True, adapters=(Adapter(adapter),))
    with LlamaModel(model, options) as target, MtpModel(model, target) as head:
        assert head.options.adapters == ()
        sequence = target.sequence()
        drafting = head.sequence_for(sequence)
        sequence.forward(TEXT)
        assert np.isfinite(drafting.forward(TEXT[:20])).all()


WRONG = {
    "a model": ({"general.type": "model"}, "", "is not a LoRA adapter"),
    "a type that is a number": ({"general.type": 3}, "", "is not a LoRA adapter"),
    "another kind": ({"adapter.type": "ia3"}, "", "is not a LoRA adapter"),
    "another architecture": (
        {"general.architecture": "qwen2"},
        "",
        "is for qwen2 models.*is of qwen3moe",
    ),
    "an infinite alpha": ({"adapter.lora.alpha": float("inf")}, "", "alpha.*not a finite float32"),
    "an alpha that is a number": ({"adapter.lora.alpha": 8}, "", "alpha.*not a finite float32"),
    "an activated one": ({"adapter.alora.invocation_tokens": [1, 2]}, "", "activated LoRA"),
    "half a pair": ({}, "blk.0.attn_q.weight.lora_b", "pair.*one is missing"),
}
SHAPES = {
    "another width": {"blk.0.attn_q.weight.lora_a": (RANK, 32)},
    "another height": {"blk.0.attn_q.weight.lora_b": (32, RANK)},
    "two ranks": {"blk.0.attn_q.weight.lora_b": (64, 2 * RANK)},
    "a pile of matrices": {"blk.0.attn_q.weight.lora_a": (2, RANK, 64)},
    "too many experts": {"blk.0.ffn_up_exps.weight.lora_a": (16, RANK, 64)},
    "one matrix for all experts": {
        "blk.0.ffn_up_exps.weight.lora_a": (RANK, 64), "blk.0.ffn_up_exps.weight.lora_b": (32, RANK)
    },
}  # fmt: skip
BASES = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def refused(model: Path, adapter: Path, match: str) -> None:
    """The file is refused in one line that names it, before llama.cpp opens it."""
    with pytest.raises(EdgespecError, match=rf"{adapter.name}.*{match}") as error:
        check_adapters((Adapter(adapter),), check_gguf(model), model.name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_adapters_for_the_model(case, tmp_path):
    keys, without, match = WRONG[case]
    model = write_qwen3moe(tmp_path / "model.gguf")
    refused(model, write_lora(tmp_path / "a.gguf", model, *BASES, keys=keys, without=without), match)


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_fit(case, tmp_path):
    model = write_qwen3moe(tmp_path / "model.gguf")
    refused(
        model, write_lora(tmp_path / "a.gguf", model, *BASES, shapes=SHAPES[case]), "shapes .* do not fit"
    )


def test_matrices_that_llamacpp_would_not_change(tmp_path):
    model = write_falcon_h1(tmp_path / "model.gguf")
    for base, match in (
        ("blk.0.ssm_conv1d.weight", "applies no adapter"),
        ("blk.0.ssm_a", "applies no adapter"),
        ("blk.7.attn_q.weight", r"changes 'blk\.7\.attn_q\.weight', which model\.gguf does not have"),
        ("blk.0.ffn_up.bias", "does not have"),
        ("token_embd.weight", "changes the embeddings, which are the output head"),  # it would abort
    ):
        refused(model, write_lora(tmp_path / "a.gguf", model, base), match)


def test_a_model_is_no_adapter_and_one_adapter_is_given_once(tmp_path):
    model = write_qwen3moe(tmp_path / "model.gguf")
    refused(model, model, "is not a LoRA adapter")
    adapter = write_lora(tmp_path / "a.gguf", model)
    with pytest.raises(EdgespecError, match="given twice"):
        check_adapters((Adapter(adapter), Adapter(adapter, 2.0)), check_gguf(model), "m")


def test_truncated_and_damaged_files(tmp_path):
    model = write_qwen3moe(tmp_path / "model.gguf")
    whole = write_lora(tmp_path / "whole.gguf", model, "blk.0.attn_q.weight").read_bytes()
    adapter, summary = tmp_path / "a.gguf", check_gguf(model)
    refused(model, adapter, "does not exist")
    for size in [*range(0, len(whole), 13), len(whole) - 64]:
        adapter.write_bytes(whole[:size])
        refused(model, adapter, "")
    random = np.random.default_rng(3)
    for _ in range(300):  # any other error fails
        damaged = bytearray(whole)
        damaged[int(random.integers(0, 600))] = int(random.integers(0, 256))
        adapter.write_bytes(damaged)
        with suppress(EdgespecError):
            check_adapters((Adapter(adapter),), summary, "m")


def test_the_model_refuses_before_it_is_loaded(tmp_path, monkeypatch):
    model = write_qwen3moe(tmp_path / "model.gguf")
    adapter = write_lora(tmp_path / "a.gguf", model, keys={"general.architecture": "llama"})
    monkeypatch.setattr(LlamaModel, "_load", None)
    with pytest.raises(EdgespecError, match="is for llama models"):
        LlamaModel(model, replace(OPTIONS, adapters=(Adapter(adapter),)))


def test_ik_has_no_adapters(ik, tiny_llama, tmp_path):
    adapter = write_lora(tmp_path / "a.gguf", tiny_llama)
    with pytest.raises(EdgespecError, match=r"ik cannot load LoRA adapters: use the engine llama\.cpp"):
        LlamaModel(tiny_llama, LlamaOptions(context=64, engine="ik", adapters=(Adapter(adapter),)))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.gguf", "a.gguf", 1.0),
        ("a.gguf:0.5", "a.gguf", 0.5),
        ("a.gguf:-2", "a.gguf", -2.0),
        ("b:c/a.gguf:0", "b:c/a.gguf", 0.0),
        ("b:c/a.gguf", "b:c/a.gguf", 1.0),
        (":2", ":2", 1.0),
    ],
)
def test_how_adapters_are_named(text, path, scale):
    assert parse_adapter(text) == Adapter(Path(path), scale)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e999"])
def test_scales_that_are_no_numbers(scale):
    with pytest.raises(EdgespecError, match="invalid scale"):
        parse_adapter(f"a.gguf:{scale}")
