"""Whether the replicas of a model's prefill and decode pools can trade their roles while they run.

An engine keeps the arguments that it started with.  What KV is like has to be the same in both directions, and a prompt
that one pool takes must fit the other's engines.  All else that differs only makes an engine less good at a new role.
"""

from __future__ import annotations

from app.config import ModelConfig, PoolConfig
from app.engines.transfer_rules import SAME_IF_GIVEN
from app.errors import ConfigError

FORBIDDING = ("max_model_len", "block_size", "prefill_context_parallel_size", "decode_context_parallel_size")
"""Engine arguments that both pools must have alike.  What else has to be is checked wherever KV moves
(app/engines/transfer_rules.py)."""


def check_trade(field: str, model: ModelConfig) -> list[str]:
    """Return what differs between the pools and limits a replica in the other one's role, as warnings.

    Raises ConfigError that names what forbids it; `field` is the model's.
    """
    if model.prefill is None:
        raise ConfigError(f"{field}.prefill", "missing: without it there is one role only, and nothing to switch")
    if not model.can_switch_roles:
        raise ConfigError(
            f"{field}.decode.engine",
            f"{model.engine} starts each engine for one role (disaggregation_mode), so its replicas cannot switch: "
            "change the numbers of replicas instead, without --switch and gpus, or run vllm",
        )
    prefill, decode = model.prefill, model.decode
    if prefill.tensor_parallel_size != decode.tensor_parallel_size:
        raise ConfigError(
            f"{field}.prefill.tensor_parallel_size",
            f"{prefill.tensor_parallel_size} at prefill and {decode.tensor_parallel_size} at decode: replicas switch "
            "only between pools whose replicas are of one size",
        )
    differing = _differing(model, prefill, decode)
    for name in (*FORBIDDING, *SAME_IF_GIVEN[model.engine]):
        if name in differing:
            raise ConfigError(
                f"{field}.prefill.engine_args.{name}",
                f"{differing[name]}: replicas switch only between pools that have it alike; set it in "
                f"{field}.engine_args",
            )
    if prefill.resources.num_gpus != decode.resources.num_gpus:
        raise ConfigError(
            f"{field}.prefill.resources.num_gpus", "differs from decode's: replicas that switch keep what they have"
        )
    return [f"{field}: {name} is {how}; a replica that switches keeps its own" for name, how in differing.items()]


def describe_trade(field: str, model: ModelConfig) -> list[str]:
    """Return lines that say whether replicas of the two pools can trade their roles, and what limits or forbids it."""
    try:
        warnings = check_trade(field, model)
    except ConfigError as error:
        return [f"replicas cannot switch between prefill and decode: {error}"]
    return [f"{field}: replicas can switch between prefill and decode while they run", *warnings]


def _differing(model: ModelConfig, prefill: PoolConfig, decode: PoolConfig) -> dict[str, str]:
    """Return the engine arguments and environment variables that differ, and how."""
    sides = [{**model.merged_engine_args(pool), **pool.environment} for pool in (prefill, decode)]
    return {
        name: f"{sides[0].get(name, 'not set')} at prefill and {sides[1].get(name, 'not set')} at decode"
        for name in sorted(sides[0].keys() | sides[1].keys())
        if sides[0].get(name) != sides[1].get(name)
    }
