"""How fast one engine computes, as it was measured when it started: what predictions of times begin from."""

from __future__ import annotations

import math

import msgspec


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one engine.  They follow the formula of app/engines/sim/profile.py, with these coefficients."""

    prefill_base_s: float
    """Seconds that each step with prompt tokens takes at least."""
    prefill_s_per_token: float
    prefill_s_per_token_squared: float = 0.0
    step_base_s: float
    """Seconds that each step takes at least if sequences decode."""
    step_s_per_sequence: float = 0.0
    step_s_per_kv_token: float = 0.0
    chunk_tokens: int = 2048
    """The most tokens that one step computes."""

    def prompt_s(self, num_tokens: int, cached: int = 0) -> float:
        """Return the seconds that a prompt takes alone, computed in chunks after its first `cached` tokens."""
        return self.queue_s(num_tokens - cached, self.compute_s(num_tokens, cached))

    def compute_s(self, num_tokens: int, cached: int = 0) -> float:
        """Return what a prompt adds to the steps that compute it, beyond their `prefill_base_s`."""
        cached = min(cached, num_tokens)
        squares = num_tokens**2 - cached**2
        return self.prefill_s_per_token * (num_tokens - cached) + self.prefill_s_per_token_squared * squares

    def queue_s(self, num_tokens: float, compute_s: float) -> float:
        """Return the seconds for prompts with `num_tokens` uncached tokens and `compute_s` together, in full steps."""
        return self.prefill_base_s * math.ceil(num_tokens / self.chunk_tokens) + compute_s

    def step_s(self, sequences: float, kv_tokens: float) -> float:
        """Return the seconds of a step that gives `sequences` a token each, with `kv_tokens` tokens of KV together."""
        return self.step_base_s + self.step_s_per_sequence * sequences + self.step_s_per_kv_token * kv_tokens
