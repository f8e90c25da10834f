"""``baton bench-cache``: measures what one user gains from a server's prefix cache.

Requests are streamed and sent one at a time, so TTFT is the time of a prompt alone; under load it would be mostly the
time in queues.  The client that sends load is not needed for this.

1. *Cached against uncached*: a prompt that the server cannot know, then the same prompt again.  The two alternate, so
   that a drift of the machine affects both alike.
2. *A conversation*: the prompt of each turn is the last prompt, the model's own answer and a new question.
3. *A shared system prompt*: questions that have nothing else in common.

Every prompt begins with random words or tokens, which are drawn anew in each run: a text that was sent before would be
cached.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import httpx
import msgspec

from app.bench.client import describe, read_events
from app.bench.report import Machine
from app.errors import BatonError

ANSWER_TIMEOUT_S = 300.0
COMPLETION_TOKENS = 8
"""More than one: a server may take a shorter path for an answer of one token."""
CHAT_TOKENS = 32
SYSTEM_WORDS = 300
WARM_UP_WORDS = 200
TOKENS_PER_WORD = 1.3
"""The tokens per word of TEXT, if usage does not tell."""
TEXT = (
    "the river carries small boats past old stone houses while children wait under green trees for their teacher who "
    "walks slowly from market with bread fruit paper and seven letters that nobody has opened since early winter "
    "when snow covered every road between both towns and a long train stood still near one broken bridge"
)
"""Random texts are made of its words and, if the server has /tokenize, random prompts of its tokens, which every model
has."""
QUESTIONS = (
    "Which of these words is the longest?",
    "What could a story made of them be about?",
    "Name three of them that are places.",
    "Which of them would a child learn first?",
    "Write one sentence with as many of them as you can.",
    "Is there a word among them that you did not expect?",
)
NOT_REPORTED = (
    "no answer's usage has prompt_tokens_details with cached_tokens: start vLLM with --enable-prompt-tokens-details, "
    "SGLang with --enable-cache-report (some versions leave it out where nothing was cached)"
)


class CacheBenchError(BatonError):
    """An answer was not as it should be."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class TimedAnswer(msgspec.Struct, frozen=True):
    """One streamed answer.  The counts come from its usage, and are None where usage does not have them."""

    ttft_ms: float
    prompt_tokens: int | None
    cached_tokens: int | None
    text: str


class Pair(msgspec.Struct, frozen=True):
    """The two answers to the same prompt, sent twice."""

    uncached: TimedAnswer
    cached: TimedAnswer


class Summary(msgspec.Struct, frozen=True):
    """The medians over all pairs, and the ratio of the medians."""

    uncached_ttft_ms: float
    cached_ttft_ms: float
    uncached_to_cached: float


class CacheReport(msgspec.Struct, kw_only=True):
    """All results.  A part that was not measured is empty."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    url: str
    model: str
    server_version: str
    prompts_are: str
    summary: Summary | None = None
    repeated: list[Pair] = []
    conversation: list[TimedAnswer] = []
    shared_system_prompt: list[TimedAnswer] = []
    problems: list[str] = []


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: dict[str, Any] | None = None

    @property
    def is_answer(self) -> bool:
        """False for the first event of a chat, which only names the role and may come before anything is computed."""
        delta = self.delta or {}
        return "role" not in delta or any(value for name, value in delta.items() if name != "role")

    @property
    def content(self) -> str:
        return self.text or (self.delta or {}).get("content") or ""


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class PromptClient:
    """Sends streamed requests to the endpoint, one at a time."""

    def __init__(self, client: httpx.Client, model: str, rng: random.Random) -> None:
        """Warm the endpoint up.  Raises CacheBenchError if it does not answer that chat."""
        self._client = client
        self._model = model
        self._rng = rng
        self._vocabulary = find_vocabulary(client, model)
        self._tokens_per_word = TOKENS_PER_WORD
        used = self.chat([{"role": "user", "content": self._words(WARM_UP_WORDS)}]).prompt_tokens
        if used:
            self._tokens_per_word = used / WARM_UP_WORDS

    @property
    def prompts_are(self) -> str:
        return "token ids" if self._vocabulary else "text"

    def new_prompt(self, num_tokens: int) -> str | list[int]:
        """Return a prompt that the server has not seen.  As text it has only about `num_tokens` tokens."""
        return self._rng.choices(self._vocabulary, k=num_tokens) if self._vocabulary else self.new_text(num_tokens)

    def new_text(self, num_tokens: int) -> str:
        return self._words(max(1, round(num_tokens / self._tokens_per_word)))

    def new_system_prompt(self) -> str:
        return self._words(SYSTEM_WORDS)

    def _words(self, count: int) -> str:
        return " ".join(self._rng.choices(TEXT.split(), k=count))

    def complete(self, prompt: str | list[int]) -> TimedAnswer:
        return self._stream("/v1/completions", {"prompt": prompt, "max_tokens": COMPLETION_TOKENS})

    def chat(self, messages: list[dict[str, str]]) -> TimedAnswer:
        return self._stream("/v1/chat/completions", {"messages": messages, "max_tokens": CHAT_TOKENS})

    def _stream(self, path: str, request: dict[str, Any]) -> TimedAnswer:
        asked = {"model": self._model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        sent_at = time.perf_counter()
        try:
            with self._client.stream("POST", path, json={**asked, **request}) as response:
                if not response.is_success:
                    response.read()
                    raise CacheBenchError(f"{path} answered {describe(response)}")
                return _read_answer(response, sent_at)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            raise CacheBenchError(f"{self._client.base_url} broke off an answer: {error!r}") from error


def find_vocabulary(client: httpx.Client, model: str) -> list[int]:
    """Return token ids to draw prompts from; none if the server has no /tokenize, which OpenAI's API lacks."""
    body = {"model": model, "prompt": TEXT, "add_special_tokens": False}
    try:
        answer = client.post("/tokenize", json=body)
        tokens = msgspec.convert(answer.json()["tokens"], list[int]) if answer.is_success else []
    except httpx.HTTPError as error:
        raise CacheBenchError(f"{client.base_url} does not answer /tokenize: {error!r}") from error
    except (ValueError, KeyError, TypeError, msgspec.ValidationError):
        return []
    return tokens


