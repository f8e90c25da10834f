"""Whether one engine can use the KV that another has computed.

The pools of one configuration fit together (transfer_rules.py).  While an application is updated, replicas of the old
and of the new configuration or image run side by side, and some of these pairs do not.  So each replica says what its
KV is like, prefill with each descriptor.  Decode takes KV only if it fits, and says of each pair why not (links.py).
What is left to the engines, as in the rules for pools, is what only a running engine knows.
"""

from __future__ import annotations

from app.config import ModelConfig
from app.engines.base import EngineInfo
from app.engines.transfer_rules import DEFAULT_LAYOUT, LAYOUT, SAME_ARGS, SAME_IF_GIVEN
from app.messages import EngineName, KvFormat, Role

KV_PROTOCOL = 2
"""Rises with each change of what a prefill and a decode replica of Baton tell each other, unless either may ignore it:
the descriptor, what the plug-ins put into its `params`, and what the engines expect of each other's plug-ins."""

MODEL_ARGS: dict[EngineName, tuple[str, ...]] = {
    "vllm": ("revision", "hf_overrides"),
    "sglang": ("revision", "json_model_override_args"),
    "sim": (),
}
"""Engine arguments that make another model of the same source."""


def kv_format(model: ModelConfig, role: Role, info: EngineInfo) -> KvFormat:
    """Return what the KV of a replica with that role is like."""
    pool = model.pool(role)
    assert pool is not None
    arguments = {**SAME_ARGS[pool.engine], **model.merged_engine_args(pool)}
    names = (*SAME_ARGS[pool.engine], *SAME_IF_GIVEN[pool.engine], *MODEL_ARGS[pool.engine])
    settings = {name: str(arguments[name]) for name in names if arguments.get(name) is not None}
    if pool.engine == "vllm":
        settings[LAYOUT] = pool.environment.get(LAYOUT, DEFAULT_LAYOUT)
    return KvFormat(
        protocol=KV_PROTOCOL,
        engine=info.engine,
        engine_version=info.version,
        model=model.source,
        settings=settings,
        block_size_tokens=info.block_size_tokens,
        tensor_parallel_size=pool.tensor_parallel_size,
    )


def mismatch(prefill: KvFormat | None, decode: KvFormat) -> str:
    """Return why decode cannot use prefill's KV, as far as the two tell; empty if it can."""
    if prefill == decode:
        return ""
    if prefill is None:
        return "prefill does not say what its KV is like: it is of an older version"
    for name in ("protocol", "engine", "engine_version", "model"):
        if (there := getattr(prefill, name)) != (here := getattr(decode, name)):
            return _differ(name, there, here)
    for name in sorted(prefill.settings.keys() | decode.settings.keys()):
        if (there := prefill.settings.get(name)) != (here := decode.settings.get(name)):
            return _differ(name, there, here)
    there, here = prefill.tensor_parallel_size, decode.tensor_parallel_size
    if there % here and here % there:
        return _differ("tensor_parallel_size", there, here)
    there, here = prefill.block_size_tokens, decode.block_size_tokens
    if here % there if decode.engine == "vllm" else here != there:
        return _differ("block_size_tokens", there, here)
    return ""


def _differ(name: str, prefill: object, decode: object) -> str:
    return f"KV of another kind: {name} is {prefill} at prefill and {decode} at decode"
