"""The text of one sequence on its way to a client: detokenized as it comes, merged while it waits."""

from __future__ import annotations

import asyncio
from typing import Any

from app.messages import TokenDelta


class AnswerText:
    """Takes the deltas of one sequence and gives their text, as vLLM's output processor and its queue would.

    `detokenizer` is vLLM's ``IncrementalDetokenizer``, which also looks for stop strings.  If `is_whole`, the text is
    wanted at the end of the sequence only.
    """

    def __init__(self, detokenizer: Any, *, is_whole: bool) -> None:
        self._detokenizer = detokenizer
        self._is_whole = is_whole
        self._text = ""
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._has_news = False
        self._waiter: asyncio.Future[None] | None = None
        """Of whoever waits for news; an asyncio.Event would do, but takes more for each token."""
        self._has_begun = False
        self.finish_reason: str | None = None
        """Why the sequence has ended; None until it has."""
        self.stop_reason: int | str | None = None
        self.cached_tokens = 0
        """Prompt tokens that no engine had to compute, known with the first delta."""

    @property
    def num_tokens(self) -> int:
        """The tokens so far, without those after a stop string."""
        num_tokens: int = self._detokenizer.num_output_tokens()
        return num_tokens

    def take(self, delta: TokenDelta) -> bool:
        """Take a delta.  Returns whether a stop string ends the sequence, for which engines do not look."""
        if self.finish_reason is not None:
            return False
        if not self._has_begun and delta.report is not None:
            self.cached_tokens = delta.report.cached_tokens
        self._has_begun = True
        stop_string = self._detokenizer.update(delta.token_ids, delta.finish_reason == "stop")
        self.finish_reason = "stop" if stop_string else delta.finish_reason
        self.stop_reason = stop_string or delta.stop_reason
        if self._is_whole and self.finish_reason is None:
            return False
        self._text += self._detokenizer.get_next_output_text(self.finish_reason is not None, True)
        self._tell()
        return bool(stop_string) and delta.finish_reason is None

    def fail(self, error: Exception) -> None:
        """End the text with `error`.  What of it still waits is lost."""
        self._error = error
        self._tell()

    def _tell(self) -> None:
        self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> str:
        """Wait for news and return the text that has come since; raise what the sequence failed with.

        Only one task at a time may wait.
        """
        if not self._has_news:
            self._waiter = self._loop.create_future()
            await self._waiter
        self._has_news = False
        if self._error is not None:
            raise self._error
        text, self._text = self._text, ""
        return text
