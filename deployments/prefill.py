"""The prefill deployment: a prompt in, the descriptor of its KV out."""

from __future__ import annotations

import asyncio

from app.config import BatonConfig
from app.messages import GenerateRequest, TransferDescriptor
from deployments.worker import Worker


class PrefillWorker(Worker):
    """One prefill engine."""

    role = "prefill"

    async def __init__(self, config: BatonConfig, device: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._running: dict[str, asyncio.Task[TransferDescriptor]] = {}
        await super().__init__(config, device)

    async def prefill(self, request: GenerateRequest, *, replica_id: str) -> TransferDescriptor:
        self.check_is_me(replica_id)
        task = asyncio.create_task(self._engine.prefill(request), name=request.request_id)
        self._running[request.request_id] = task
        self._publisher.look_soon()
        try:
            return await task
        finally:
            del self._running[request.request_id]
            self._publisher.look_soon()

    def num_requests(self) -> tuple[int, int]:
        return len(self._running), 0

    async def abandon(self, request_id: str, *, replica_id: str) -> None:
        """Stop a prefill, or what goes on of it after `prefill` has returned: nobody will pull its KV.

        Cancelling the call of `prefill` would not do: it can strike between the engine's answer and Serve's, and the
        descriptor, by which decode has the KV freed, would be lost.
        """
        self.check_is_me(replica_id)
        if (task := self._running.get(request_id)) is not None:
            task.cancel()
        await self._engine.abandon(request_id)
