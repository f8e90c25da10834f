"""The headers that tell a client what is left of its tenant's limits, by the names of the API that it uses."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from app.tenant_usage import Account
from app.tenants import RATES, Rate

OF_ANTHROPIC: dict[Rate, str] = {
    "requests": "requests",
    "prompt_tokens": "input-tokens",
    "output_tokens": "output-tokens",
}


def limit_headers(account: Account, *, is_anthropic: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers of one answer; none for a tenant without limits.

    OpenAI's are documented at https://platform.openai.com/docs/guides/rate-limits, Anthropic's at
    https://docs.anthropic.com/en/api/rate-limits.  OpenAI has one limit of tokens: of two, the one is told of which
    less is left.
    """
    states = {kind: state for kind in RATES if (state := account.state(kind)) is not None}
    if is_anthropic:
        for kind, (most, left, full_in_s) in states.items():
            at = (datetime.now(UTC) + timedelta(seconds=full_in_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
            yield from _three(f"anthropic-ratelimit-{OF_ANTHROPIC[kind]}-{{}}", most, left, at)
        return
    if "requests" in states:
        most, left, full_in_s = states.pop("requests")
        yield from _three("x-ratelimit-{}-requests", most, left, f"{full_in_s:.3f}s")
    if states:
        most, left, full_in_s = min(states.values(), key=lambda state: state[1] / state[0])
        yield from _three("x-ratelimit-{}-tokens", most, left, f"{full_in_s:.3f}s")


def _three(name: str, most: float, left: float, reset: str) -> Iterator[tuple[bytes, bytes]]:
    for what, value in (("limit", str(int(most))), ("remaining", str(int(left))), ("reset", reset)):
        yield name.format(what).encode(), value.encode()
