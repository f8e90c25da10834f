"""Measures one running application, one request at a time on an otherwise idle machine.

TTFT is the client's: from sending a request to the first event with a token, streamed.  How Baton served it comes with
the same answer, in the header ``x-baton-explain``.  No prompt is sent twice, except to see what a cached one takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import httpx
import msgspec

from app.bench.client import describe, read_events
from app.bench.prefix_cache import find_vocabulary
from app.errors import BatonError
from benchmarks.gpu.setup import MODEL

Mode = Literal["remote", "local", "auto"]
"""How a request asks to be prefilled; *auto* where there is no choice."""

ANSWER_TOKENS = 4
FIRST_TOKENS = 512
FIRST_REQUESTS = 3
ITL_PROMPT_TOKENS = 512
ITL_TOKENS = 256
ITL_REPEAT = 3
CACHE_REPEAT = 5
STATS_TIMEOUT_S = 3.0
"""How soon /stats has to count a transfer after the answer."""


class MeasureError(BatonError):
    """The application did not answer as it should."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class NoAnswer(MeasureError):
    """The application answers no more, or not in time."""


class Answer(msgspec.Struct, frozen=True):
    """One streamed answer."""

    ttft_ms: float
    gaps_ms: list[float] = []
    """The time of each further token; tokens that came together share the time since the last event."""
    kind: str | None = None
    """Where the prompt was prefilled."""
    cached_tokens: int | None = None


class Series(msgspec.Struct, frozen=True):
    """Requests of one kind; `first` is the first of them, which is not in `answers`."""

    first: Answer
    answers: list[Answer]

    @property
    def ttft_ms(self) -> float:
        return median(answer.ttft_ms for answer in self.answers)

    @property
    def second_token_ms(self) -> float | None:
        """The time from the first token to the second: it has to wait for the KV if the first one did not."""
        gaps = [answer.gaps_ms[0] for answer in self.answers if answer.gaps_ms]
        return median(gaps) if gaps else None


class Moved(msgspec.Struct, frozen=True):
    """What decode has received, by /stats."""

    num_transfers: int
    num_bytes: int
    seconds: float
    """The sum over the transfers; 0 if the engine does not tell."""
    transport: str

    def since(self, before: Moved) -> Moved:
        return Moved(
            self.num_transfers - before.num_transfers,
            self.num_bytes - before.num_bytes,
            self.seconds - before.seconds,
            self.transport,
        )

    @property
    def gb_per_s(self) -> float | None:
        return self.num_bytes / self.seconds / 1e9 if self.num_bytes and self.seconds > 0 else None


class Hop(msgspec.Struct, frozen=True):
    """One length of prompts, prefilled in each mode that the application has, alternately."""

    prompt_tokens: int
    series: dict[str, Series]
    moved: Moved
    phases_ms: dict[str, float] = {}
    """The medians of the phases of a remote prefill, over whole answers."""

    @property
    def difference_ms(self) -> float | None:
        """How much later the first token of a remote prefill comes than that of a local one."""
        if not {"remote", "local"} <= self.series.keys():
            return None
        return self.series["remote"].ttft_ms - self.series["local"].ttft_ms


class Steps(msgspec.Struct, frozen=True):
    """Gaps between the tokens of sequences that run alone, in ms."""

    gaps_ms: list[float]

    @property
    def p50_ms(self) -> float:
        return median(self.gaps_ms)

    @property
    def p99_ms(self) -> float:
        return sorted(self.gaps_ms)[int(len(self.gaps_ms) * 0.99)]


class CacheResult(msgspec.Struct, frozen=True):
    """Prompts of one length that were sent twice, in one mode; medians."""

    prompt_tokens: int
    mode: str
    cold_ms: float
    cached_ms: float
    cached_tokens: int


class Application(msgspec.Struct, kw_only=True):
    """What was measured of one application; a part that failed is empty."""

    name: str
    engine: str
    mode: str
    engine_args: dict[str, Any] = {}
    prefill_args: dict[str, Any] = {}
    decode_args: dict[str, Any] = {}
    environment: dict[str, str] = {}
    ready_after_s: float = 0.0
    first_ttfts_ms: list[float] = []
    """TTFT of the very first requests after the start, in order."""
    hops: list[Hop] = []
    steps: Steps | None = None
    cache: list[CacheResult] = []


