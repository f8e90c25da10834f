"""vLLM's own API server over an engine that computes nothing: the least cost of any server with vLLM's frontend in it.

The engine yields one token per output, with its text (the least that a server without an engine core process does).
It does so as fast as its consumer takes them or, like the steps of an engine, once for all sequences every TOKEN_MS.
Everything else, such as rendering the prompt and making the events, is vLLM's.  It has to work in two environments:
with Baton's vLLM and with the one that Ray Serve LLM pins.

``python -m benchmarks.peers.fake_engine --model PATH --served-model-name NAME --host HOST --port PORT``
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from tokenizers.decoders import DecodeStream
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.v1.engine.input_processor import InputProcessor

TOKEN_MS = "FAKE_ENGINE_TOKEN_MS"
"""The environment variable with the time of a step in ms.  Without it the engine is as fast as possible."""
FIRST_TOKEN, TOKEN_STEP, NUM_TOKENS = 300, 37, 1500
"""The token ids that come out.  None is special in a vocabulary of some thousands, and no two neighbours are equal."""


class FakeEngine:
    """The part of vLLM's EngineClient that its completion and chat endpoints use."""

    is_running = True
    is_stopped = False
    errored = False
    dead_error = RuntimeError("a fake engine does not die")

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._step_s = float(os.environ.get(TOKEN_MS, 0)) / 1000

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncIterator[RequestOutput]:
        tokenizer = self.renderer.tokenizer._tokenizer
        text_of = DecodeStream(skip_special_tokens=True)
        prompt_token_ids = prompt["prompt_token_ids"]
        last, step = sampling_params.max_tokens - 1, 0
        for index in range(sampling_params.max_tokens):
            step = await self._next_step(step)
            token = FIRST_TOKEN + index * TOKEN_STEP % NUM_TOKENS
            completion = CompletionOutput(
                index=0,
                text=text_of.step(tokenizer, token) or "",
                token_ids=[token],
                cumulative_logprob=None,
                logprobs=None,
                finish_reason="length" if index == last else None,
            )
            yield RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=prompt_token_ids,
                prompt_logprobs=None,
                outputs=[completion],
                finished=index == last,
                num_cached_tokens=0,
            )

    async def _next_step(self, last: int) -> int:
        """Wait for the next step after `last`, which is the same moment for all requests, and return its number."""
        if not self._step_s:
            await asyncio.sleep(0)  # let other requests run, or else one would end before the next one begins
            return 0
        now = asyncio.get_running_loop().time()
        step = max(last, int(now / self._step_s)) + 1
        await asyncio.sleep(step * self._step_s - now)
        return step

    def check_admission(self, *_: Any, **__: Any) -> None:
        """Admit everything."""

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def is_tracing_enabled(self) -> bool:
        return False

    async def check_health(self) -> None:
        """Return: the engine is always healthy."""

    async def do_log_stats(self) -> None:
        """Do nothing: there are no statistics."""

    async def abort(self, request_id: Any) -> None:
        """Do nothing: a request ends when its generator is closed."""

    async def reset_mm_cache(self) -> None:
        """Do nothing: there is no such cache."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing: there is nothing to end."""


async def _serve() -> None:
    import uvicorn
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    tasks = ("generate",)
    app = build_app(arguments, tasks, config.model_config)
    await init_app_state(FakeEngine(config), app.state, arguments, tasks)
    options = uvicorn.Config(app, host=arguments.host, port=arguments.port, log_level="warning", access_log=False)
    await uvicorn.Server(options).serve()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
