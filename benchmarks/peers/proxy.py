"""The smallest proxy for prefill and decode apart: the lower bound with which Baton's own overhead is compared.

For a completion it asks prefill for one token, then decode with the transfer parameters from prefill, and streams the
answer through.  It knows one prefill and one decode server, does not route, and does not recover from failures.

``python -m benchmarks.peers.proxy PORT PREFILL_URL DECODE_URL``
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from app.engines.vllm_surface import ASK_FOR_HANDOFF

SESSION = web.AppKey("session", aiohttp.ClientSession)


class Proxy:
    """Sends each request through the two servers."""

    def __init__(self, prefill_url: str, decode_url: str) -> None:
        self._prefill_url = prefill_url
        self._decode_url = decode_url

    async def complete(self, request: web.Request) -> web.StreamResponse:
        session = request.app[SESSION]
        body = await request.json()
        prompt_only = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK_FOR_HANDOFF}
        prompt_only.pop("stream_options", None)
        async with session.post(self._prefill_url + request.path, json=prompt_only) as answer:
            if answer.status != 200:
                return web.Response(status=answer.status, body=await answer.read())
            body["kv_transfer_params"] = (await answer.json())["kv_transfer_params"]
        async with session.post(self._decode_url + request.path, json=body) as upstream:
            response = web.StreamResponse(status=upstream.status)
            response.content_type = upstream.content_type
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
        return response


def make_app(prefill_url: str, decode_url: str) -> web.Application:
    """Return the application, which has only /v1/completions."""
    proxy = Proxy(prefill_url, decode_url)
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.cleanup_ctx.append(_session)
    app.router.add_post("/v1/completions", proxy.complete)
    return app


async def _session(app: web.Application) -> AsyncIterator[None]:
    no_limits = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=no_limits[0], timeout=no_limits[1]) as session:
        app[SESSION] = session
        yield


if __name__ == "__main__":
    port, prefill_url, decode_url = sys.argv[1:]
    web.run_app(make_app(prefill_url, decode_url), host="127.0.0.1", port=int(port), print=None, access_log=None)
