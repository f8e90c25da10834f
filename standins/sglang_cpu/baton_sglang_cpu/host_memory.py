"""An SGLang plug-in that makes NIXL register the KV cache as host memory, which it is on a CPU.

SGLang registers the KV cache as GPU memory unless its caller says otherwise, and on a CPU no caller does. UCX then
refuses the registration, and the engine ends at its start.

SGLang loads the entry points of the group ``sglang.srt.plugins`` (``pyproject.toml`` names this one) in each process of
an engine before a KV manager is made.
"""

from __future__ import annotations

from typing import Any

KV_MANAGER_INIT = "sglang.srt.disaggregation.nixl.conn.NixlKVManager.__init__"


def register() -> None:
    """Set DRAM in the arguments of each KV manager before it reads them.  Does nothing if torch finds a GPU."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        HookRegistry.register(KV_MANAGER_INIT, _say_dram, HookType.BEFORE)


def _say_dram(manager: Any, args: Any, *_others: Any, **_named: Any) -> None:
    """Set DRAM in the first argument of ``NixlKVManager.__init__``.  The other arguments stay as they are."""
    args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
