"""An SGLang plug-in that has NIXL register the KV cache as the host memory that it is.

SGLang takes the KV cache for GPU memory unless its caller says otherwise, and on a CPU nobody does. UCX then refuses
the registration, and the engine ends at its start.

SGLang loads the entry points of the group ``sglang.srt.plugins`` (``pyproject.toml`` names this one) in each of an
engine's processes before a KV manager is made.
"""

from __future__ import annotations

from typing import Any

KV_MANAGER_INIT = "sglang.srt.disaggregation.nixl.conn.NixlKVManager.__init__"


def register() -> None:
    """Have each KV manager's arguments say DRAM before it reads them; does nothing where torch finds a GPU."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        HookRegistry.register(KV_MANAGER_INIT, _say_dram, HookType.BEFORE)


def _say_dram(manager: Any, args: Any, *_others: Any, **_named: Any) -> None:
    """Take what ``NixlKVManager.__init__`` takes, change its first argument, and leave which it gets as they are."""
    args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
