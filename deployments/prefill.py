"""The prefill deployment: a prompt in, the descriptor of its KV out."""

from __future__ import annotations

from app.messages import GenerateRequest, TransferDescriptor
from deployments.worker import Worker


class PrefillWorker(Worker):
    """One prefill engine.  Serve cancels `prefill` when the caller cancels; the engine then frees the KV."""

    role = "prefill"

    async def prefill(self, request: GenerateRequest, *, replica_id: str) -> TransferDescriptor:
        self.check_is_me(replica_id)
        return await self._engine.prefill(request)
