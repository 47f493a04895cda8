"""The server's metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgespec.app.engine.request import GenerationStats
from edgespec.app.engine.scheduler import Scheduler
from edgespec.core import Reading

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200, 400)
_LENGTHS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 31)
_MOST_FIELDS = 200
_MODES = ("performance", "balanced", "saver")


class Metrics:
    """The metrics of one scheduler. All methods are called in one event loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"edgespec_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"edgespec_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"edgespec_{name}", text, buckets=buckets, registry=registry)

        self._requests = counter("requests", "HTTP requests", "path", "status")
        self._ignored = counter("ignored_fields", "Fields of requests that are unknown and ignored", "field")
        self._fields: set[str] = set()
        self._answers = counter("answers", "Generations by stop reason", "reason")
        self._prompt = counter("prompt_tokens", "Prompt tokens")
        self._cached = counter("cached_prompt_tokens", "Prompt tokens taken from the KV cache")
        self._written = counter("generated_tokens", "Tokens generated")
        self._rounds = counter("rounds", "Forward passes of the target that made tokens final")
        self._drafted = counter("drafted_tokens", "Draft tokens", "drafter")
        self._accepted = counter("accepted_tokens", "Draft tokens accepted", "drafter")
        self._first = histogram(
            "time_to_first_token_seconds", "From the request to the first token", _SECONDS
        )
        self._speed = histogram("tokens_per_second", "Speed of generations after their first token", _SPEEDS)
        self._length = histogram("draft_length", "Draft tokens per round, mean of each generation", _LENGTHS)
        self._cpu = counter("cpu_seconds", "Processor time of generations after their first token")
        self._joules = counter(
            "energy_joules", "Metered energy of generations after their first token, if reported"
        )
        self._running = gauge("running", "Generations under way")
        self._waiting = gauge("waiting", "Requests in the queue")
        self._mode = gauge("mode", "1 for the current mode of the governor", "mode")
        self._celsius = gauge("temperature_celsius", "Temperature of the hottest processor sensor")
        self._charge = gauge("battery_percent", "Charge of the battery")

    def finished(self, stats: GenerationStats, error: Exception | None, seconds: float) -> None:
        """Count a generation that ended `seconds` after its request was queued."""
        self._answers.labels("error" if error is not None else stats.stop_reason).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._written.inc(len(stats.tokens))
        self._rounds.inc(stats.rounds)
        for drafter, (drafted, accepted) in stats.drafters.items():
            self._drafted.labels(drafter).inc(drafted)
            self._accepted.labels(drafter).inc(accepted)
        if stats.rounds:
            queued = max(0.0, seconds - stats.seconds)
            self._first.observe(queued + stats.seconds_to_first_token)
            self._length.observe(stats.drafted / stats.rounds)
        if stats.tokens_per_second:
            self._speed.observe(stats.tokens_per_second)
        if stats.energy is not None:
            self._cpu.inc(max(0.0, stats.energy.cpu_seconds))
            self._joules.inc(max(0.0, stats.energy.joules or 0.0))

    def ignored(self, field: str) -> None:
        """Count an unknown field of a request, by its path. Clients choose the names: only some are kept."""
        if len(self._fields) < _MOST_FIELDS:
            self._fields.add(field)
        self._ignored.labels(field if field in self._fields else "other").inc()

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        load = self._scheduler.load
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        engine = self._scheduler.engine
        for mode in _MODES:
            self._mode.labels(mode).set(engine.decision.mode == mode)
        reading: Reading = engine.resources.watch.latest()
        for gauge, value in ((self._celsius, reading.celsius), (self._charge, reading.charge)):
            gauge.set(float("nan") if value is None else value)
        return generate_latest(self._registry)

    def counting(
        self, app: Callable[..., Awaitable[None]], known: set[str]
    ) -> Callable[..., Awaitable[None]]:
        """Wrap `app` to count its requests by status and path; paths that are not `known` are "other"."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def counted_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in known else "other"
                    self._requests.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, counted_send)

        return counted
