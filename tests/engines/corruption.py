"""What a test has a decode engine's workers do: spoil KV between its arrival and what becomes of it.

vLLM adds the class to its workers (``worker_extension_cls``).  It is imported there, so nothing here needs pytest.
"""

from __future__ import annotations

from typing import Any, Literal

from app.engines.plugins import nixl_checksum

Damage = Literal["bit", "stale"]
"""One bit of one block in the last layer, or all blocks: in each layer they hold what the first one does."""


class Corruption:
    def spoil_next_read(self, damage: Damage) -> None:
        """Spoil what the next transfer brings, once."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group().connector_worker
        release = worker.nixl_wrapper.release_xfer_handle

        def spoil(handle: Any) -> None:
            worker.nixl_wrapper.release_xfer_handle = release
            release(handle)
            (request_id,) = (name for name, handles in worker._recving_transfers.items() if handle in handles)
            (block_ids,) = worker._recving_metadata[request_id].local_physical_block_ids
            layers = nixl_checksum._layers(worker)
            if damage == "bit":
                layers[-1][block_ids[3], 17] ^= 1
                return
            for layer in layers:
                layer[block_ids[1:]] = layer[block_ids[0]].clone()

        worker.nixl_wrapper.release_xfer_handle = spoil
