"""A tiny OpenAI endpoint for the tests of `baton bench`: it streams as many chunks as it is asked for tokens."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

CHUNK = b'data: {"choices": [{"index": 0, "text": " a"}]}\n\n'


class TinyServer:
    """Keeps what it was sent; `tokens_per_chunk`, `fail_every` and `stop_after` change how it answers."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.moments: list[float] = []
        self.num_running = 0
        self.most_running = 0
        self.tokens_per_chunk = 1
        self.fail_every = 0
        self.stop_after = 1_000_000
        self.models: list[dict[str, Any]] = [{"id": "tiny", "root": "/nowhere", "max_model_len": 512}]

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": " a"}]})
        self.bodies.append(body)
        self.moments.append(time.monotonic())
        if self.fail_every and len(self.bodies) % self.fail_every == 0:
            return web.Response(status=503, reason="No Replica")
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            return await self._stream(request, body)
        finally:
            self.num_running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        num_tokens = min(body["max_tokens"], self.stop_after)
        for _ in range(0, num_tokens, self.tokens_per_chunk):
            await asyncio.sleep(0.002)
            await response.write(CHUNK)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": self.models})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "1.2.3"})


@contextmanager
def serving() -> Iterator[TinyServer]:
    """The endpoint, on a loop and a port of its own."""
    server = TinyServer()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(_start(server), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(server: TinyServer) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_get("/version", server.version)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    return runner
