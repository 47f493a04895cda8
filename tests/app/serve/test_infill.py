"""llama.cpp's endpoints, filling in the middle, echo, paths, and endpoints that no model serves."""

from __future__ import annotations

from typing import Any

import pytest
from asgi import fetch
from fake_service import MODEL, FakeScheduler, fake_app

from edgespec.app.serve.paths import spelled_out

PREFIX, SUFFIX, MIDDLE, FILE = 1, 2, 3, 4  # bytes that no text here has
KEYS = {
    f"tokenizer.ggml.fim_{name}_token_id": token
    for name, token in (("pre", PREFIX), ("suf", SUFFIX), ("mid", MIDDLE), ("sep", FILE))
}


def filling(*script: Any, **options: Any) -> FakeScheduler:
    """A scheduler whose model has the tokens to fill in the middle."""
    scheduler = FakeScheduler(script or ("mid", "dle"), **options)
    scheduler.engine.model.metadata = KEYS
    return scheduler


def written(scheduler: FakeScheduler) -> bytes:
    """The prompt of the last request."""
    vocab = scheduler.engine.model.vocab
    return b"".join(vocab.piece(token) for token in scheduler.requests[-1].prompt)


async def test_infill() -> None:
    scheduler = filling()
    body = {"input_prefix": "be", "prompt": "fore", "input_suffix": "after", "id_slot": 0, "samplers": ["x"]}
    with fake_app(scheduler, strict=True) as app:
        answer = (await fetch(app, "/infill", body | {"n_predict": 9, "model": ""})).json()
        events = (await fetch(app, "/infill", body | {"stream": True})).events()
    assert written(scheduler) == b"\1before\2after\3"
    assert scheduler.requests[0].max_tokens == 9
    assert (answer["content"], answer["stop_type"], answer["model"]) == ("middle", "eos", MODEL)
    assert answer["timings"]["prompt_n"] == answer["tokens_evaluated"] - answer["timings"]["cache_n"]
    assert [data["content"] for _, data in events] == ["mid", "dle", ""]
    assert [data["stop"] for _, data in events] == [False, False, True]


async def test_other_files_come_first_and_the_last_ones_are_kept() -> None:
    scheduler = filling(context=120)
    extra = [
        {"filename": f"f{i}", "text": text, "time": [1]} for i, text in enumerate(("x" * 90, "one", "two"))
    ]
    with fake_app(scheduler, strict=True) as app:
        await fetch(app, "/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": extra})
    assert written(scheduler) == b"\4f1\none\4f2\ntwo\4current\n\1a\2b\3"


async def test_what_does_not_fit_is_left_out_far_from_the_gap() -> None:
    scheduler = filling(context=80)
    with fake_app(scheduler) as app:
        body = {"input_prefix": "x" * 500 + "P", "input_suffix": "S" + "y" * 500, "n_predict": 10}
        assert (await fetch(app, "/infill", body)).status == 200
    prompt = written(scheduler)
    assert len(prompt) <= 70
    assert b"xxP\2Syy" in prompt
    assert prompt.endswith(b"y\3")


async def test_only_the_fields_that_are_asked_for() -> None:
    with fake_app(filling()) as app:
        fields = ["content", "timings/prompt_n", "truncated", "nothing", ""]
        answer = (await fetch(app, "/infill", {"response_fields": fields})).json()
        ahead = (await fetch(app, "/infill", {"n_predict": 0, "response_fields": [""]})).json()
        silent = (await fetch(app, "/infill", {"n_predict": 0})).json()
    assert set(answer) == {"content", "timings/prompt_n", "truncated"}
    assert ahead == {}
    assert (silent["content"], silent["tokens_predicted"]) == ("", 0)


async def test_a_limit_of_time_ends_with_a_line() -> None:
    scheduler = filling("ab", "\n", "cd", endless=True)
    with fake_app(scheduler) as app:
        answer = (await fetch(app, "/infill", {"t_max_predict_ms": 20})).json()
    assert answer["content"].endswith("ab")
    assert answer["stop_type"] == "limit"
    assert scheduler.requests[0].cancelled


