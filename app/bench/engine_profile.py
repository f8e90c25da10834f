"""``baton profile``: measures how long a running engine takes, and writes a profile for the sim engine.

It works with any OpenAI endpoint.  Prompts are random token ids for /v1/completions, and answers are streamed.

1. *Overhead*: a prompt of one token takes the engine as long as one step of one sequence.  The rest of its TTFT is
   spent outside the engine, and is subtracted from every other TTFT.
2. *Prefill*: the TTFT of new prompts of several lengths, one at a time.  The longest must fit into one step of the
   engine (max_num_batched_tokens), because each chunk of a longer one would add a base time of its own.
3. *Steps*: several streams at once.  Each prompt is sent once before, so that its KV is cached.  Measured are the time
   per token while all streams get tokens, and the KV that they have in the middle of that time.

Every measurement is the median of `repeat`.  The caller gives what an endpoint does not tell: KV bytes and the link.
"""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from app.bench.client import EventParser, describe, find_card, new_async_client, new_client, parse_url
from app.engines.sim.profile import SimProfile, TransferTimes, fit_prefill, fit_step, to_yaml
from app.errors import BatonError

TOKEN_IDS = range(100, 1000)
"""The token ids that prompts are drawn from.  Every model has these, and hardly any gives them a special meaning."""
SHORTEST_PROMPT = 64
STEP_TOKENS = 48
"""Output tokens of a stream whose steps are measured."""
ANSWER_TIMEOUT_S = 300.0


class ProfileError(BatonError):
    """The engine could not be measured."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class TimedOutput(msgspec.Struct, frozen=True):
    """When one stream was asked for and, for each of its events, when it came and how many tokens there were then.

    Times are in seconds.
    """

    sent_at: float
    arrivals: list[tuple[float, int]]

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.sent_at

    def num_tokens_at(self, moment: float) -> int:
        """Return how many tokens had come at `moment`."""
        return max((num for at, num in self.arrivals if at <= moment), default=0)


class StepTime(msgspec.Struct, frozen=True):
    """The measured time of a step, for a number of sequences and of KV tokens that they have together."""

    num_sequences: int
    num_kv_tokens: int
    seconds: float


class StepMeasurements(msgspec.Struct, frozen=True):
    """All measurements of one engine."""

    overhead_s: float
    prefills: list[tuple[int, float]]
    """(tokens of the prompt, seconds in the engine)."""
    steps: list[StepTime]


class Extent(msgspec.Struct, frozen=True):
    """What is measured, and how often."""

    prompt_lengths: list[int]
    batches: list[int]
    contexts: list[int]
    """Prompt lengths of the streams whose steps are measured."""
    repeat: int


class ProfiledServer:
    """The server under measurement."""

    def __init__(self, client: httpx.AsyncClient, model: str, rng: random.Random) -> None:
        self._client = client
        self._model = model
        self._rng = rng

    def new_prompt(self, num_tokens: int) -> list[int]:
        return self._rng.choices(TOKEN_IDS, k=num_tokens)

    async def complete(self, prompt: list[int], max_tokens: int) -> TimedOutput:
        """Stream one greedy completion of exactly `max_tokens`.  Raises ProfileError."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        sent_at = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    raise ProfileError(f"/v1/completions answered {describe(response)}")
                parser = EventParser()
                async for chunk in response.aiter_bytes():
                    for data in parser.feed(chunk):
                        _read_event(data, arrivals)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise ProfileError(f"{self._client.base_url} broke off an answer: {error!r}") from error
        if not arrivals or arrivals[-1][1] != max_tokens:
            got = arrivals[-1][1] if arrivals else 0
            raise ProfileError(f"{got} of {max_tokens} tokens came: does the server know ignore_eos?")
        return TimedOutput(sent_at, arrivals)