class Client:
    """A client of a running application that sends prompts which that has not seen."""

    def __init__(self, http: httpx.Client, rng: random.Random) -> None:
        self._http = http
        self._rng = rng
        self._vocabulary = find_vocabulary(http, MODEL)
        if not self._vocabulary:
            raise MeasureError("/tokenize gives no tokens to make prompts of")

    def new_prompt(self, num_tokens: int) -> list[int]:
        return self._rng.choices(self._vocabulary, k=num_tokens)

    def complete(self, prompt: list[int], mode: Mode, max_tokens: int = ANSWER_TOKENS) -> Answer:
        """Stream exactly `max_tokens` tokens, greedily.  Raises MeasureError, or NoAnswer if nothing more will come."""
        body = {
            **self._body(prompt, mode, max_tokens),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        sent_at = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        try:
            with self._http.stream("POST", "/v1/completions", json=body, headers={"x-baton-explain": "1"}) as response:
                if not response.is_success:
                    response.read()
                    raise MeasureError(f"/v1/completions answered {describe(response)}")
                for data in read_events(response):
                    _note(data, time.perf_counter(), arrivals)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise NoAnswer(f"the application broke off an answer: {error!r}") from error
        if not arrivals or arrivals[-1][1] != max_tokens:
            raise MeasureError(f"{arrivals[-1][1] if arrivals else 0} of {max_tokens} tokens came")
        return _to_answer(sent_at, arrivals, response.headers.get("x-baton-explain", ""))

    def phases(self, prompt: list[int], mode: Mode) -> dict[str, float]:
        """Return the phases of a remote prefill in ms.  A whole answer tells all of them, as it ends after them."""
        body = self._body(prompt, mode, ANSWER_TOKENS)
        response = self._http.post("/v1/completions", json=body, headers={"x-baton-explain": "1"})
        if not response.is_success:
            raise MeasureError(f"/v1/completions answered {describe(response)}")
        return _phases(_explained(response.headers.get("x-baton-explain", "")))

    def _body(self, prompt: list[int], mode: Mode, max_tokens: int) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "vllm_xargs": {"baton_prefill": mode},
        }

    def moved(self) -> Moved:
        """Return what the decode replica has received since it started."""
        replicas = self._http.get("/stats").raise_for_status().json()["replicas"]
        decode = next(replica for replica in replicas if replica["role"] == "decode")
        return Moved(
            decode["num_transfers"],
            decode["transferred_bytes"],
            decode["transfer_s"],
            decode["transport"],
        )

    def moved_since(self, before: Moved, num_transfers: int) -> Moved:
        """Return what has come since, as soon as `num_transfers` are counted or STATS_TIMEOUT_S have passed."""
        deadline = time.monotonic() + STATS_TIMEOUT_S
        while (moved := self.moved().since(before)).num_transfers < num_transfers and time.monotonic() < deadline:
            time.sleep(0.05)
        return moved


def _note(data: bytes, now: float, arrivals: list[tuple[float, int]]) -> None:
    """Add to `arrivals` the time of an event and the number of tokens so far."""
    if data == b"[DONE]":
        return
    event = msgspec.json.decode(data)
    if "error" in event:
        raise MeasureError(f"the application broke off an answer: {event['error']}")
    so_far = arrivals[-1][1] if arrivals else 0
    num = (event.get("usage") or {}).get("completion_tokens", so_far)
    if event.get("choices") and num > so_far:
        arrivals.append((now, num))


def _to_answer(sent_at: float, arrivals: list[tuple[float, int]], header: str) -> Answer:
    gaps: list[float] = []
    for (before, had), (now, has) in pairwise(arrivals):
        gaps += [(now - before) / (has - had) * 1e3] * (has - had)
    actual = _explained(header)
    return Answer(
        ttft_ms=(arrivals[0][0] - sent_at) * 1e3,
        gaps_ms=gaps,
        kind=actual.get("kind"),
        cached_tokens=actual.get("cached_tokens"),
    )


def _explained(header: str) -> dict[str, Any]:
    """Return what ``x-baton-explain`` says of how the sequence went."""
    explained = msgspec.json.decode(header) if header else []
    actual: dict[str, Any] = explained[0].get("actual", {}) if explained else {}
    return actual


def _phases(actual: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in (actual.get("phases") or {}).items() if value is not None}


