"""What one request may take of the frontend: sequences, prompt tokens, log probabilities, bytes and time for schemas.

The bounds are those of `LimitsConfig`.  A request with several prompts comes here once for each of them, so their sums
are kept in the request's context.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from app.config import LimitsConfig
from app.errors import InvalidRequest, Overloaded
from app.frontend.request_context import RequestContext
from app.messages import GenerateRequest
from app.sampling_ranges import check_request, check_seeds

SCHEMA_THREADS = 4
"""Threads for the schemas of all requests of one model.  One request has at most one of them."""

SEQUENCES = (
    "n times the number of prompts must be at most {most} sequences (limits.max_sequences_per_request): "
    "send several requests"
)

T = TypeVar("T")


class RequestBounds:
    """The bounds of the requests for one model, whose vocabulary has `vocab_size` tokens.

    All methods raise InvalidRequest, which names the field, its bound and the setting.
    """

    def __init__(self, limits: LimitsConfig, vocab_size: int) -> None:
        self._limits = limits
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(SCHEMA_THREADS, "baton-schema")

    def check_sequences(self, num_sequences: int) -> None:
        """Refuse a request for its number of sequences."""
        if num_sequences > (most := self._limits.max_sequences_per_request):
            raise InvalidRequest(SEQUENCES.format(most=most))

    def check_fields(self, params: Any, reasoning_parser_kwargs: dict[str, Any] | None) -> None:
        """Refuse a request for the size of a field, before anything is computed from it.

        `params` are vLLM's ``SamplingParams``.
        """
        sized = {
            "stop": params.stop,
            "bad_words": params.bad_words,
            "structured_outputs (response_format, tools)": vars(params.structured_outputs)
            if params.structured_outputs
            else None,
            "vllm_xargs": params.extra_args,
            "chat_template_kwargs": reasoning_parser_kwargs,
        }
        for name, value in sized.items():
            if not _is_within(value, most := self._limits.max_field_bytes):
                raise InvalidRequest(f"{name} must be at most {most} bytes (limits.max_field_bytes)")
        check_seeds(params.seed, params.n)

    def check_values(self, request: GenerateRequest) -> None:
        """Refuse a request for values that no engine could hold."""
        check_request(request, self._vocab_size)

    @contextmanager
    def counted(
        self, context: RequestContext, *, n: int, prompt_tokens: int, prompt_logprobs: int | None
    ) -> Iterator[None]:
        """Count `n` sequences of one prompt to their request while the block runs.

        Beam search and tool calls have many prompts one after another, so it is what runs at once that counts.
        """
        candidates = self._vocab_size if prompt_logprobs == -1 else max(prompt_logprobs or 0, 1)
        num_logprobs = 0 if prompt_logprobs is None else candidates * prompt_tokens * n
        context.add(n, n * prompt_tokens, num_logprobs)
        try:
            yield
        finally:
            context.add(-n, -n * prompt_tokens, -num_logprobs)

    def check_sums(self, context: RequestContext) -> None:
        """Refuse a request for what its prompts take together: all of them, also when some have ended for this."""
        context.refusal = context.refusal or self._problem_of_sums(context)
        if context.refusal:
            raise InvalidRequest(context.refusal)

    def _problem_of_sums(self, context: RequestContext) -> str:
        if context.num_sequences > (most := self._limits.max_sequences_per_request):
            return SEQUENCES.format(most=most)
        most = self._limits.max_prompt_tokens_per_request
        if context.num_sequences > 1 and context.num_prompt_tokens > most:
            return (
                f"prompt must be at most {most} tokens, counted once for each sequence "
                "(limits.max_prompt_tokens_per_request): send several requests, or lower n"
            )
        if context.num_prompt_logprobs > (most := self._limits.max_prompt_logprobs):
            return (
                f"prompt_logprobs times the prompts' tokens and n must be at most {most} "
                "(limits.max_prompt_logprobs): ask for fewer candidates, or of shorter prompts"
            )
        return ""

    async def beside_the_loop(self, context: RequestContext, translate: Callable[[], T]) -> T:
        """Run `translate`, which translates a schema or grammar, in a thread, and return what it returns.

        Raises InvalidRequest if a request's schemas take longer than ``limits.schema_timeout_s``, and Overloaded if
        those of others kept all threads busy for so long.  A late thread cannot be ended: its result is dropped, and
        the request gets no other one beside it.
        """
        began: list[float] = []

        def timed() -> T:
            began.append(time.monotonic())
            return translate()

        async with context.schema_lock:
            if (left_s := self._limits.schema_timeout_s - context.schema_s) <= 0:
                raise self._too_slow()
            try:
                async with asyncio.timeout(left_s):
                    return await asyncio.get_running_loop().run_in_executor(self._threads, timed)
            except TimeoutError:
                if not began:
                    raise Overloaded(self._limits.schema_timeout_s) from None
                context.schema_s = self._limits.schema_timeout_s
                raise self._too_slow() from None
            finally:
                context.schema_s += time.monotonic() - began[0] if began else 0.0

    def _too_slow(self) -> InvalidRequest:
        return InvalidRequest(
            f"structured_outputs, response_format or tools: their schemas took longer than "
            f"{self._limits.schema_timeout_s:g} s (limits.schema_timeout_s): make them simpler"
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _is_within(value: Any, max_bytes: int) -> bool:
    """Return whether `value` has at most `max_bytes` as JSON, about.  Looks at no more than that."""
    waiting = [value]
    while waiting and max_bytes >= 0:
        each = waiting.pop()
        if isinstance(each, str):
            max_bytes -= len(each) if each.isascii() else len(each.encode(errors="surrogatepass"))
        elif isinstance(each, Mapping):
            waiting += (*each.keys(), *each.values())
        elif isinstance(each, list | tuple):
            waiting += each
        max_bytes -= 2
    return max_bytes >= 0