def _read_event(data: bytes, arrivals: list[tuple[float, int]]) -> None:
    """Add to `arrivals` the time of an event of a stream and the number of tokens so far."""
    now = time.perf_counter()
    if data == b"[DONE]":
        return
    event = msgspec.json.decode(data)
    if "error" in event:
        raise ProfileError(f"the server broke off an answer: {event['error']}")
    if not event.get("choices"):
        return
    so_far = arrivals[-1][1] if arrivals else 0
    num = (event.get("usage") or {}).get("completion_tokens", so_far + 1)
    if num > so_far:
        arrivals.append((now, num))


def step_time(answers: list[TimedOutput], context: int) -> StepTime | None:
    """Return the time of a step, from streams with `context` prompt tokens each; None if they hardly overlapped."""
    begin = max(answer.arrivals[0][0] for answer in answers)
    end = min(answer.arrivals[-1][0] for answer in answers)
    counts = [(answer.num_tokens_at(begin), answer.num_tokens_at(end)) for answer in answers]
    steps = sum(last - first for first, last in counts) / len(counts)
    if end <= begin or steps < STEP_TOKENS / 4:
        return None
    kv_tokens = sum(context + (first + last) / 2 for first, last in counts)
    return StepTime(len(answers), round(kv_tokens), (end - begin) / steps)


async def measure(endpoint: ProfiledServer, extent: Extent, say: Callable[[str], None]) -> StepMeasurements:
    """Measure everything, one thing at a time.  Raises ProfileError.

    Each round measures everything once.  So a short disturbance of the machine affects one round of several
    measurements, and not all rounds of one.
    """
    await endpoint.complete(endpoint.new_prompt(extent.prompt_lengths[-1]), STEP_TOKENS)  # a server's first is slow
    ttfts: defaultdict[int, list[float]] = defaultdict(list)
    steps: defaultdict[tuple[int, int], list[StepTime]] = defaultdict(list)  # by context and batch
    for number in range(1, extent.repeat + 1):
        for context in extent.contexts:
            for batch in extent.batches:
                step = await _time_steps(endpoint, batch, context)
                if step is None:
                    say(f"round {number}: {batch} x {context} tokens did not run at the same time: left out")
                    continue
                steps[context, batch].append(step)
                say(f"round {number}: a step of {batch} x {context} tokens takes {step.seconds * 1e3:.2f} ms")
        for num_tokens in (1, *extent.prompt_lengths):
            answer = await endpoint.complete(endpoint.new_prompt(num_tokens), 1)
            ttfts[num_tokens].append(answer.ttft_s)
            say(f"round {number}: the first token after {num_tokens} takes {answer.ttft_s * 1e3:.2f} ms")
    return _middle(ttfts, steps)


def _middle(ttfts: dict[int, list[float]], steps: dict[tuple[int, int], list[StepTime]]) -> StepMeasurements:
    if not steps:
        raise ProfileError("no steps could be measured: streams never ran at the same time")
    middle = [
        StepTime(times[0].num_sequences, times[0].num_kv_tokens, median(step.seconds for step in times))
        for _, times in sorted(steps.items())
    ]
    alone = min(middle, key=lambda step: (step.num_sequences, step.num_kv_tokens))
    overhead_s = max(0.0, median(ttfts.pop(1)) - alone.seconds)
    prefills = [(num_tokens, median(times) - overhead_s) for num_tokens, times in ttfts.items()]
    if any(seconds <= 0 for _, seconds in prefills):
        raise ProfileError(
            f"prompts are computed too fast to be seen beside the {overhead_s * 1e3:.2f} ms of each TTFT that pass "
            "outside the engine"
        )
    return StepMeasurements(overhead_s, prefills, middle)


async def _time_steps(endpoint: ProfiledServer, batch: int, context: int) -> StepTime | None:
    prompts = [endpoint.new_prompt(context) for _ in range(batch)]
    for prompt in prompts:
        await endpoint.complete(prompt, 1)
    answers = await asyncio.gather(*(endpoint.complete(prompt, STEP_TOKENS) for prompt in prompts))
    return step_time(answers, context)


