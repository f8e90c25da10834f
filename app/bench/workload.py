"""Makes what is sent: lengths, prompts and moments, in the same way for a closed loop, an open loop and a trace.

All three become one list of `Request`.  A prompt is a list of pieces.  A piece is a number and a length, and the number
seeds its tokens.  So requests that name the same piece share its tokens, as with a shared prefix and the `hash_ids` of
Mooncake's traces (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces).  A shorter piece begins like a
longer one with the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random

import msgspec

from app.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
PREFIX_PIECES = 1 << 40
"""The number of the first shared prefix; no prompt has so high a number."""


class Uniform(msgspec.Struct, frozen=True, tag=True):
    """Every length from `low` to `high`, both included, is equally likely."""

    low: int
    high: int


class Normal(msgspec.Struct, frozen=True, tag=True):
    """Lengths are normally distributed, cut off below 1."""

    mean: float
    sd: float


class LogNormal(msgspec.Struct, frozen=True, tag=True):
    """`mean` is the mean of the lengths, `sigma` the standard deviation of their logarithms."""

    mean: float
    sigma: float


Lengths = int | Uniform | Normal | LogNormal
"""A distribution of lengths in tokens.  A number means that all have that length."""

GRAMMAR = "N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEAN:SIGMA"


def parse_lengths(option: str, text: str) -> Lengths:
    """Parse a distribution as it is written on the command line (GRAMMAR).  Raises ConfigError, naming the option."""
    name, *words = text.strip().split(":")
    try:
        if not words:
            return _checked(int(name))
        a, b = (float(word) for word in words)
        return _checked(KINDS[name](a, b))
    except (KeyError, ValueError):
        raise ConfigError(option, f"{text!r} is no distribution of lengths; write {GRAMMAR}") from None


KINDS: dict[str, Callable[[float, float], Lengths]] = {
    "uniform": lambda low, high: Uniform(_whole(low), _whole(high)),
    "normal": Normal,
    "lognormal": LogNormal,
}


def _checked(lengths: Lengths) -> Lengths:
    match lengths:
        case Uniform(low, high):
            is_possible = 1 <= low <= high
        case Normal(mean, spread) | LogNormal(mean, spread):
            is_possible = 1 <= mean < math.inf and 0 <= spread < math.inf
        case _:
            is_possible = lengths >= 1
    if not is_possible:
        raise ValueError(lengths)
    return lengths


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError(number)
    return int(number)


def draw_length(lengths: Lengths, random: Random) -> int:
    """Draw one length, at least 1."""
    match lengths:
        case Uniform(low, high):
            return random.randint(low, high)
        case Normal(mean, sd):
            return max(1, round(random.gauss(mean, sd)))
        case LogNormal(mean, sigma):
            return max(1, round(random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))
        case _:
            return lengths


class Request(msgspec.Struct, frozen=True):
    """One greedy completion of exactly `output_tokens` tokens."""

    at_s: float
    """When it is sent, in seconds from the beginning of the load."""
    pieces: list[tuple[int, int]]
    """(number, length in tokens) of each part of the prompt."""
    output_tokens: int

    @property
    def input_tokens(self) -> int:
        return sum(length for _, length in self.pieces)

    def prompt(self, vocabulary: Sequence[int], seed: str) -> list[int]:
        """Return the token ids, drawn from `vocabulary`.  The same seed gives the same ids in every process."""
        return [
            token
            for number, length in self.pieces
            for token in Random(f"{seed}/{number}").choices(vocabulary, k=length)
        ]


class RequestPlan(msgspec.Struct, frozen=True):
    """The requests that one run of the client sends."""

    requests: list[Request]
    concurrency: int | None
    """At most this many requests run at a time.  A request that is due waits in the client, and its times count from
    when it is sent.  With None each is sent when it is due."""
    seed: str
    """Loads with different seeds have no prompt in common."""


class LoadSpec(msgspec.Struct, frozen=True):
    """A load that is drawn: `num_requests` requests, closed loop (`concurrency`) or open loop (`rate`)."""

    concurrency: int | None
    num_requests: int
    input_tokens: Lengths = 500
    """The length of the prompt after its prefix."""
    output_tokens: Lengths = 64
    first_prompt: int = 0
    """The number of the first prompt.  The same number and seed give the same prompt."""
    rate: float | None = None
    """Requests per second, on average."""
    burstiness: float = 1.0
    """The shape of the gamma-distributed gaps.  1 is a Poisson process, and less is more bursty."""
    num_prefixes: int = 0
    """How many prefixes are shared, each by the same number of requests; with 0 none is."""
    prefix_tokens: int = 0
    seed: str = "0"

    def load(self) -> RequestPlan:
        """Draw the requests."""
        random = Random(f"{self.seed}/lengths/{self.first_prompt}")
        arrivals = arrival_times(self.num_requests, self.rate, self.burstiness, random)
        requests = [self._request(self.first_prompt + n, at_s, random) for n, at_s in enumerate(arrivals)]
        return RequestPlan(requests, self.concurrency, self.seed)

    def _request(self, number: int, at_s: float, random: Random) -> Request:
        pieces = [(number, draw_length(self.input_tokens, random))]
        if self.num_prefixes:
            pieces.insert(0, (PREFIX_PIECES + number % self.num_prefixes, self.prefix_tokens))
        return Request(at_s, pieces, draw_length(self.output_tokens, random))


def arrival_times(count: int, rate: float | None, burstiness: float, random: Random) -> list[float]:
    """Draw `count` moments in seconds, `rate` per second; all are 0 without a rate.

    They are stretched so that the last is at count / rate exactly, as in vLLM's client: a few random gaps would
    make another rate than the one that was asked for.
    """
    if rate is None:
        return [0.0] * count
    moments = list(accumulate(random.gammavariate(burstiness, 1.0) for _ in range(count)))
    return [moment / moments[-1] * count / rate for moment in moments]


class TraceLine(msgspec.Struct):
    """One line of a trace in Mooncake's format; other fields are ignored."""

    timestamp: float
    """The moment in milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int]
    """One hash for each block of 512 tokens."""


def read_trace(path: Path, limit: int | None) -> list[Request]:
    """Read the first `limit` requests of a trace, from its first moment on.  Raises ConfigError."""
    try:
        lines = path.read_bytes().splitlines()[:limit]
    except OSError as error:
        raise ConfigError("--trace", f"{path} cannot be read: {error.strerror}") from None
    requests = [_parse_line(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise ConfigError("--trace", f"{path} holds no request")
    begin_s = min(request.at_s for request in requests)
    shifted = [msgspec.structs.replace(request, at_s=request.at_s - begin_s) for request in requests]
    return sorted(shifted, key=lambda request: request.at_s)


def _parse_line(number: int, text: bytes) -> Request:
    try:
        line = msgspec.json.decode(text, type=TraceLine)
    except msgspec.DecodeError as error:
        raise ConfigError("--trace", f"line {number}: {error}") from None
    starts = range(0, line.input_length, MOONCAKE_BLOCK_TOKENS)
    if line.input_length < 1 or line.output_length < 1 or len(starts) > len(line.hash_ids):
        raise ConfigError("--trace", f"line {number}: {line.input_length} tokens, {len(line.hash_ids)} hash_ids")
    lengths = [min(MOONCAKE_BLOCK_TOKENS, line.input_length - start) for start in starts]
    return Request(line.timestamp / 1000, list(zip(line.hash_ids, lengths, strict=False)), line.output_length)


def at_speed(requests: list[Request], speed: float) -> list[Request]:
    """Return the same requests, `speed` times as fast after one another."""
    return [msgspec.structs.replace(request, at_s=request.at_s / speed) for request in requests]


def fitting(requests: list[Request], max_tokens: int | None) -> list[Request]:
    """Return the requests that fit a context of `max_tokens` tokens; all of them if it is None (not known)."""
    if max_tokens is None:
        return requests
    return [request for request in requests if request.input_tokens + request.output_tokens <= max_tokens]