class Extent(msgspec.Struct, frozen=True):
    """What is measured of an application, and how often."""

    lengths: Sequence[int]
    cache_lengths: Sequence[int]
    repeat: int
    parts: Sequence[str]
    """Of hop, itl and cache."""


def modes_of(application: Application) -> list[Mode]:
    """Return the modes that can be compared inside of one application."""
    if application.mode == "aggregated":
        return ["auto"]
    return ["remote"] if application.engine == "sglang" else ["remote", "local"]


def measure_first(client: Client, application: Application) -> None:
    """Send the very first requests, before anything has warmed the application up."""
    mode = modes_of(application)[0]
    for _ in range(FIRST_REQUESTS):
        application.first_ttfts_ms.append(client.complete(client.new_prompt(FIRST_TOKENS), mode).ttft_ms)


def measure_hop(client: Client, modes: Sequence[Mode], num_tokens: int, repeat: int) -> Hop:
    """Alternate the modes.  Raises MeasureError if a prompt was not prefilled where it was asked to be."""
    before = client.moved()
    answers: dict[Mode, list[Answer]] = {mode: [] for mode in modes}
    for number in range(repeat + 1):
        for mode in modes if number % 2 == 0 else reversed(modes):
            answer = client.complete(client.new_prompt(num_tokens), mode)
            if mode != "auto" and answer.kind != mode:
                raise MeasureError(f"a prompt of {num_tokens} tokens was prefilled {answer.kind} instead of {mode}")
            answers[mode].append(answer)
    num_remote = len(answers.get("remote", []))
    moved = client.moved_since(before, num_remote)
    if moved.num_transfers < num_remote:
        raise MeasureError(f"the KV of {moved.num_transfers} of {num_remote} prompts of {num_tokens} tokens moved")
    series: dict[str, Series] = {mode: Series(found[0], found[1:]) for mode, found in answers.items()}
    return Hop(num_tokens, series, moved, _measure_phases(client, num_tokens, repeat) if "remote" in modes else {})


def _measure_phases(client: Client, num_tokens: int, repeat: int) -> dict[str, float]:
    found = [client.phases(client.new_prompt(num_tokens), "remote") for _ in range(repeat)]
    names = dict.fromkeys(name for phases in found for name in phases)
    return {name: median(phases[name] for phases in found if name in phases) for name in names}


def measure_steps(client: Client, mode: Mode) -> Steps:
    gaps: list[float] = []
    for _ in range(ITL_REPEAT):
        gaps += client.complete(client.new_prompt(ITL_PROMPT_TOKENS), mode, ITL_TOKENS).gaps_ms[1:]
    return Steps(gaps)


def measure_cache(client: Client, mode: Mode, num_tokens: int) -> CacheResult:
    """Send prompts once in `mode`, and once more in the same mode."""
    cold, cached = [], []
    for _ in range(CACHE_REPEAT):
        prompt = client.new_prompt(num_tokens)
        cold.append(client.complete(prompt, mode))
        cached.append(client.complete(prompt, mode))
    return CacheResult(
        num_tokens,
        mode,
        median(answer.ttft_ms for answer in cold),
        median(answer.ttft_ms for answer in cached),
        round(median(answer.cached_tokens or 0 for answer in cached)),
    )


def steps_of(client: Client, application: Application, extent: Extent) -> list[tuple[str, Callable[[], None]]]:
    """Return what is to be measured, in order: a title, and a function that adds one result to `application`."""
    modes = modes_of(application)

    def hop(num_tokens: int) -> None:
        application.hops.append(measure_hop(client, modes, num_tokens, extent.repeat))

    def steps() -> None:
        application.steps = measure_steps(client, modes[0])

    def cache(mode: Mode, num_tokens: int) -> None:
        application.cache.append(measure_cache(client, mode, num_tokens))

    hops = [(f"TTFT of {length} tokens", partial(hop, length)) for length in extent.lengths]
    caches = [
        (f"{length} tokens again, {mode}", partial(cache, mode, length))
        for length in extent.cache_lengths
        for mode in modes
    ]
    chosen: dict[str, list[tuple[str, Callable[[], None]]]] = {
        "hop": [*hops],
        "itl": [("decode steps", steps)],
        "cache": [*caches],
    }
    first = ("the first requests", partial(measure_first, client, application))
    return [first, *(step for part in extent.parts for step in chosen[part])]
