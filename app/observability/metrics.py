"""Prometheus metrics of a frontend, served at /metrics beside those of vLLM's server."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

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

SEQUENCES = Counter("baton_sequences", "Sequences by how they ended.", ["model", "end"])
PREFILLS = Counter("baton_prefills", "Prompts by where they were prefilled and why.", ["model", "kind", "reason"])
PROMPT_TOKENS = Counter("baton_prompt_tokens", "Prompt tokens of sequences that began.", ["model"])
CACHED_TOKENS = Counter("baton_cached_prompt_tokens", "Prompt tokens that no engine had to compute.", ["model"])
TRANSFERRED_TOKENS = Counter("baton_transferred_tokens", "Prompt tokens whose KV moved.", ["model", "transport"])
GENERATION_TOKENS = Counter("baton_generation_tokens", "Tokens generated.", ["model"])
TIME_TO_FIRST_TOKEN = Histogram(
    "baton_time_to_first_token_seconds",
    "From the request's arrival at the engine client to its first token.",
    ["model", "kind"],
    buckets=_LATENCY_BUCKETS_S,
)
INTER_TOKEN_LATENCY = Histogram(
    "baton_inter_token_latency_seconds",
    "Gaps between deltas of a sequence, as this frontend got them.",
    ["model"],
    buckets=_LATENCY_BUCKETS_S,
)
