"""A constant load whose right answers are known, so that every answer under faults can be compared.

Each stream asks one question after another, of a few that all share.  What the answer should be is asked for before the
first fault.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal

import httpx
import msgspec

from app.bench.client import EventParser, new_async_client
from app.errors import BatonError
from benchmarks.faults.questions import Question

HANG_S = 100.0
"""An answer of which nothing comes for so long hangs.  It has to be longer than the application's own limits."""
TICK_S = 0.05
PAUSE_S = 0.2
"""How long a stream waits after an answer that failed, as a client would."""
CLOSE = 1e-2
"""By how much log probabilities may differ.  In float32 on an H200 they differed by up to 2e-3 from those of the same
sequence in another batch."""
FAIR_STATUS = frozenset({429, 502, 503, 504})
"""The statuses with which a request may fail for what is not its fault: clients try again by themselves."""

End = Literal["right", "refused", "ended", "cut", "hung", "wrong"]
"""How an answer ended.

*right*: whole, and the same as without faults.  *refused*: an error status before the first token, of FAIR_STATUS.
*ended*: an error event after some tokens, which were the right ones.  *cut*: the connection broke, or the stream ended
without saying why; the tokens were the right ones.  *hung*: nothing came for HANG_S.  *wrong*: other tokens, or a
status that blames the client or tells nothing."""


class Answer(msgspec.Struct, frozen=True):
    """What one request got.  Times are in seconds of the monotonic clock."""

    question: int
    began_at: float
    ended_at: float
    status: int = 0
    """The HTTP status; 0 if none came."""
    texts: list[str] = []
    """What was generated, for each choice."""
    logprobs: list[float] = []
    is_whole: bool = False
    """Whether the stream said of each choice that it was finished."""
    error: str = ""
    """The error event, or what broke the connection."""
    has_error_event: bool = False
    has_timed_out: bool = False
    heard_at: list[float] = []
    """When something came."""
    id: str = ""
    """The completion's id, by which the frontends' logs name it."""

    def stall_s(self, since: float = -math.inf, until: float = math.inf) -> float:
        """Return the longest time without an event, from the request on, of those that lasted within `since` and
        `until`, if only for a part."""
        pairs = pairwise([self.began_at, *self.heard_at])
        return max((late - early for early, late in pairs if late >= since and early <= until), default=0.0)


def judge(answer: Answer, right: Answer) -> End:
    """Say how an answer ended that should be `right`."""
    if answer.has_timed_out:
        return "hung"
    begins_right = all(whole.startswith(part) for whole, part in zip(right.texts, answer.texts, strict=False))
    are_close = all(abs(one - other) < CLOSE for one, other in zip(right.logprobs, answer.logprobs, strict=False))
    if not (begins_right and are_close):
        return "wrong"
    if answer.is_whole:
        has_all = answer.texts == right.texts and len(answer.logprobs) == len(right.logprobs)
        return "right" if has_all else "wrong"
    if answer.status not in (0, 200):
        return "refused" if answer.status in FAIR_STATUS else "wrong"
    return "ended" if answer.has_error_event else "cut"


class Load:
    """Streams of requests, from `start` to `stop`; `pause` and `resume` in between."""

    def __init__(
        self, url: str, model: str, questions: Sequence[Question], num_streams: int, socket: Path | None = None
    ) -> None:
        """`socket`: as `new_async_client`."""
        self.questions = questions
        self.right: list[Answer] = []
        """The right answer to each question; `ask_undisturbed` fills it."""
        self.answers: list[Answer] = []
        self.lags: list[tuple[float, float]] = []
        """How late this process got the CPU at times, in seconds.  What its clients waited for is late by as much, and
        on a machine that is overloaded the application itself is no better off."""
        self._url = url
        self._model = model
        self._socket = socket
        self._num_streams = num_streams
        self._may_send = asyncio.Event()
        self._streams: list[asyncio.Task[None]] = []
        self._num_open = 0

    async def ask_undisturbed(self) -> None:
        """Ask each question twice, under this load's concurrency.

        Raises UnsteadyAnswer if two answers differ, as then nothing can be compared.
        """
        gate = asyncio.Semaphore(self._num_streams)

        async def ask_in_turn(number: int) -> Answer:
            async with gate:
                return await ask(client, self._model, self.questions[number], number)

        async with new_async_client(self._url, HANG_S, self._socket) as client:
            numbers = [*range(len(self.questions))] * 2
            answers = await asyncio.gather(*map(ask_in_turn, numbers))
        self.right = answers[: len(self.questions)]
        for answer in answers:
            if not answer.is_whole or judge(answer, self.right[answer.question]) != "right":
                raise UnsteadyAnswer(answer.question, answer.error or f"status {answer.status}, or another text")

    def start(self) -> None:
        self._may_send.set()
        self._streams = [asyncio.create_task(self._send(n), name=f"load-{n}") for n in range(self._num_streams)]
        self._streams.append(asyncio.create_task(self._measure_lags(), name="load-lags"))

    async def pause(self) -> None:
        """Send nothing more, and return when all answers have ended."""
        self._may_send.clear()
        while self._num_open:  # noqa: ASYNC110  several streams, and none may wait for the last
            await asyncio.sleep(PAUSE_S)

    def resume(self) -> None:
        self._may_send.set()

    async def stop(self) -> None:
        """End in order.  Raises what ended a stream, if anything did."""
        await self.pause()
        for stream in self._streams:
            stream.cancel()
        await asyncio.wait(self._streams)
        for stream in self._streams:
            if not stream.cancelled():
                stream.result()

    async def _measure_lags(self) -> None:
        while True:
            due_at = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.lags.append((now, now - due_at))

    async def _send(self, stream: int) -> None:
        random = Random(stream)
        async with new_async_client(self._url, HANG_S, self._socket) as client:
            while True:
                await self._may_send.wait()
                self._num_open += 1
                try:
                    number = random.randrange(len(self.questions))
                    answer = await ask(client, self._model, self.questions[number], number)
                finally:
                    self._num_open -= 1
                self.answers.append(answer)
                if not answer.is_whole:
                    await asyncio.sleep(PAUSE_S)


