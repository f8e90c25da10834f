"""``python -m benchmarks.faults.gap``: how long a client waits in mid-answer when the replica that decodes it dies.

For each length of prompt, greedy answers are streamed one after another.  Each loses its decode replica, or only that
one's engine, at a random moment after its first token, and goes on elsewhere (docs/decisions/0030-resume.md).  The gap
is the longest time without a token from then on.  Before the next answer there are two decode replicas again.

One more answer for each length is not streamed: only then the header x-baton-explain comes late enough to tell how many
tokens were cached where it went on.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Coroutine, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any, Literal, TypeVar

import httpx
import msgspec
import numpy
import psutil
import typer
from rich.console import Console
from rich.table import Table

from app.bench.client import find_card, new_async_client, new_client, parse_url
from app.bench.output import check_files
from app.cli.entry import run_app, to_app
from app.errors import BatonError, ConfigError
from benchmarks.faults.campaign import RECOVERY_TIMEOUT_S
from benchmarks.faults.carrying_out import WIDTH
from benchmarks.faults.fleet import Fleet, engine_of
from benchmarks.faults.load import HANG_S, Answer, ask, judge
from benchmarks.faults.process_faults import GONE_S, send_signal
from benchmarks.faults.questions import VOCABULARY, Question

T = TypeVar("T")
Victim = Literal["replica", "engine"]

UNDISTURBED = 3
"""How many answers to each question are asked for before the first fault: to compare with, and for scale."""
KILLED_WITHIN = 0.8
"""The part of the undisturbed time from the first to the last token within which the moments are drawn."""
BUSY_TIMEOUT_S = 60.0
"""The longest time until a decode replica runs a request."""


class NotMeasured(BatonError):
    """An answer that nothing disturbed failed, or no replica could be found that was to be killed."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class Row(msgspec.Struct, frozen=True):
    """What was measured for one length.  Times are in seconds."""

    prompt_tokens: int
    prefill_s: float
    """The time to the first token of an undisturbed answer of whose prompt nothing is cached, the median."""
    step_s: float
    """The time between two of its events, the median."""
    is_steady: bool
    """Whether undisturbed answers were all the same, so that others can be compared with them."""
    gaps_s: list[float]
    """Of the answers that were not over when the replica was killed."""
    ends: Counter[str]
    """How all that lost their replica ended (`load.judge`)."""
    cached_tokens: int | None
    """How many of the prompt and of the tokens before the fault were cached where an answer went on; None if the one
    that was to tell was over before."""


