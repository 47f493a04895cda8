"""`edgespec mcp`: the model as tools of the Model Context Protocol, on standard input and output.

The client is answered at once; the first call waits until the model is loaded.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

import edgespec
from edgespec.app.engine.completions import CompletionService, Finished, GenerationRequest
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Collected
from edgespec.core import EdgespecError
from edgespec.sampling import Sampling

_EXTRACT = "Extract what is asked for from the text. Answer with JSON only."

McpMaxTokens = Annotated[int, Field(ge=1, le=100_000, description="Most tokens to write.")]
McpTemperature = Annotated[float, Field(ge=0, le=2, description="0 takes the likeliest words.")]
McpStop = Annotated[list[str] | None, Field(max_length=16, description="Texts before which the answer ends.")]


class McpMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


def make_mcp(service: Callable[[], Awaitable[CompletionService]], model: str) -> MCPServer[Any]:
    """The server. `desk` gives the loaded model, or raises EdgespecError."""
    server: MCPServer[Any] = MCPServer(
        "edgespec",
        version=edgespec.__version__,
        instructions=f"A language model on this machine ({model}): private, free of charge, and small. "
        "Hand it short, well described work.",
        log_level="WARNING",
    )

    async def answer(ask: GenerationRequest) -> tuple[str, GenerationStats]:
        try:
            there = await service()
            job = await there.prepare(ask)
            text = Collected()
            with there.submit(
                job, "mcp"
            ) as parts:  # a call that is cancelled leaves it, and so ends the answer
                async for news in parts:
                    if not isinstance(news, Finished):
                        text.add(news)
                    elif news.error is not None:
                        raise news.error
                    else:
                        return text.text, news.result
        except EdgespecError as error:
            raise ToolError(str(error)) from None
        raise ToolError("The server is stopping.")

    def wanted(max_tokens: int, temperature: float, stop: list[str] | None = None) -> dict[str, Any]:
        if not all(stop or []):
            raise ToolError("stop holds an empty text, which would end every answer at once.")
        return {"sampling": Sampling(temperature), "max_tokens": max_tokens, "stops": stop or []}

    @server.tool()
    async def generate(
        prompt: Annotated[str, Field(min_length=1, description="What to do, and all that is needed for it.")],
        system: Annotated[str, Field(description="How to do it.")] = "",
        max_tokens: McpMaxTokens = 512,
        temperature: McpTemperature = 0.0,
        stop: McpStop = None,
    ) -> str:
        """Let the local model answer one prompt."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        text, _ = await answer(GenerationRequest(messages, **wanted(max_tokens, temperature, stop)))
        return text

    @server.tool()
    async def chat(
        messages: Annotated[list[McpMessage], Field(min_length=1, max_length=1000)],
        max_tokens: McpMaxTokens = 512,
        temperature: McpTemperature = 0.0,
        stop: McpStop = None,
    ) -> str:
        """Let the local model go on with a conversation."""
        told = [message.model_dump() for message in messages]
        text, _ = await answer(GenerationRequest(told, **wanted(max_tokens, temperature, stop)))
        return text

    @server.tool()
    async def extract(
        text: Annotated[str, Field(min_length=1, description="What to extract from.")],
        schema: Annotated[
            dict[str, Any], Field(description="JSON schema of an object, which the answer keeps.")
        ],
        instructions: Annotated[str, Field(description="What to look for.")] = "",
        max_tokens: McpMaxTokens = 1024,
    ) -> dict[str, Any]:
        """Let the local model extract data from a text, as JSON that keeps to a schema for certain."""
        from pydantic_core import from_json

        system = f"{_EXTRACT} {instructions}".strip()
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        given = {"type": "object", **schema}
        if given["type"] != "object":
            raise ToolError("The schema must be one of an object.")
        found, result = await answer(
            GenerationRequest(messages, format=("json_schema", given), **wanted(max_tokens, temperature=0.0))
        )
        if result.stop_reason != "end":
            raise ToolError(f"The JSON was not complete after {len(result.tokens)} tokens: raise max_tokens.")
        data: dict[str, Any] = from_json(found)
        return data

    return server


def run(load: Callable[[], CompletionService], model: str) -> None:
    """Serve standard input until it ends. `load` runs beside that, in a thread."""

    async def main() -> None:
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        loading.add_done_callback(_report)
        try:
            await make_mcp(lambda: asyncio.shield(loading), model).run_stdio_async()
        finally:
            if loading.done() and not loading.exception():
                loading.result().stop()

    asyncio.run(main())


def _report(loading: asyncio.Future[CompletionService]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        sys.stderr.write(f"edgespec: {error}\n")
