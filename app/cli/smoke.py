"""``baton smoke``: does a running Baton serve in every way that it should?

Each check sends a few requests, one after the other.  The checks assume nothing about what a model says: they look at
an answer's shape, its usage and what Baton says about its routing.  Prompts are random, so that none of them was cached
before, and no longer than the model allows.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from statistics import median
from typing import Annotated, Any, Literal, TypeVar

import httpx
import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from app.bench.client import check_admin, describe, find_card, new_client, parse_url, read_events, use_key
from app.bench.prefix_cache import COMPLETION_TOKENS, PromptClient, converse, find_vocabulary, repeat_prompts
from app.cli.options import ApiKey
from app.errors import BatonError, ConfigError
from app.messages import PrefillMode

ANSWER_TIMEOUT_S = 120.0
LONG_PROMPT_TOKENS = 2000
SHORT_PROMPT_TOKENS = 8
STREAM_TOKENS = 32
TURNS = 5
JSON_TOKENS = 1024
"""This is enough even for a model that reasons before it answers."""
JSON_ATTEMPTS = 3
"""More than one, because a weak model may fill an answer with white space, which JSON allows."""
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Say hello to the people of a small town."}]
COLOURS = ["red", "green", "blue"]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}},
    "required": ["colour"],
    "additionalProperties": False,
}
T = TypeVar("T")


class Unexpected(Exception):
    """A check failed."""

    def __init__(self, expected: str, came: object) -> None:
        super().__init__(f"expected {expected}; came {came}")


class Skipped(Exception):
    """A check does not apply to this model; the message says why."""


class Result(msgspec.Struct, frozen=True):
    """The result of one check."""

    check: str
    verdict: Literal["ok", "skipped", "FAILED"]
    seconds: float
    said: str


class Card(msgspec.Struct, frozen=True):
    """What /v1/models says about a model.  Servers other than Baton leave some of it out."""

    id: str
    engine: str
    mode: str
    state: str
    max_model_len: int


class _ModelHealth(msgspec.Struct):
    name: str
    state: str
    pools: dict[str, dict[str, int]]


class _Health(msgspec.Struct):
    status: str
    models: list[_ModelHealth]


class _Replica(msgspec.Struct):
    """A replica in the answer of /stats.  It has no numbers if it could not be reached."""

    replica_id: str
    num_transfers: int = 0
    transferred_bytes: int = 0
    transport: str = ""


class _Stats(msgspec.Struct):
    replicas: list[_Replica]


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | None = None


class _Choice(msgspec.Struct):
    """A choice in an answer (`message`, `finish_reason`) or in an event (`delta`)."""

    finish_reason: str | None = None
    message: _Message | None = None
    delta: dict[str, Any] = {}


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None

    @property
    def kind(self) -> str:
        """The kind of event, as `EVENT_ORDER` names it."""
        if self.error is not None:
            return f"an error ({self.error})"
        if not self.choices:
            return "usage" if self.usage else "nothing"
        if any(choice.finish_reason for choice in self.choices):
            return "finish"
        return "tokens" if self.has_output else "role"

    @property
    def has_output(self) -> bool:
        return any(value for choice in self.choices for name, value in choice.delta.items() if name != "role")


DONE = "[DONE]"
EVENT_ORDER = ["role", "tokens", "finish", "usage", DONE]


class _Chosen(msgspec.Struct):
    replica: str


class _Actual(msgspec.Struct):
    kind: str | None
    reason: str | None
    ttft_ms: float | None


class Explanation(msgspec.Struct):
    """The explanation of one sequence in the header x-baton-explain."""

    kind: str
    reason: str
    actual: _Actual
    prefill: _Chosen | None = None
    decode: _Chosen | None = None
    aggregated: _Chosen | None = None

    @property
    def way(self) -> str:
        """Where the prompt was prefilled, and why."""
        reason = self.actual.reason or self.reason
        return f"{self.actual.kind} ({reason})" if reason else str(self.actual.kind)


class SmokeTarget:
    """The application under test, and the model that is asked for."""

    def __init__(self, client: httpx.Client, card: Card) -> None:
        self.client = client
        self.card = card
        self._vocabulary = find_vocabulary(client, card.id)
        if not self._vocabulary:
            raise ConfigError("URL", f"{client.base_url} has no /tokenize; is it Baton that runs there?")

    @property
    def long_prompt_tokens(self) -> int:
        return min(LONG_PROMPT_TOKENS, self.card.max_model_len - 2 * COMPLETION_TOKENS)

    def random_prompt(self, num_tokens: int) -> list[int]:
        return random.choices(self._vocabulary, k=num_tokens)

    def read(self, path: str, shape: type[T]) -> T:
        return _decode(self.client.get(path), shape)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        headers = {"x-baton-explain": "1"}
        return self.client.post(path, json={"model": self.card.id, **fields}, headers=headers)

    def chat(self, **fields: Any) -> _Answer:
        return _decode(self.post(CHAT, **fields), _Answer)

    def complete(self, prompt: list[int], prefill: PrefillMode) -> tuple[_Answer, Explanation]:
        response = self.post(
            COMPLETIONS, prompt=prompt, max_tokens=COMPLETION_TOKENS, vllm_xargs={"baton_prefill": prefill}
        )
        answer = _decode(response, _Answer)
        explanations = msgspec.json.decode(response.headers.get("x-baton-explain", "[]"), type=list[Explanation])
        if not explanations:
            raise Unexpected("a response header x-baton-explain of the sequence", "none")
        return answer, explanations[0]

    def stream(self, **fields: Any) -> Iterator[bytes]:
        """Yield the data of each event as it comes."""
        body = {"model": self.card.id, "stream": True, "stream_options": {"include_usage": True}, **fields}
        with self.client.stream("POST", CHAT, json=body) as response:
            if not response.is_success:
                response.read()
                raise Unexpected("a stream", describe(response))
            yield from read_events(response)

    def replicas(self) -> dict[str, _Replica]:
        return {replica.replica_id: replica for replica in self.read("/stats", _Stats).replicas}


def _decode(response: httpx.Response, shape: type[T]) -> T:
    if not response.is_success:
        raise Unexpected("an answer", describe(response))
    return msgspec.json.decode(response.content, type=shape)


def check_health(baton: SmokeTarget) -> str:
    health = baton.read("/health", _Health)
    pools = {
        model.name: f"{model.state}, " + ", ".join(f"{pool['ready']} {role}" for role, pool in model.pools.items())
        for model in health.models
    }
    if health.status != "healthy":
        came = "; ".join(f"{name} {described}" for name, described in pools.items())
        raise Unexpected("status healthy", f"{health.status} ({came})")
    return pools.get(baton.card.id, "not in /health")


def check_models(baton: SmokeTarget) -> str:
    card = baton.card
    if card.state != "ready":
        raise Unexpected(f"{card.id} ready", card.state)
    return f"{card.id}: {card.engine}, {card.mode}, up to {card.max_model_len} tokens"


def check_chat(baton: SmokeTarget) -> str:
    answer = baton.chat(messages=HELLO, max_tokens=16)
    choice = answer.choices[0] if answer.choices else _Choice()
    if choice.message is None or choice.message.role != "assistant" or choice.finish_reason is None:
        raise Unexpected("a message of the assistant that is finished", choice)
    if not 1 <= answer.usage.completion_tokens <= 16:
        raise Unexpected("1 to 16 tokens", answer.usage.completion_tokens)
    return f"{answer.usage.completion_tokens} tokens, finished by {choice.finish_reason}"


def check_streaming(baton: SmokeTarget) -> str:
    sent_at = time.perf_counter()
    kinds, moments, usage = [], [], None
    for data in baton.stream(messages=HELLO, max_tokens=STREAM_TOKENS, ignore_eos=True):
        now = time.perf_counter()
        if data == DONE.encode():
            kinds.append(DONE)
            continue
        event = msgspec.json.decode(data, type=_Event)
        kinds.append(event.kind)
        usage = event.usage or usage
        if event.has_output:
            moments.append(now)
    order = [kind for kind, _ in groupby(kinds)]
    # If an engine is faster than its frontend, all tokens may come in the last event.
    if order not in (EVENT_ORDER, [kind for kind in EVENT_ORDER if kind != "tokens"]) or not moments:
        raise Unexpected(f"events in the order {', '.join(EVENT_ORDER)}", ", ".join(order) or "no event")
    if usage is None or usage.completion_tokens != STREAM_TOKENS:
        raise Unexpected(f"usage of {STREAM_TOKENS} completion tokens", usage)
    gaps = [(later - earlier) * 1e3 for earlier, later in pairwise(moments)]
    itl = f", ITL median {median(gaps):.1f} ms" if gaps else ""
    return f"TTFT {(moments[0] - sent_at) * 1e3:.1f} ms{itl}, {len(moments)} events for {STREAM_TOKENS} tokens"


def check_remote_prefill(baton: SmokeTarget) -> str:
    if baton.card.mode != "disaggregated":
        raise Skipped("the model is served aggregated: there is no prefill pool")
    prompt = baton.random_prompt(baton.long_prompt_tokens)
    before = baton.replicas()
    answer, explanation = baton.complete(prompt, "remote")
    if explanation.actual.kind != "remote" or explanation.prefill is None or explanation.decode is None:
        raise Unexpected("remote prefill", explanation.way)
    if answer.usage.prompt_tokens != len(prompt):
        raise Unexpected(f"usage of {len(prompt)} prompt tokens", answer.usage.prompt_tokens)
    name = explanation.decode.replica
    was, now = (replicas.get(name, _Replica(name)) for replicas in (before, baton.replicas()))
    moved = now.transferred_bytes - was.transferred_bytes
    if now.num_transfers <= was.num_transfers or moved <= 0:
        raise Unexpected(
            f"KV moved to decode replica {name}",
            f"{now.num_transfers - was.num_transfers} transfers of {moved} bytes in /stats",
        )
    return (
        f"{len(prompt)} tokens from {explanation.prefill.replica} to {name}: {moved / 1e6:.1f} MB by "
        f"{now.transport or 'a transport that is not known'}, TTFT {explanation.actual.ttft_ms or 0:.1f} ms"
    )


def check_short_prompt(baton: SmokeTarget) -> str:
    _, explanation = baton.complete(baton.random_prompt(SHORT_PROMPT_TOKENS), "auto")
    serving = explanation.decode or explanation.aggregated
    if explanation.actual.kind is None or serving is None:
        raise Unexpected("an explanation of where it was served", explanation)
    by = f" by {explanation.prefill.replica}" if explanation.prefill and explanation.actual.kind == "remote" else ""
    return f"{SHORT_PROMPT_TOKENS} tokens: prefilled {explanation.way}{by}, decoded by {serving.replica}"


def check_cache_reuse(baton: SmokeTarget) -> str:
    server = PromptClient(baton.client, baton.card.id, random.Random())
    pair = repeat_prompts(server, baton.long_prompt_tokens, 1)[0]
    if not pair.cached.cached_tokens:
        raise Unexpected("cached tokens when a prompt is sent again", pair.cached.cached_tokens)
    first, again = pair.uncached.ttft_ms, pair.cached.ttft_ms
    return (
        f"{pair.cached.cached_tokens} of {pair.cached.prompt_tokens} tokens cached, TTFT {first:.1f} ms, then "
        f"{again:.1f} ms: {first / again:.1f} times as quick"
    )


def check_conversation(baton: SmokeTarget) -> str:
    session = {"x-session-id": uuid.uuid4().hex}
    with new_client(str(baton.client.base_url), ANSWER_TIMEOUT_S) as client:
        client.headers.update(session)
        turns = converse(PromptClient(client, baton.card.id, random.Random()), TURNS)
    cached = [turn.cached_tokens or 0 for turn in turns]
    of = f"{', '.join(map(str, cached))} of {', '.join(str(turn.prompt_tokens) for turn in turns)} tokens"
    if not (all(cached[1:]) and cached[0] < cached[-1] >= cached[1]):
        raise Unexpected("cached tokens that grow with each turn", of)
    return f"{TURNS} turns, cached {of}"


def check_structured_output(baton: SmokeTarget) -> str:
    if baton.card.engine == "sim":
        raise Skipped("the sim engine computes nothing, so it cannot obey a schema")
    response_format = {"type": "json_schema", "json_schema": {"name": "choice", "schema": SCHEMA}}
    messages = [{"role": "user", "content": "Name a colour as JSON."}]
    max_tokens = min(JSON_TOKENS, baton.card.max_model_len // 2)
    for _ in range(JSON_ATTEMPTS):
        answer = baton.chat(messages=messages, max_tokens=max_tokens, response_format=response_format)
        choice = answer.choices[0] if answer.choices else _Choice()
        if choice.finish_reason == "stop":
            break
    text = choice.message.content if choice.message else None
    if choice.finish_reason != "stop" or not _obeys_schema(text or ""):
        raise Unexpected(f"JSON with a colour of {', '.join(COLOURS)}", f"{text!r}, ended by {choice.finish_reason}")
    return " ".join((text or "").split())


def _obeys_schema(text: str) -> bool:
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return isinstance(found, dict) and set(found) == {"colour"} and found["colour"] in COLOURS


def check_unknown_model(baton: SmokeTarget) -> str:
    name = f"no-such-model-{uuid.uuid4().hex[:8]}"
    return _check_refused(baton.post(CHAT, model=name, messages=HELLO), 404, name)


def check_bad_input(baton: SmokeTarget) -> str:
    return _check_refused(baton.post(CHAT, messages=HELLO, temperature=-1), 400, "temperature")


def _check_refused(response: httpx.Response, status: int, name: str) -> str:
    if response.status_code != status or name not in response.text:
        raise Unexpected(f"{status} that names {name}", describe(response))
    return str(status)


CHECKS: dict[str, Callable[[SmokeTarget], str]] = {
    "health": check_health,
    "models": check_models,
    "chat": check_chat,
    "streaming": check_streaming,
    "long prompt, remote prefill": check_remote_prefill,
    "short prompt": check_short_prompt,
    "cache reuse": check_cache_reuse,
    "conversation with a session": check_conversation,
    "structured output": check_structured_output,
    "unknown model": check_unknown_model,
    "bad input": check_bad_input,
}


def run_check(name: str, baton: SmokeTarget) -> Result:
    began = time.perf_counter()
    verdict: Literal["ok", "skipped", "FAILED"] = "ok"
    try:
        said = CHECKS[name](baton)
    except Skipped as reason:
        verdict, said = "skipped", str(reason)
    except (Unexpected, BatonError) as error:
        verdict, said = "FAILED", str(error)
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        verdict, said = "FAILED", f"expected an answer; came {error!r}"
    return Result(name, verdict, time.perf_counter() - began, said)


def find_models(client: httpx.Client, name: str | None) -> list[Card]:
    """Return the model called `name`, or all models.  Raises ConfigError if there is none, or if this is not Baton."""
    find_card("URL", client, name)
    check_admin(client)
    try:
        cards = msgspec.convert(client.get("/v1/models").json()["data"], list[Card])
    except msgspec.ValidationError as error:
        raise ConfigError("URL", f"/v1/models is not Baton's ({error}); what runs at {client.base_url}?") from None
    return [card for card in cards if name in (None, card.id)]


def smoke(
    url: Annotated[str, typer.Argument(help="Where Baton serves.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default every one that is served.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Check that a running application serves in every way that it should.

    The exit code is 1 if a check fails, 2 if there is nothing to check.
    """
    use_key(api_key)
    _, base_url = parse_url("URL", url)
    console = Console(highlight=False)
    failed: list[str] = []
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        for card in find_models(client, model):
            baton = SmokeTarget(client, card)
            results = [run_check(check, baton) for check in CHECKS]
            _print(card.id, results, console)
            failed += [f"{card.id}, {each.check}: {each.said}" for each in results if each.verdict == "FAILED"]
    for line in failed:
        console.print(f"FAILED {line}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
    console.print("passed")


def _print(model: str, results: list[Result], console: Console) -> None:
    table = Table("check", "", Column("s", justify="right"), "", title=model, title_justify="left")
    for result in results:
        said = "see below" if result.verdict == "FAILED" else result.said
        table.add_row(result.check, result.verdict, f"{result.seconds:.2f}", Text(said))
    console.print(table)