async def test_a_suffix_in_text_completions() -> None:
    scheduler = filling()
    with fake_app(scheduler) as app:
        answer = (await fetch(app, "/v1/completions", {"prompt": "a", "suffix": "b"})).json()
        assert written(scheduler) == b"\1a\2b\3"
        assert answer["choices"][0]["text"] == "middle"
        await fetch(app, "/v1/completions", {"prompt": "a", "suffix": ""})
        assert written(scheduler) == b"a"
    with fake_app(FakeScheduler()) as app:
        refused = await fetch(app, "/v1/completions", {"prompt": "a", "suffix": "b"})
    assert (refused.status, "fill in the middle" in refused.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
async def test_marks_in_a_raw_prompt(path: str) -> None:
    scheduler = filling()
    vocab = scheduler.engine.model.vocab
    names = {PREFIX: "<PRE>", SUFFIX: "<SUF>", MIDDLE: "<MID>", FILE: "<SEP>"}
    text = vocab.text
    vocab.text = lambda token: names.get(token) or text(token)
    with fake_app(scheduler) as app:
        await fetch(app, path, {"prompt": "<SEP>f\n<PRE>a<SUF>b<|end|><MID>"})
        assert written(scheduler) == b"\4f\n\1a\2b<|end|>\3"
        await fetch(app, path, {"prompt": "<PRE>a<SUF>b"})
        assert written(scheduler) == b"<PRE>a<SUF>b"


async def test_native_completions() -> None:
    scheduler = FakeScheduler(["hello", " world", "stop"])
    body = {"prompt": "a", "n_predict": 5, "stop": ["x"], "temperature": 0.0, "cache_prompt": True}
    with fake_app(scheduler, strict=True) as app:
        answer = (await fetch(app, "/completion", body)).json()
        unbounded = await fetch(app, "/completion", {"prompt": [97], "n_predict": -1})
        empty = await fetch(app, "/completion", {"prompt": ""})
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == (
        "hello world",
        "word",
        "<stop>",
    )
    assert (unbounded.status, empty.status) == (200, 400)
    assert [one.max_tokens for one in scheduler.requests] == [5, 0]


async def test_echo() -> None:
    with fake_app(FakeScheduler(["hello"])) as app:
        body = {"prompt": ["a", "b"], "echo": True, "n": 2}
        whole = (await fetch(app, "/v1/completions", body)).json()
        events = (await fetch(app, "/v1/completions", body | {"stream": True})).events()
        refused = await fetch(app, "/v1/completions", body | {"logprobs": 1})
    assert [one["text"] for one in whole["choices"]] == ["ahello", "ahello", "bhello", "bhello"]
    texts = dict.fromkeys(range(4), "")
    for _, event in events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert list(texts.values()) == ["ahello", "ahello", "bhello", "bhello"]
    assert "echo" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/v1/rerank", "/rerank", "/reranking"])
async def test_what_the_model_does_not_give_is_a_clear_error(path: str) -> None:
    with fake_app(FakeScheduler(), strict=True) as app:
        answer = await fetch(app, path, {"model": MODEL, "input": "x", "query": "x", "documents": []})
        other = await fetch(app, path, {"model": "gpt"})
    assert answer.status == 400
    assert f"The model '{MODEL}' gives no" in answer.json()["error"]["message"]
    assert other.status == 404


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/models/", "/v1/models"),
        ("/models/a/b", "/v1/models/a/b"),
        ("/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/v1/health", "/health"),
        ("/", "/"),
        ("//", "/"),
        ("/completion", "/completion"),
        ("/other/", "/other"),
    ],
)
def test_paths(path: str, meant: str) -> None:
    assert spelled_out(path) == meant


async def test_short_paths_are_checked_and_counted_as_the_long_ones() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    with fake_app(FakeScheduler()) as app:
        chat = await fetch(app, "/chat/completions", body)
        wrong = await fetch(app, "/messages", body | {"max_tokens": 0})
        outside = await fetch(app, "/chat/completions", body, client=("127.0.0.1", 5))
        metrics = (await fetch(app, "/metrics")).body.decode()
    assert (chat.status, wrong.json()["type"], outside.status) == (200, "error", 401)
    assert 'edgespec_requests_total{path="/v1/chat/completions",status="200"} 1.0' in metrics


async def test_a_body_without_a_type_is_json() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    with fake_app(FakeScheduler()) as app:
        plain = await fetch(app, "/v1/chat/completions", body, headers={"content-type": None})
        other = await fetch(app, "/v1/chat/completions", body, headers={"content-type": "text/plain"})
        head = await fetch(app, "/", method="HEAD")
    assert (plain.status, other.status, head.status) == (200, 415, 200)
