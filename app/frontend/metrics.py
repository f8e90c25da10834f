"""Prometheus metrics of a frontend, served at /metrics beside those of vLLM's server."""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import REGISTRY, Counter, Histogram, start_http_server
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.errors import ConfigError

_LATENCY_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_DECISION_BUCKETS_S = (0.00001, 0.000025, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)
_RATIO_BUCKETS = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
"""The buckets are as fine below 1 as above it: each bound below 1 is the inverse of one above."""


class TokenGaps:
    """How often gaps between tokens were how long, of one model."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_LATENCY_BUCKETS_S) + 1)
        """One for each bucket, and one for what is longer than all."""
        self.sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        """Only the event loop's thread may call this."""
        self.counts[bisect_left(_LATENCY_BUCKETS_S, gap_s)] += 1
        self.sum_s += gap_s


class InterTokenLatency(Collector):
    """A histogram that takes little for each value, as there is one for each token: `Histogram` took 80
    instructions of some 500 that a token took of this process without the event loop's."""

    def __init__(self) -> None:
        self._gaps: dict[str, TokenGaps] = {}

    def of(self, model: str) -> TokenGaps:
        if (gaps := self._gaps.get(model)) is None:
            gaps = self._gaps[model] = TokenGaps()
        return gaps

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the metric.  This runs in the thread of the scrape, beside the event loop."""
        family = HistogramMetricFamily(
            "baton_inter_token_latency_seconds",
            "Gaps between deltas of a sequence, as this frontend got them; those of baton_resume_gap_seconds are not "
            "among them.",
            labels=["model"],
        )
        bounds = [*map(floatToGoString, _LATENCY_BUCKETS_S), "+Inf"]
        for model, gaps in list(self._gaps.items()):
            family.add_metric([model], list(zip(bounds, accumulate(gaps.counts), strict=True)), gaps.sum_s)
        yield family


SEQUENCES = Counter("baton_sequences", "Sequences by how they ended.", ["model", "end"])
WITHIN_SLO = Counter(
    "baton_sequences_within_slo", "Sequences that ended well and within their model's `slo`: goodput.", ["model"]
)
DECISIONS = Counter(
    "baton_decisions", "Where prompts were to be prefilled and why, every attempt counted.", ["model", "kind", "reason"]
)
DECISION_TIME = Histogram(
    "baton_decision_seconds", "What deciding took of the frontend.", ["model"], buckets=_DECISION_BUCKETS_S
)
PREFILLS = Counter("baton_prefills", "Prompts by where they were prefilled and why.", ["model", "kind", "reason"])
PROMPT_TOKENS = Counter("baton_prompt_tokens", "Prompt tokens of sequences that began.", ["model"])
CACHED_TOKENS = Counter("baton_cached_prompt_tokens", "Prompt tokens that no engine had to compute.", ["model"])
EXPECTED_CACHED_TOKENS = Counter(
    "baton_expected_cached_tokens", "What the router expected baton_cached_prompt_tokens to count.", ["model"]
)
TRANSFERRED_TOKENS = Counter("baton_transferred_tokens", "Prompt tokens whose KV moved.", ["model", "transport"])
GENERATION_TOKENS = Counter("baton_generation_tokens", "Tokens generated.", ["model"])
TIME_TO_FIRST_TOKEN = Histogram(
    "baton_time_to_first_token_seconds",
    "From the request's arrival at the engine client to its first token.",
    ["model", "kind"],
    buckets=_LATENCY_BUCKETS_S,
)
# A ratio, because an error in seconds is always small for short prompts and large for long ones.  It is relative to
# the prediction: twice as long and half as long are equally far from 1.
TIME_TO_FIRST_TOKEN_RATIO = Histogram(
    "baton_time_to_first_token_ratio",
    "Time to first token, without waiting in the frontend, over what was predicted, of prompts that went as decided.",
    ["model", "kind"],
    buckets=_RATIO_BUCKETS,
)
HOP_PHASES = Histogram(
    "baton_hop_phase_seconds",
    "The phases of a remote prefill, each timed from the end of the one before (app/messages.py explains them).",
    ["model", "phase"],
    buckets=_LATENCY_BUCKETS_S,
)
INTER_TOKEN_LATENCY = InterTokenLatency()
REGISTRY.register(INTER_TOKEN_LATENCY)
RESUME_GAP = Histogram(
    "baton_resume_gap_seconds",
    "How long clients waited for the next token of sequences that went on elsewhere or later, by the reason.",
    ["model", "reason"],
    buckets=_LATENCY_BUCKETS_S,
)
WAKE = Histogram(
    "baton_wake_seconds",
    "How long requests waited for a model that slept.",
    ["model"],
    buckets=(*_LATENCY_BUCKETS_S, 120.0, 300.0, 600.0),
)

# They are refused before vLLM's server sees them, whose metrics count all other responses.
REFUSED_BODIES = Counter("baton_refused_bodies", "Request bodies that were refused, by their HTTP status.", ["status"])
for _status in (408, 413, 429):
    REFUSED_BODIES.labels(str(_status))  # so that Prometheus sees the first one as an increase
REFUSED_KEYS = Counter(
    "baton_refused_keys", "Requests that were refused for their API key, or for having none, by the reason.", ["reason"]
)
for _reason in ("missing", "unknown", "not_admin"):
    REFUSED_KEYS.labels(_reason)


class MetricsServer:
    """Serves the metrics of this process on the first free port from `first_port` on."""

    def __init__(self, first_port: int) -> None:
        for self.port in range(first_port, 65536):
            try:
                self._server, self._thread = start_http_server(self.port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return
        raise ConfigError("frontend.metrics_port", f"no free port from {first_port} on at this node")

    def close(self) -> None:
        """Stop serving.  This blocks for up to half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