def _read_answer(response: httpx.Response, sent_at: float) -> TimedAnswer:
    """Read a stream.  Raises CacheBenchError if it ends before its end mark, or contains an error or no token."""
    ttft_s, text, usage, is_complete = None, [], _Usage(), False
    for data in read_events(response):
        now = time.perf_counter()
        if data == b"[DONE]":
            is_complete = True
            continue  # read on to the end, or else the connection is not reused
        event = msgspec.json.decode(data, type=_Event)
        if event.error:
            raise CacheBenchError(f"the server broke off an answer: {event.error}")
        if ttft_s is None and any(choice.is_answer for choice in event.choices):
            ttft_s = now - sent_at
        text += [choice.content for choice in event.choices]
        usage = event.usage or usage
    if not is_complete or ttft_s is None:
        raise CacheBenchError(
            "the server broke off an answer: " + ("no token came" if is_complete else "no [DONE] came")
        )
    details = usage.prompt_tokens_details or _Details()
    return TimedAnswer(ttft_s * 1000, usage.prompt_tokens, details.cached_tokens, "".join(text))


def repeat_prompts(server: PromptClient, tokens: int, repeat: int) -> list[Pair]:
    """Send each of `repeat` new prompts twice, after a first pair that does not count."""
    pairs = []
    for _ in range(repeat + 1):
        prompt = server.new_prompt(tokens)
        pairs.append(Pair(uncached=server.complete(prompt), cached=server.complete(prompt)))
    return pairs[1:]


def converse(server: PromptClient, turns: int) -> list[TimedAnswer]:
    """Hold one conversation and return the answer of each turn."""
    messages = [{"role": "system", "content": server.new_system_prompt()}]
    answers = []
    for turn in range(turns):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        answers.append(server.chat(messages))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


def share_system_prompt(server: PromptClient, tokens: int) -> list[TimedAnswer]:
    """Ask all questions with the same system prompt and return the answers."""
    system = {"role": "system", "content": server.new_text(tokens)}
    return [server.chat([system, {"role": "user", "content": question}]) for question in QUESTIONS]


def summarize(pairs: Sequence[Pair]) -> Summary:
    uncached, cached = median(p.uncached.ttft_ms for p in pairs), median(p.cached.ttft_ms for p in pairs)
    return Summary(uncached, cached, uncached / cached)


def find_problems(report: CacheReport) -> list[str]:
    """Return the reasons why the report does not show a working prefix cache, one sentence each."""
    repeats = {
        "prompts that were sent again": [pair.cached for pair in report.repeated],
        "turns of the conversation after its first": report.conversation[1:],
        "questions after the first about the shared system prompt": report.shared_system_prompt[1:],
    }
    if all(answer.cached_tokens is None for answers in repeats.values() for answer in answers):
        return [NOT_REPORTED]
    counts = {what: sum(not answer.cached_tokens for answer in answers) for what, answers in repeats.items()}
    return [
        f"{count} of {len(repeats[what])} {what} had no cached tokens: is prefix caching on, and did they reach the "
        "same replica?"
        for what, count in counts.items()
        if count
    ]