def measure_profile(
    url: str,
    model: str | None,
    output: Path,
    *,
    max_prompt: int,
    max_batch: int,
    repeat: int,
    transfer: TransferTimes,
    kv_bytes_per_token: int,
    about: str,
) -> SimProfile:
    """Measure the engine behind `url`, print what fits and how well, and write the profile.

    `about` says what runs there: the endpoint itself does not tell engine, version and machine.  Raises ConfigError if
    it cannot be reached, ProfileError if it cannot be measured or the file cannot be written.
    """
    console = Console(stderr=True, highlight=False)
    if not output.parent.is_dir():
        raise ProfileError(f"{output}: there is no such folder")

    _, base_url = parse_url("--url", url)
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        card = find_card("--url", client, model)
    name, max_model_len = card["id"], int(card.get("max_model_len") or 4096)
    longest = min(max_prompt, max_model_len - STEP_TOKENS)
    if longest < 2 * SHORTEST_PROMPT:
        raise ProfileError(f"{name} takes {max_model_len} tokens: too few to measure anything")
    extent = choose_extent(longest, max_batch, repeat)

    async def run() -> StepMeasurements:
        async with new_async_client(base_url, ANSWER_TIMEOUT_S) as client:
            return await measure(ProfiledServer(client, name, random.Random(time.time_ns())), extent, console.print)

    measured = asyncio.run(run())
    fitted = SimProfile(
        source=_describe(url, name, measured, about),
        prefill=fit_prefill(measured.prefills),
        step=fit_step([(step.num_sequences, step.num_kv_tokens, step.seconds) for step in measured.steps]),
        transfer=transfer,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    print_fit(fitted, measured, Console(highlight=False))
    try:
        output.write_text(to_yaml(fitted))
    except OSError as error:
        raise ProfileError(f"{output}: {error.strerror}") from error
    console.print(f"written to {output}")
    return fitted


def choose_extent(longest: int, max_batch: int, repeat: int) -> Extent:
    """Return prompt lengths that double up to `longest`, batches that double up to `max_batch`, and three contexts."""
    return Extent(
        prompt_lengths=[*_doubling(SHORTEST_PROMPT, longest // 2), longest],
        batches=[*_doubling(1, max_batch // 2), max_batch],
        contexts=sorted({SHORTEST_PROMPT, longest // 4, longest // 2}),
        repeat=repeat,
    )


def _doubling(first: int, last: int) -> list[int]:
    values = []
    while first <= last:
        values.append(first)
        first *= 2
    return values


def _describe(url: str, model: str, measured: StepMeasurements, about: str) -> str:
    return (
        f"prefill and step: {about}, as model {model} at {url}.\n"
        f"Measured on {datetime.now(UTC).date()} by `{shlex.join(['baton', *sys.argv[1:]])}`, client on a machine with "
        f"{len(os.sched_getaffinity(0))} cores;\n"
        f"{measured.overhead_s * 1e3:.2f} ms of each TTFT, spent outside the engine, are taken off.\n"
        "transfer and kv_bytes_per_token: given on the command line, not measured."
    )


def print_fit(fitted: SimProfile, measured: StepMeasurements, console: Console) -> None:
    """Print the measured times next to those of the profile."""
    prefill = Table(title="prefill, ms")
    for heading in ("prompt tokens", "measured", "profile", "difference"):
        prefill.add_column(heading, justify="right")
    for tokens, seconds in measured.prefills:
        prefill.add_row(str(tokens), *_compare(seconds, fitted.prefill_s(tokens)))
    steps = Table(title="step, ms")
    for heading in ("sequences", "KV tokens", "measured", "profile", "difference"):
        steps.add_column(heading, justify="right")
    for step in measured.steps:
        modelled = fitted.step_s(step.num_sequences, step.num_kv_tokens)
        steps.add_row(str(step.num_sequences), str(step.num_kv_tokens), *_compare(step.seconds, modelled))
    console.print(prefill, steps)
    console.print(to_yaml(fitted), soft_wrap=True, markup=False)


def _compare(measured_s: float, modelled_s: float) -> tuple[str, str, str]:
    return f"{measured_s * 1e3:.3f}", f"{modelled_s * 1e3:.3f}", f"{(modelled_s / measured_s - 1) * 100:+.1f} %"