async def ask(
    client: httpx.AsyncClient,
    model: str,
    question: Question,
    number: int = 0,
    on_begin: Callable[[httpx.Headers], None] | None = None,
) -> Answer:
    """Ask a question, the `number`-th of its load, and read the stream of its answer.

    `on_begin` gets the headers, which come with the first token, and the explanation in them (app/frontend/explain.py).
    """
    reading = _Reading()
    began_at = time.monotonic()
    found: dict[str, Any] = {}
    try:
        headers = {} if on_begin is None else {"x-baton-explain": "1"}
        async with client.stream("POST", question.path, json=question.body(model), headers=headers) as response:
            found["status"] = response.status_code
            if on_begin is not None:
                on_begin(response.headers)
            if response.status_code == httpx.codes.OK:
                await reading.read(response)
            else:
                found["error"] = (await response.aread()).decode(errors="replace")
    except httpx.TimeoutException as problem:
        found |= {"has_timed_out": True, "error": repr(problem)}
    except httpx.HTTPError as problem:
        found["error"] = repr(problem)
    return Answer(number, began_at, time.monotonic(), **{**reading.fields(), **found})


class _Reading:
    """A stream as it is read."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, list[float]] = {}
        self._unfinished: set[int] = set()
        self._has_ended = self._has_error_event = False
        self._error = ""
        self._heard_at: list[float] = []
        self._id = ""

    async def read(self, response: httpx.Response) -> None:
        parser = EventParser()
        async for chunk in response.aiter_bytes():
            self._heard_at.append(time.monotonic())
            for data in parser.feed(chunk):
                self._take(data)

    def _take(self, data: bytes) -> None:
        if not data.startswith(b"{"):  # [DONE]
            self._has_ended = True
            return
        event = json.loads(data)
        if "error" in event:
            self._has_error_event, self._error = True, data.decode()
            return
        self._id = event["id"]
        for choice in event["choices"]:
            index = choice["index"]
            self._texts[index] = self._texts.get(index, "") + _text(choice)
            if choice.get("logprobs"):
                self._logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            (self._unfinished.add if choice["finish_reason"] is None else self._unfinished.discard)(index)

    def fields(self) -> dict[str, Any]:
        return {
            "texts": [text for _, text in sorted(self._texts.items())],
            "logprobs": [each for _, logprobs in sorted(self._logprobs.items()) for each in logprobs],
            "is_whole": self._has_ended and not (self._has_error_event or self._unfinished),
            "has_error_event": self._has_error_event,
            "error": self._error,
            "heard_at": self._heard_at,
            "id": self._id,
        }


def _text(choice: dict[str, Any]) -> str:
    """Return what an event of a completion or a chat adds to a choice: text, or arguments of a tool call."""
    if "text" in choice:
        return str(choice["text"])
    delta = choice["delta"]
    calls = delta.get("tool_calls") or []
    return (delta.get("content") or "") + "".join(call["function"].get("arguments") or "" for call in calls)


class UnsteadyAnswer(BatonError):
    """Without any fault two answers to one question differ, or one failed."""

    def __init__(self, question: int, problem: str) -> None:
        super().__init__(question, problem)
        self.question = question
        self.problem = problem

    def __str__(self) -> str:
        return f"question {self.question} has no steady answer without faults: {self.problem}"
