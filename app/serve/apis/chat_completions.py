"""Chat and text completions, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.completions import Finished, ResponseStream
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import (
    ChatChunks,
    chat_body,
    chat_choice,
    completion_body,
    completion_choice,
    completion_logprobs,
    finish_reason,
    new_id,
    usage,
)
from edgespec.app.serve.apis.errors import error_body
from edgespec.app.serve.apis.schemas import ChatRequest, CompletionRequest
from edgespec.app.serve.apis.streaming import (
    Json,
    Served,
    Stream,
    collect,
    event,
    failure,
    unless_gone,
)
from edgespec.models.prompting.tool_calls import TextPiece


async def chat(served: Served, body: ChatRequest, request: Request) -> Response:
    served.check_model(body.model)
    jobs = await served.jobs(lambda: [body.ask()], request)
    (answer,) = served.submit(jobs, request)
    service, logprobs = served.service, bool(body.logprobs)
    if body.stream:
        include = body.stream_options is not None and body.stream_options.include_usage
        return Stream(
            _chat_events(answer, ChatChunks(service, body.model, logprobs, include), include), [answer]
        )
    with answer:
        texts, results = await unless_gone(request, collect(answer))
    choices = [
        chat_choice(service, i, text, result, logprobs)
        for i, (text, result) in enumerate(zip(texts, results, strict=True))
    ]
    return Json(chat_body(new_id("chatcmpl-"), body.model, choices, results))


async def _chat_events(
    answer: ResponseStream, chunks: ChatChunks, include_usage: bool
) -> AsyncIterator[bytes]:
    results: list[GenerationStats] = []
    for index in range(answer.job.ask.count):
        yield event(chunks.begin(index))
    async for news in answer:
        if not isinstance(news, Finished):
            for chunk in chunks.part(news):
                yield event(chunk)
        elif (error := failure(news)) is not None:
            yield event(error_body(error, ""))
            return
        else:
            results.append(news.result)
            yield event(chunks.end(news.index, news.result))
    if include_usage:
        yield event(chunks.usage(results))
    yield event("[DONE]")


async def complete(served: Served, body: CompletionRequest, request: Request) -> Response:
    served.check_model(body.model)
    jobs = await served.jobs(body.asks, request)
    answers = served.submit(jobs, request)
    if body.stream:
        return Stream(_completion_events(served, body, answers), answers)
    choices: list[dict[str, Any]] = []
    groups: list[list[GenerationStats]] = []
    try:
        for answer in answers:
            texts, results = await unless_gone(request, collect(answer))
            groups.append(results)
            for text, result in zip(texts, results, strict=True):
                told = (
                    completion_logprobs(served.service, text.tokens, text.logprobs)
                    if body.logprobs is not None
                    else None
                )
                finish = finish_reason(result, False)
                choices.append(completion_choice(len(choices), text.text, finish, told))
    finally:
        for answer in answers:
            answer.close()
    return Json({**completion_body(new_id("cmpl-"), body.model, choices), "usage": _total(groups)})


async def _completion_events(
    served: Served, body: CompletionRequest, answers: list[ResponseStream]
) -> AsyncIterator[bytes]:
    id_, groups = new_id("cmpl-"), list[list[GenerationStats]]()
    include = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choice: dict[str, Any]) -> bytes:
        head = completion_body(id_, body.model, [choice])
        return event({**head, "usage": None} if include else head)

    for number, answer in enumerate(answers):
        first = number * answer.job.ask.count
        written = [0] * answer.job.ask.count
        results: list[GenerationStats] = []
        groups.append(results)
        async for news in answer:
            if not isinstance(news, Finished):
                text = "".join(one.text for one in news.events if isinstance(one, TextPiece))
                told = None
                if body.logprobs is not None:
                    at = written[news.index]
                    told = completion_logprobs(served.service, news.tokens, news.logprobs, at)
                written[news.index] += len(text)
                yield chunk(completion_choice(first + news.index, text, None, told))
            elif (error := failure(news)) is not None:
                yield event(error_body(error, ""))
                return
            else:
                results.append(news.result)
                yield chunk(completion_choice(first + news.index, "", finish_reason(news.result, False)))
    if include:
        yield event({**completion_body(id_, body.model, []), "usage": _total(groups)})
    yield event("[DONE]")


def _total(groups: list[list[GenerationStats]]) -> dict[str, Any]:
    """The usage of several prompts: each is counted once."""
    total = usage([one for group in groups for one in group])
    total["prompt_tokens"] = sum(max(one.prompt_tokens for one in group) for group in groups if group)
    total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
    return total
