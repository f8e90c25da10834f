"""Faults of clients: what they send and do that they should not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from random import Random
from urllib.parse import urlsplit

import httpx
import msgspec

from app.bench.client import new_async_client
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.fleet import Fleet


class ClientFault(msgspec.Struct, frozen=True):
    """Clients that do what they should not."""

    name: str
    misbehave: Callable[[str, str], Awaitable[None]]
    """Gets the URL and the model.  Raises BadAnswer."""

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Raises BadAnswer."""
        try:
            await self.misbehave(fleet.url, fleet.model)
        except httpx.HTTPError as problem:
            raise BadAnswer(f"no answer: {problem!r}") from problem
        return ""


JSON = {"content-type": "application/json"}


async def _refused(client: httpx.AsyncClient, body: bytes, statuses: tuple[int, ...]) -> None:
    answer = await client.post("/v1/completions", content=body, headers=JSON)
    if answer.status_code not in statuses:
        raise BadAnswer(f"{answer.status_code} instead of {statuses}: {answer.text[:200]}")


def completion_body(model: str, **fields: object) -> bytes:
    return json.dumps({"model": model, "prompt": [400, 401, 402], "max_tokens": 4, **fields}).encode()


async def poison(url: str, model: str) -> None:
    """Values that no field may have, as numbers beyond what the engines' tensors hold."""
    values: list[dict[str, object]] = [
        {"top_k": 2**31},
        {"top_k": 10**30},
        {"min_tokens": 2**40},
        {"stop_token_ids": [2**33]},
        {"logit_bias": {"999999": 1}},
        {"prompt": [2**31]},
        {"seed": 2**70},
    ]
    async with new_async_client(url, 30.0) as client:
        for fields in values:
            await _refused(client, completion_body(model, **fields), (400, 422))


async def flood_of_sequences(url: str, model: str) -> None:
    async with new_async_client(url, 60.0) as client:
        await _refused(client, completion_body(model, prompt=[[400]] * 1024, n=4096), (400, 413, 422, 429))


async def flood_of_bytes(url: str, model: str) -> None:
    """Bodies of 40 MB, some at a time, by a client that sends all before it looks for an answer."""
    body = completion_body(model, user="x" * 40_000_000)
    async with new_async_client(url, 60.0) as client:
        await asyncio.gather(*(_refused(client, body, (400, 413, 429)) for _ in range(4)))


async def silent_clients(url: str, model: str) -> None:
    """Connections that send half of a request's head and then nothing, while others are served."""
    address = urlsplit(url)
    writers = []
    try:
        for _ in range(300):
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
            writers.append(writer)
        async with new_async_client(url, 30.0) as client:
            answer = await client.get("/health")
            if not answer.is_success:
                raise BadAnswer(f"/health beside silent clients: {answer.status_code}")
    finally:
        for writer in writers:
            writer.close()


async def clients_that_leave(url: str, model: str) -> None:
    """Streams whose client goes away: at once, before and after the first token."""

    async def leave(client: httpx.AsyncClient, after_s: float) -> None:
        body = completion_body(model, max_tokens=200, ignore_eos=True, stream=True)
        try:
            async with (
                asyncio.timeout(after_s),
                client.stream("POST", "/v1/completions", content=body, headers=JSON) as response,
            ):
                await response.aread()
        except TimeoutError:
            return

    async with new_async_client(url, 30.0) as client:
        await asyncio.gather(*(leave(client, after_s / 100) for after_s in range(1, 31)))


async def burst(url: str, model: str) -> None:
    """Four times as many streams as there are slots, for a short time; each answer must be a fair one."""

    async def ask(client: httpx.AsyncClient, number: int) -> int:
        body = completion_body(model, prompt=[500 + number % 1000, *range(400, 1000)], max_tokens=16)
        return (await client.post("/v1/completions", content=body, headers=JSON)).status_code

    async with new_async_client(url, 120.0) as client:
        statuses = set(await asyncio.gather(*(ask(client, number) for number in range(256))))
    if not statuses <= {200, 429, 503}:
        raise BadAnswer(f"statuses under a burst: {sorted(statuses)}")


CLIENT_FAULTS = (
    ClientFault("poison", poison),
    ClientFault("flood of sequences", flood_of_sequences),
    ClientFault("flood of bytes", flood_of_bytes),
    ClientFault("silent clients", silent_clients),
    ClientFault("clients that leave", clients_that_leave),
    ClientFault("burst", burst),
)
