"""`edgespec mcp`: the model as tools of the Model Context Protocol, on standard input and output.

The protocol starts at once; the first call waits until the model is loaded.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

import edgespec
from edgespec.app.engine.completions import CompletionService, GenerationRequest
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Encoder, ServerEvent, collect
from edgespec.app.serve.apis.errors import ApiError
from edgespec.core import EdgespecError, TokenLogprob
from edgespec.sampling import Sampling

_EXTRACT = "Extract what is asked for from the text. Answer with JSON only."

McpMaxTokens = Annotated[int, Field(ge=1, le=100_000, description="Maximum number of tokens to generate.")]
McpTemperature = Annotated[float, Field(ge=0, le=2, description="Sampling temperature; 0 is greedy.")]
McpStop = Annotated[list[str] | None, Field(max_length=16, description="Stop sequences.")]


class McpMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


def make_mcp(service: Callable[[], Awaitable[CompletionService]], model: str) -> MCPServer[Any]:
    """Build the server. `service` waits for the loaded model, or raises EdgespecError."""
    server: MCPServer[Any] = MCPServer(
        "edgespec",
        version=edgespec.__version__,
        instructions=f"A language model on this machine ({model}): private, free of charge, and small. "
        "Give it short, well-described tasks.",
        log_level="WARNING",
    )
    tools = _Tools(service)
    for tool in (tools.generate, tools.chat, tools.extract):
        server.tool()(tool)
    return server


class _Tools:
    """The tools. Clients see their names, docstrings and parameters."""

    def __init__(self, service: Callable[[], Awaitable[CompletionService]]) -> None:
        self._service = service

    async def generate(
        self,
        prompt: Annotated[str, Field(min_length=1, description="The task, with everything needed for it.")],
        system: Annotated[str, Field(description="The system prompt.")] = "",
        max_tokens: McpMaxTokens = 512,
        temperature: McpTemperature = 0.0,
        stop: McpStop = None,
    ) -> str:
        """Generate a response to one prompt with the local model."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        text, _ = await self._run(GenerationRequest(messages, **_settings(max_tokens, temperature, stop)))
        return text

    async def chat(
        self,
        messages: Annotated[list[McpMessage], Field(min_length=1, max_length=1000)],
        max_tokens: McpMaxTokens = 512,
        temperature: McpTemperature = 0.0,
        stop: McpStop = None,
    ) -> str:
        """Generate the next message of a conversation with the local model."""
        plain = [message.model_dump() for message in messages]
        text, _ = await self._run(GenerationRequest(plain, **_settings(max_tokens, temperature, stop)))
        return text

    async def extract(
        self,
        text: Annotated[str, Field(min_length=1, description="The text to extract data from.")],
        schema: Annotated[dict[str, Any], Field(description="JSON schema of the object to return.")],
        instructions: Annotated[str, Field(description="What to look for in the text.")] = "",
        max_tokens: McpMaxTokens = 1024,
    ) -> dict[str, Any]:
        """Extract data from a text with the local model, as JSON that is guaranteed to match a schema."""
        from pydantic_core import from_json

        system = f"{_EXTRACT} {instructions}".strip()
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        object_schema = {"type": "object", **schema}
        if object_schema["type"] != "object":
            raise ToolError("The schema must describe an object.")
        found, stats = await self._run(
            GenerationRequest(messages, format=("json_schema", object_schema), **_settings(max_tokens, 0.0))
        )
        if stats.stop_reason != "end":
            raise ToolError(f"The JSON is incomplete after {len(stats.tokens)} tokens: raise max_tokens.")
        data: dict[str, Any] = from_json(found)
        return data

    async def _run(self, request: GenerationRequest) -> tuple[str, GenerationStats]:
        encoder = _TextEncoder()
        try:
            service = await self._service()
            prepared = await service.prepare(request)
            # A call that is canceled leaves the block, which cancels the generation.
            with service.submit(prepared, "mcp") as response:
                body = await collect([response], encoder)
        except (EdgespecError, ApiError) as error:
            raise ToolError(str(error)) from None
        return body["text"], encoder.stats


class _TextEncoder(Encoder):
    """Text alone: the tools return nothing else."""

    def __init__(self) -> None:
        self.stats = GenerationStats()
        self._text: list[str] = []

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        self._text.append(text)
        yield text

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        self.stats = stats
        yield from ()

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        raise error

    @property
    def body(self) -> dict[str, str]:
        return {"text": "".join(self._text)}


def _settings(max_tokens: int, temperature: float, stop: list[str] | None = None) -> dict[str, Any]:
    if not all(stop or []):
        raise ToolError("stop contains an empty string, which would end every response at once.")
    return {"sampling": Sampling(temperature), "max_tokens": max_tokens, "stops": stop or []}


def run(load: Callable[[], CompletionService], model: str) -> None:
    """Serve standard input until it ends. `load` runs in a thread."""

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
