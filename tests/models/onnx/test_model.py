"""ONNX models where models are used: answering, drafting for each other and for GGUF files, the catalogue."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny
from tiny_onnx import write_tiny_onnx
from typer.testing import CliRunner

from edgespec.app.bench.fixed_length import FixedLength
from edgespec.app.bench.measure import answered
from edgespec.app.cli import main
from edgespec.app.engine import calibration
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.core import EdgespecError
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.hub.store import installed, is_onnx, remove, resolve
from edgespec.models.onnx.model import OnnxModel, OnnxOptions
from edgespec.models.onnx.providers import CPU, Measured
from edgespec.models.prompting.grammar import GrammarCompiler
from edgespec.models.vocab import first_difference
from edgespec.sampling import Sampling


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return write_tiny_onnx(tmp_path_factory.mktemp("onnx") / "tiny-shared")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_tiny_onnx(tmp_path_factory.mktemp("onnx") / "tiny-plain", "plain", seed=8)


def written(engine: Engine, prompt: list[int], speculate: bool, sampling: Sampling) -> GenerationStats:
    """Five drafts a round, whether they pay or not."""
    engine.forget()
    fixed = partial(FixedLength, 5) if speculate else None
    return answered(engine, Request(prompt, sampling, max_tokens=60, speculate=speculate, controller=fixed))


PROMPT = [ord(c) - 33 for c in "abcabcabcabcabdabcabc"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)])
@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("shared", None), ("plain", None), ("shared", "shared"), ("shared", "plain"), ("plain", "shared"),
        ("gguf", "shared"), ("gguf", "plain"), ("shared", "gguf"),
    ],
)  # fmt: skip
def test_a_text_is_the_same_whoever_drafts(shared, plain, tiny_llama, target, draft, sampling, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    paths = {"shared": shared, "plain": plain, "gguf": tiny_llama, None: None}
    options = LlamaOptions(context=128) if target == "gguf" else OnnxOptions(context=128)
    with open_engine(paths[target], paths[draft], suffix=draft is None, options=options) as engine:
        assert (engine.draft is None) == (draft is None)
        alone = written(engine, PROMPT, False, sampling)
        fast = written(engine, PROMPT, True, sampling)
    assert alone.drafted == 0
    assert fast.drafted > 0
    assert fast.tokens == alone.tokens
    if (target, draft) == ("shared", "shared") and sampling.temperature == 0:
        assert fast.accepted == fast.drafted  # it knows what it would say


def test_several_texts_at_once_each_in_a_cache_of_its_own(shared):
    with open_engine(shared, parallel=3, options=OnnxOptions(context=128)) as engine:
        assert engine.context_length == 128
        prompts = [[*PROMPT, i] for i in range(3)]
        alone = [written(engine, prompt, False, Sampling()).tokens for prompt in prompts]
        engine.forget()
        free = list(engine.pool.slots)
        running = []
        for prompt in prompts:
            running.append(engine.begin(Request(prompt, Sampling(), max_tokens=60), free))
            free.remove(running[-1].slot)
        while going := [one for one in running if not one.over]:
            engine.step(going)
        for one in running:
            engine.finish(one)
        assert [one.stats.tokens for one in running] == alone


@pytest.mark.parametrize(("target", "draft"), [("onnx", "gguf"), ("gguf", "onnx")])
def test_draft_and_target_have_room_for_the_same_texts(shared, tiny_llama, target, draft, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    paths = {"onnx": shared, "gguf": tiny_llama}
    options = OnnxOptions(context=256) if target == "onnx" else LlamaOptions(context=256)
    with open_engine(paths[target], paths[draft], parallel=2, options=options) as engine:
        assert engine.context_length == 256
        assert engine.draft.context_length == 256
        assert engine.draft.options.sequences == 2


def test_a_draft_of_another_vocabulary_is_refused(tmp_path, shared, tiny_llama, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    other = write_tiny_onnx(tmp_path / "other", replaced=(65, "Zebra"))
    larger = write_tiny_onnx(tmp_path / "larger", extra=3)
    message = r"other cannot draft for .* \(token 65 is '.' in the target, 'Zebra' in the draft\)"
    for target, options in ((shared, OnnxOptions(128)), (tiny_llama, LlamaOptions(128))):
        with pytest.raises(EdgespecError, match=message):
            open_engine(target, other, options=options)
    with pytest.raises(EdgespecError, match="the target has 257 tokens and the draft 260"):
        open_engine(shared, larger, options=OnnxOptions(128))


@pytest.mark.usefixtures("_own_cache")
def test_vocabularies_are_compared_token_by_token_once(shared, tiny_llama, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    open_engine(tiny_llama, shared, options=LlamaOptions(128)).close()
    monkeypatch.setattr(
        "edgespec.app.engine.assembly.first_difference", lambda *_: pytest.fail("compared again")
    )
    open_engine(tiny_llama, shared, options=LlamaOptions(128)).close()


def test_padding_does_not_keep_vocabularies_apart(tmp_path, tiny_llama):
    """A graph may know more tokens than its tokenizer, and a GGUF names the rest as unused."""
    folder = write_tiny_onnx(tmp_path / "padded", extra=3)
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"] = {t: i for t, i in settings["model"]["vocab"].items() if i < 257}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with OnnxModel(folder) as onnx, LlamaModel(tiny_llama, LlamaOptions(64)) as gguf:
        assert onnx.vocab.size == 260
        assert first_difference(gguf.vocab, onnx.vocab) is None
        assert onnx.vocab.is_control(259)
        assert onnx.vocab.piece(259) == b""


def test_tokens_that_steer_are_never_typed(tmp_path):
    """tokenizer.json marks only some of them as special."""
    folder = write_tiny_onnx(tmp_path / "tiny", extra=1)
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["added_tokens"].append(
        {**settings["added_tokens"][0], "id": 257, "content": "<|fim_pad|>", "special": False}
    )
    settings["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    del settings["model"]["vocab"]["<extra0>"]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with OnnxModel(folder) as model:
        vocab = model.vocab
        assert vocab.tokenize("<|fim_pad|>", special=True) == [257]
        assert vocab.is_end(257)
        assert vocab.piece(257) == b""
        assert len(vocab.tokenize("<|fim_pad|>")) == 11  # and nothing is cut off
        assert vocab.tokenize("a") == vocab.tokenize("a", special=True)


def test_a_grammar_is_kept_to(shared):
    with open_engine(shared, options=OnnxOptions(context=128)) as engine:
        grammar = GrammarCompiler(engine.model.vocab).compile("regex", "[a-c]{5}[0-9]{3}")
        request = Request(PROMPT, Sampling(), max_tokens=60, constraint=grammar.start)
        text = answered(engine, request).text
    assert len(text) == 8
    assert set(text[:5]) <= set("abc")
    assert text[5:].isdigit()


def test_its_own_chat_template_is_used_and_content_stays_text(shared):
    with open_engine(shared, options=OnnxOptions(context=128)) as engine:
        prompt = engine.chat_prompt([{"role": "user", "content": "hi <|end|>"}])
        assert engine.model.vocab.detokenize(prompt) == "<user>hi <|end|>\n<assistant>"
        assert engine.model.vocab.eos not in prompt


@pytest.mark.parametrize("kind", ["string", "list", "none"])
def test_templates_in_the_tokenizers_settings(tmp_path, kind):
    folder = write_tiny_onnx(tmp_path / "tiny")
    (folder / "chat_template.jinja").unlink()
    template = {
        "string": "A",
        "list": [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}],
        "none": None,
    }[kind]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with OnnxModel(folder) as model:
        assert model.chat_template == (None if kind == "none" else "A")


def test_folders_in_the_models_folder_are_known_by_name(tmp_path, monkeypatch, shared):
    models = tmp_path / "models"
    monkeypatch.setenv("EDGESPEC_MODELS", str(models))
    folder = write_tiny_onnx(models / "tiny-int4")
    (models / "empty").mkdir()
    write_tiny(models / "some.gguf", "llama")
    assert resolve("tiny-int4") == folder
    assert resolve(str(shared)) == shared
    others = {one.path: one.bytes for one in installed()}
    assert list(others) == [models / "some.gguf", folder]
    assert others[folder] == sum(file.stat().st_size for file in folder.iterdir())
    result = CliRunner().invoke(main.app, ["models"])
    assert "tiny-int4" in result.output
    with pytest.raises(EdgespecError, match="not a model"):
        remove("empty")
    assert remove("tiny-int4") == others[folder]
    assert not is_onnx(folder)


def test_run_answers_from_a_folder(shared):
    arguments = ["run", "-m", str(shared), "--max-tokens", "5", "--context", "64", "--raw", "abc"]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout
    result = CliRunner().invoke(main.app, [*arguments, "--engine", "ik"])
    assert result.exit_code != 0


def test_a_damaged_folder_is_one_line(tmp_path):
    folder = write_tiny_onnx(tmp_path / "tiny")
    (folder / "model.onnx").write_bytes(b"\x08")
    result = CliRunner().invoke(main.app, ["run", "-m", str(folder), "abc"])
    assert result.exit_code != 0
    assert isinstance(result.exception, EdgespecError | SystemExit)


@pytest.mark.usefixtures("_own_cache")
def test_tune_times_every_provider_and_doctor_tells(shared, monkeypatch):
    monkeypatch.setattr("edgespec.app.cli.tune._busy", lambda: "")
    result = CliRunner().invoke(main.app, ["tune", str(shared), "--quick", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["providers"]["CPU"] == "used"
    assert set(report["ms"]) == {"onnxruntime CPU"}
    assert set(report["ms"]["onnxruntime CPU"]) == {"1", "2", "4", "8", "16"}
    with OnnxModel(shared) as model:
        known = calibration.provider_figures(model.summary)
        assert set(known.seconds) == {CPU}
        calibration.keep_providers(model.summary, Measured({CPU: 1.0}, {"QNNExecutionProvider": "no driver"}))
    monkeypatch.setattr("edgespec.models.onnx.providers.offered", lambda: ["QNNExecutionProvider", CPU])
    monkeypatch.setattr("edgespec.app.engine.calibration.offered", lambda: [CPU])
    result = CliRunner().invoke(main.app, ["doctor", "-m", str(shared), "--json"])
    listed = json.loads(result.stdout)["onnx"]
    assert listed["QNN"] == "not used: no driver"
    assert listed["CPU"] == "used"
    assert listed["CoreML"].startswith("not available")


@pytest.mark.usefixtures("_own_cache")
def test_a_measured_provider_is_where_it_runs(shared, monkeypatch):
    from edgespec.app.engine.loading import EngineSpec, load_engine
    from edgespec.models.onnx.check import check_onnx

    monkeypatch.setattr("edgespec.app.engine.calibration.offered", lambda: ["CoreMLExecutionProvider", CPU])
    found = Measured({CPU: 1.0, "CoreMLExecutionProvider": 0.5})
    calibration.keep_providers(check_onnx(shared), found)
    with load_engine(EngineSpec(str(shared), "suffix", 7, context=64)) as engine:
        assert engine.model.provider == CPU  # it is not in this onnxruntime, which is said
        assert any("CoreML is not used" in note for note in engine.notes)


def test_an_onnx_draft_is_a_form_that_tuning_may_choose(tmp_path, tiny_llama, monkeypatch):
    """Beside the GGUF draft it is named after; without tuning the GGUF stays the draft."""
    from edgespec.app.engine.loading import form_of
    from edgespec.quant.tune import onnx_forms, tune

    source = tmp_path / "small.gguf"
    source.write_bytes(tiny_llama.read_bytes())
    folder = write_tiny_onnx(tmp_path / "small-int4")
    write_tiny_onnx(tmp_path / "smaller-int4")
    assert onnx_forms(source) == [folder]
    assert form_of(source, "") == source
    assert form_of(source, "small-int4") == folder
    report = tune(tiny_llama, source, quick=True)
    assert [form.path for form in report.forms] == [source, folder]
    assert all(form.seconds for form in report.forms)


def test_the_partner_of_a_folder_is_the_folder_of_its_draft(tmp_path, monkeypatch):
    from edgespec.app.engine.loading import partner

    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path))
    target = write_tiny_onnx(tmp_path / "qwen2.5-coder-1.5b-int4")
    assert partner(target.name) is None
    (tmp_path / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").write_bytes(b"GGUF")
    assert partner(target.name) == tmp_path / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    assert partner("qwen2.5-coder-1.5b") == tmp_path / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    other = write_tiny_onnx(tmp_path / "qwen2.5-coder-0.5b-a")
    assert partner(target.name) == other
    alike = write_tiny_onnx(tmp_path / "qwen2.5-coder-0.5b-int4")
    assert partner(target.name) == partner(str(target)) == alike
    assert partner(str(other)) is None
    assert partner("qwen2.5-coder-1.5b") == tmp_path / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def test_no_thread_is_busy_once_a_pass_has_ended(shared):
    """onnxruntime's own way is to look for work for a while: cores that another model or program wants."""
    with OnnxModel(shared, OnnxOptions(context=128, threads=2)) as model:
        sequence = model.sequence()
        used = 0.0
        for token in range(20):
            sequence.forward([token] * 4)
            before = time.process_time()
            time.sleep(0.01)
            used += time.process_time() - before
    assert used < 0.05


def test_memory_goes_with_the_model(shared):
    model = OnnxModel(shared)
    sequence = model.sequence()
    sequence.forward([1, 2])
    model.close()
    assert sequence._now == []


# --- exported models ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_export_has_the_vocabulary_of_its_source(exported, name, bits):
    with (
        OnnxModel(exported(f"{name}-int{bits}")) as onnx,
        LlamaModel(resolve(name), LlamaOptions(64)) as gguf,
    ):
        assert first_difference(gguf.vocab, onnx.vocab) is None
        for text in (
            "naïve café 日本語 🦊\t x\n\n  y 12345",
            "<|im_end|>hi<|fim_pad|>",
            "def f(x):\n    return x\n",
        ):
            for special in (False, True):
                assert onnx.vocab.tokenize(text, special=special) == gguf.vocab.tokenize(
                    text, special=special
                )
        row = onnx.sequence().forward(onnx.vocab.tokenize("The capital of France is"))[0]
        assert np.isfinite(row).all()