class GapMeasurement:
    """Measures the gaps of one running application."""

    def __init__(self, fleet: Fleet, victim: Victim, output_tokens: int, random: Random) -> None:
        self._fleet = fleet
        self._victim = victim
        self._output_tokens = output_tokens
        self._random = random
        self._client = new_async_client(fleet.url, HANG_S)

    async def close(self) -> None:
        await self._client.aclose()

    async def measure(self, prompt_tokens: int, num: int) -> Row:
        """Have `num` answers lose their replica.  Raises NotMeasured, or NotWhole if it does not come back."""
        prompt = self._random.choices(VOCABULARY, k=prompt_tokens)
        fields = {"prompt": prompt, "max_tokens": self._output_tokens, "ignore_eos": True}
        question = Question("/v1/completions", fields)
        undisturbed = [await self._ask(question) for _ in range(UNDISTURBED)]
        if failed := [answer for answer in undisturbed if not answer.is_whole]:
            raise NotMeasured(f"an answer failed that nothing disturbed: {failed[0].error or failed[0].status}")
        right = undisturbed[0]
        decoding_s = right.heard_at[-1] - right.heard_at[0]
        gaps_s, ends = [], Counter[str]()
        for _ in range(num):
            decoding: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            answer, killed_at = await self._disturbed(self._ask(question, decoding), decoding, decoding_s)
            if (gap_s := answer.stall_s(since=killed_at)) > 0:
                gaps_s.append(gap_s)
                ends[judge(answer, right)] += 1
        busy = self._fleet.busy_decode_replica(BUSY_TIMEOUT_S)
        explained, _ = await self._disturbed(self._explanation(question), busy, decoding_s)
        return Row(
            prompt_tokens,
            prefill_s=median(answer.heard_at[0] - answer.began_at for answer in undisturbed),
            step_s=median(late - early for answer in undisturbed for early, late in pairwise(answer.heard_at)),
            is_steady=all(answer.texts == right.texts for answer in undisturbed),
            gaps_s=gaps_s,
            ends=ends,
            cached_tokens=next(iter(explained["resumed_cached_tokens"]), None),
        )

    async def _ask(self, question: Question, decoding: asyncio.Future[str] | None = None) -> Answer:
        """`decoding` learns with the first token which replica decodes the answer."""

        def learn(headers: httpx.Headers) -> None:
            if decoding is not None:
                decoding.set_result(json.loads(headers["x-baton-explain"])[0]["decode"]["replica"])

        return await ask(self._client, self._fleet.model, question, on_begin=learn)

    async def _explanation(self, question: Question) -> dict[str, Any]:
        body = {**question.body(self._fleet.model), "stream": False}
        answer = await self._client.post(question.path, json=body, headers={"x-baton-explain": "1"})
        answer.raise_for_status()
        explained: dict[str, Any] = json.loads(answer.headers["x-baton-explain"])[0]
        return explained

    async def _disturbed(
        self, answering: Coroutine[Any, Any, T], decoding: Awaitable[str], decoding_s: float
    ) -> tuple[T, float]:
        """Kill what decodes the answer, and wait until another one may be killed.  Returns also when that was."""
        answer = asyncio.create_task(answering)
        replica = await self._fleet.process_of(await decoding)
        victim = [replica] if self._victim == "replica" else engine_of(replica)
        if not victim:
            raise NotMeasured("this engine has no process of its own; write --victim replica")
        await asyncio.sleep(self._random.uniform(0, KILLED_WITHIN * decoding_s))
        killed_at = time.monotonic()
        send_signal(victim, signal.SIGKILL)
        await asyncio.to_thread(psutil.wait_procs, victim, GONE_S)
        await answer
        await self._fleet.until_succeeded(RECOVERY_TIMEOUT_S)
        return answer.result(), killed_at


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print one line for each length."""
    table = Table(
        "prompt tokens", "gap p50 ms", "p99", "max", "of", "right", "others", "step ms", "prefill ms", "cached"
    )
    for row in rows:
        gaps = [f"{1e3 * gap_s:.0f}" for gap_s in numpy.percentile(row.gaps_s or [numpy.nan], [50, 99, 100])]
        others = ", ".join(f"{num} {end}" for end, num in row.ends.items() if end != "right")
        right = f"{row.ends['right']}" + ("" if row.is_steady else " (not steady undisturbed either)")
        scale = [f"{1e3 * row.step_s:.1f}", f"{1e3 * row.prefill_s:.0f}"]
        cached = "too late" if row.cached_tokens is None else f"{row.cached_tokens}"
        table.add_row(f"{row.prompt_tokens}", *gaps, f"{len(row.gaps_s)}", right, others or "none", *scale, cached)
    console.print(table)


def bench_gap(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where Baton serves, on this machine.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    lengths: Annotated[
        str, typer.Option(help="Of prompts, in tokens; longer ones than the model takes are left out.")
    ] = ("500,4000,30000"),
    num: Annotated[int, typer.Option(min=1, help="How many answers of each length lose their replica.")] = 10,
    output_tokens: Annotated[int, typer.Option(min=8, help="Of each answer.")] = 256,
    victim: Annotated[Victim, typer.Option(help="What is killed.")] = "replica",
    seed: Annotated[int, typer.Option(help="Of prompts and moments.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything there.")] = None,
) -> None:
    """Measure how long clients wait in mid-answer when the replica that decodes dies, by the length of prompts.

    Exits with 1 if an answer was not whole, or was another than the undisturbed ones, which are all the same.
    """
    check_files(json_file, None)
    _, base_url = parse_url("URL", url)
    with new_client(base_url, 30.0) as client:
        card = find_card("URL", client, model)
    console = Console(highlight=False, width=WIDTH)
    fitting = _fitting(lengths, card["max_model_len"] - output_tokens, console)
    fleet = Fleet(base_url, str(card["id"]))
    rows: list[Row] = []

    async def run() -> None:
        measurement = GapMeasurement(fleet, victim, output_tokens, Random(seed))
        try:
            await fleet.learn()
            for length in fitting:
                rows.append(row := await measurement.measure(length, num))
                console.print(f"{length} tokens: {[round(1e3 * gap_s) for gap_s in row.gaps_s]} ms")
        finally:
            await measurement.close()
            await fleet.close()

    try:
        asyncio.run(run())
    finally:
        print_rows(rows, console)
        if json_file is not None:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1))
    if any(end != "right" and (end != "wrong" or row.is_steady) for row in rows for end in row.ends):
        raise typer.Exit(1)


def _fitting(lengths: str, longest: int, console: Console) -> list[int]:
    """Return the lengths that the model takes, and say which it does not.  Raises ConfigError."""
    try:
        wanted = [int(length) for length in lengths.split(",")]
    except ValueError:
        raise ConfigError("--lengths", f"{lengths!r} is no list of numbers, as 500,4000") from None
    if too_long := [length for length in wanted if length > longest]:
        console.print(f"left out, as the model takes prompts of at most {longest} tokens: {too_long}")
    return [length for length in wanted if length <= longest]


if __name__ == "__main__":
    run_app(to_app(bench_gap), "benchmarks.faults.gap")
