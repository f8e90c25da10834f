"""What each engine demands of a prefill and a decode pool between which KV moves, and of a pool's tensor parallelism.

Engines find most mismatches only at the first transfer.  vLLM's decode then prefills every prompt itself, and SGLang's
fails every request.  So what the configuration and the model's ``config.json`` tell is checked before engines start.
Each check names the function upstream that it goes by (vLLM 0.32.0, SGLang 0.5.23), and for the rules about heads,
blocks and layouts tests/unit/engines/test_transfer_rules.py compares with what these functions do.  What only a running
engine knows, as the attention backend that it chooses, is left to the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from app.config import ModelConfig
from app.errors import ConfigError
from app.messages import EngineName

SAME_ARGS: dict[EngineName, dict[str, Any]] = {
    "vllm": {"dtype": "auto", "kv_cache_dtype": "auto", "disable_hybrid_kv_cache_manager": False},
    "sglang": {"dtype": "auto", "kv_cache_dtype": "auto"},
    "sim": {},
}
"""Engine arguments that prefill and decode must have alike, with what an engine takes that is told nothing.

vLLM refuses a peer whose ``compute_nixl_compatibility_hash`` (nixl/metadata.py) differs.  SGLang compares the dtype of
the KV in ``CommonKVManager.try_ensure_parallel_info`` (disaggregation/common/conn.py).  ``auto`` counts as different
from any dtype, because the checkpoint may name one."""

SAME_IF_GIVEN: dict[EngineName, tuple[str, ...]] = {
    "vllm": ("attention_backend",),
    "sglang": ("page_size",),
    "sim": (),
}
"""Engine arguments that must be alike too, by the same functions, but whose defaults only the engines know."""

HIDDEN_STATE_METHODS = ("eagle", "eagle3", "mtp", "dflash", "dspark")
SPECULATION = ("method", "model", "revision", "code_revision", "parallel_drafting", "kv_cache_dtype")
"""vLLM's speculation methods whose drafts have KV of their own (``SpeculativeConfig.use_eagle``), and the keys of
`speculative_config` that are part of the hash then (``_get_speculative_compatibility_factors`` in nixl/metadata.py)."""

LAYOUT = "VLLM_KV_CACHE_LAYOUT"
LAYOUT_ALIASES = {"NHD": "LBNHC", "HND": "LBHNC"}
DEFAULT_LAYOUT = "LBHNC"
"""What vLLM's NixlConnector asks for (``get_required_kvcache_layout`` in nixl/connector.py), unless `LAYOUT` is set."""
SPLITTABLE_LAYOUTS = ("LBHNC", "BLHNC")
"""The layouts in which a block's heads are contiguous (``KVCacheLayout.is_block_contiguous``)."""


class KvShape(msgspec.Struct, frozen=True):
    """What the rules ask of a model."""

    num_heads: int
    num_kv_heads: int
    """Of all GPUs together."""
    is_mla: bool
    """Multi-head latent attention: every GPU has all of the KV, whatever the number of heads."""
    has_states: bool
    """Whether some layers keep a state (Mamba, linear attention) instead of the KV of each token."""


def kv_shape(config: Mapping[str, Any]) -> KvShape | None:
    """Return the shape of the model with this ``config.json``; None if its heads are not told in the usual way."""
    config = config.get("text_config") or config
    num_heads, num_kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not (isinstance(num_heads, int) and isinstance(num_kv_heads, int) and num_heads > 0 and num_kv_heads > 0):
        return None
    layers = set(config.get("layer_types") or ())
    named = any(word in key for key in config for word in ("mamba", "ssm", "linear_"))
    return KvShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        is_mla=config.get("kv_lora_rank") is not None,
        has_states=named or not layers <= {"full_attention", "sliding_attention", "chunked_attention"},
    )


class _Side(msgspec.Struct, frozen=True):
    """One of the two pools."""

    tensor_parallel_size: int
    args: dict[str, Any]
    environment: dict[str, str]

    def layout(self) -> str:
        layout = self.environment.get(LAYOUT, DEFAULT_LAYOUT)
        return LAYOUT_ALIASES.get(layout, layout)


class _Pair(msgspec.Struct, frozen=True):
    """The two pools of one model, and what is known of the model."""

    engine: EngineName
    prefill: _Side
    decode: _Side
    shape: KvShape | None

    @property
    def splits_heads(self) -> bool:
        """Whether a GPU of one pool has other KV heads than a GPU of the other."""
        differ = self.prefill.tensor_parallel_size != self.decode.tensor_parallel_size
        return differ and self.shape is not None and not self.shape.is_mla

    def values(self, name: str) -> tuple[Any, Any]:
        return self.prefill.args.get(name), self.decode.args.get(name)


def check_heads(field: str, tensor_parallel_size: int, shape: KvShape | None) -> None:
    """Check that the heads can be spread over the GPUs of one replica.  Raises ConfigError for `field`.

    vLLM: ``ModelConfig.verify_with_parallel_config``, and for KV heads the models (``LlamaAttention``).  SGLang: the
    models.
    """
    size = tensor_parallel_size
    if shape is None or size == 1:
        return
    if shape.num_heads % size:
        raise ConfigError(
            field, f"the model has {shape.num_heads} attention heads, which {size} GPUs cannot share equally"
        )
    kv = shape.num_kv_heads
    if not shape.is_mla and kv % size and size % kv:
        raise ConfigError(
            field, f"the model has {kv} KV heads: set a number of GPUs that divides {kv} or is a multiple of it"
        )


def check_transfer(field: str, model: ModelConfig, shape: KvShape | None) -> None:
    """Check that KV can move from the prefill to the decode pool of `model`, whose configuration is at `field`.

    Raises ConfigError that names the setting, the rule and what to do.  `shape` is None if the model is not at hand.
    """
    if model.prefill is None:
        return
    prefill, decode = (
        _Side(pool.tensor_parallel_size, model.merged_engine_args(pool), pool.environment)
        for pool in (model.prefill, model.decode)
    )
    pair = _Pair(model.engine, prefill, decode, shape)
    for check in RULES[model.engine]:
        check(field, pair)


def _check_same(field: str, pair: _Pair) -> None:
    for name, default in SAME_ARGS[pair.engine].items():
        prefill, decode = (side.args.get(name) for side in (pair.prefill, pair.decode))
        if (default if prefill is None else prefill) != (default if decode is None else decode):
            raise ConfigError(
                f"{field}.engine_args.{name}",
                f"prefill has {_shown(prefill)} and decode {_shown(decode)}, but KV moves between them as it is: "
                "set it here rather than in a pool",
            )
    for name in SAME_IF_GIVEN[pair.engine]:
        prefill, decode = pair.values(name)
        if None not in (prefill, decode) and str(prefill).upper() != str(decode).upper():
            raise ConfigError(
                f"{field}.engine_args.{name}",
                f"prefill has {prefill} and decode {decode}, but their KV must be laid out alike: set it here rather "
                "than in a pool",
            )


def _shown(value: Any) -> Any:
    return "none" if value is None else value


def _check_multiple(field: str, pair: _Pair) -> None:
    """The GPUs of one pool must be a multiple of the other's.

    vLLM: ``TransferTopology.tp_ratio`` (kv_connector/utils.py).  SGLang divides the numbers without a check in
    ``CommonKVManager._resolve_rank_mapping`` (disaggregation/common/conn.py), and takes KV of the wrong GPUs.
    """
    prefill, decode = pair.prefill.tensor_parallel_size, pair.decode.tensor_parallel_size
    if prefill % decode and decode % prefill:
        raise ConfigError(
            f"{field}.prefill.tensor_parallel_size",
            f"{prefill} and decode's {decode} do not fit: KV moves only if one is a multiple of the other",
        )


def _check_length(field: str, pair: _Pair) -> None:
    """Prefill must take every prompt that decode takes: the frontend goes by decode's length.

    vLLM: ``InputProcessor`` (v1/engine/input_processor.py).  SGLang: ``TokenizerManager``.
    """
    name = "max_model_len" if pair.engine == "vllm" else "context_length"
    prefill, decode = pair.values(name)
    if isinstance(prefill, int) and isinstance(decode, int) and 0 < prefill < decode:
        raise ConfigError(
            f"{field}.prefill.engine_args.{name}",
            f"prefill refuses prompts of more than {prefill} tokens, but decode takes {decode}: set at least {decode}",
        )


def _check_replicas_of_heads(field: str, pair: _Pair) -> None:
    """vLLM's decode does not read KV heads that several prefill GPUs have.

    ``NixlBaseConnectorWorker._validate_remote_agent_handshake`` (nixl/base_worker.py).
    """
    prefill, decode, shape = pair.prefill.tensor_parallel_size, pair.decode.tensor_parallel_size, pair.shape
    if shape is None or not pair.splits_heads or shape.has_states:
        return
    if prefill > decode and prefill > shape.num_kv_heads:
        raise ConfigError(
            f"{field}.prefill.tensor_parallel_size",
            f"vLLM cannot move KV from {prefill} GPUs that share {shape.num_kv_heads} KV heads to decode's {decode}: "
            f"set at most {max(decode, shape.num_kv_heads)}",
        )


def _check_block_size(field: str, pair: _Pair) -> None:
    """Decode's blocks must be whole numbers of prefill's, and equal to them if prefill has more GPUs.

    ``TransferTopology.block_size_ratio`` (kv_connector/utils.py) and ``_validate_remote_agent_handshake``.
    """
    prefill, decode = pair.values("block_size")
    if prefill is None and decode is not None:
        raise ConfigError(
            f"{field}.decode.engine_args.block_size",
            "decode's blocks have to be whole numbers of prefill's, whose size is not set: set it in the model's "
            "engine_args, for both",
        )
    if not (isinstance(prefill, int) and isinstance(decode, int) and prefill > 0 and decode != prefill):
        return
    name, shown = (
        f"{field}.decode.engine_args.block_size",
        f"decode's blocks of {decode} tokens and prefill's {prefill}",
    )
    if decode % prefill:
        raise ConfigError(name, f"{shown} do not fit: set a multiple of {prefill}, or the same for both")
    more_prefill = pair.prefill.tensor_parallel_size > pair.decode.tensor_parallel_size
    if more_prefill and pair.splits_heads and pair.shape is not None and not pair.shape.has_states:
        raise ConfigError(name, f"{shown} must be the same if prefill has more GPUs than decode")


def _check_layout(field: str, pair: _Pair) -> None:
    """Both pools have one KV layout, and one that can be split by heads if their numbers of GPUs differ.

    ``_validate_remote_agent_handshake``; latent attention has no such rule.
    """
    given = [side.environment.get(LAYOUT) for side in (pair.prefill, pair.decode)]
    if pair.shape is None or pair.shape.is_mla or given == [None, None]:
        return
    role = "decode" if given[1] else "prefill"
    name, prefill, decode = f"{field}.{role}.environment.{LAYOUT}", pair.prefill.layout(), pair.decode.layout()
    if prefill != decode:
        raise ConfigError(
            name,
            f"prefill's layout is {prefill} and decode's {decode}, but KV moves between equal ones only: remove it",
        )
    copies = pair.prefill.tensor_parallel_size > pair.shape.num_kv_heads
    if pair.splits_heads and not copies and decode not in SPLITTABLE_LAYOUTS:
        raise ConfigError(
            name,
            f"{decode} cannot be split by heads, but the pools' tensor_parallel_size differs: remove it, or set the "
            "same tensor_parallel_size",
        )


def _check_speculation(field: str, pair: _Pair) -> None:
    """Both pools draft alike, or neither does, where drafts have KV of their own: it is part of vLLM's hash."""

    def factors(side: _Side) -> dict[str, Any] | None:
        given = side.args.get("speculative_config") or {}
        is_hashed = isinstance(given, Mapping) and given.get("method") in HIDDEN_STATE_METHODS
        return {key: given.get(key) for key in SPECULATION} if is_hashed else None

    if factors(pair.prefill) != factors(pair.decode):
        raise ConfigError(
            f"{field}.engine_args.speculative_config",
            "prefill and decode differ, but the drafts of such a method have KV too, which moves with the model's: set "
            "it here rather than in a pool",
        )


def _check_vllm_pipeline(field: str, pair: _Pair) -> None:
    """vLLM's decode cannot be spread by layers: ``NixlBaseConnectorWorker.__init__`` (nixl/base_worker.py)."""
    if pair.decode.args.get("pipeline_parallel_size", 1) != 1:
        raise ConfigError(
            f"{field}.decode.engine_args.pipeline_parallel_size",
            "vLLM's decode receives KV with 1 only: set it in prefill's engine_args, or raise tensor_parallel_size",
        )


def _check_sglang_pipeline(field: str, pair: _Pair) -> None:
    """``CommonKVManager._resolve_rank_mapping`` (disaggregation/common/conn.py)."""
    prefill, decode = pair.prefill.args.get("pp_size", 1), pair.decode.args.get("pp_size", 1)
    if decode not in (1, prefill):
        raise ConfigError(f"{field}.decode.engine_args.pp_size", f"set 1 or prefill's {prefill}, not {decode}")


def _check_slices(field: str, pair: _Pair) -> None:
    """Decode with more GPUs than prefill cannot slice heads of which several prefill GPUs have copies.

    ``NixlKVManager._init_hetero_tp_prep_handle`` (disaggregation/nixl/conn.py).
    """
    prefill, decode, shape = pair.prefill.tensor_parallel_size, pair.decode.tensor_parallel_size, pair.shape
    if shape is not None and pair.splits_heads and decode > prefill > shape.num_kv_heads:
        raise ConfigError(
            f"{field}.decode.tensor_parallel_size",
            f"SGLang cannot move KV from {prefill} GPUs that share {shape.num_kv_heads} KV heads to {decode}: set "
            f"prefill's {prefill}, or at most {shape.num_kv_heads} for prefill",
        )


def _check_block_scales(field: str, pair: _Pair) -> None:
    """``CommonKVManager.try_ensure_parallel_info`` (disaggregation/common/conn.py)."""
    if pair.splits_heads and pair.decode.args.get("kv_cache_dtype") == "mxfp8":
        raise ConfigError(
            f"{field}.prefill.tensor_parallel_size",
            f"the scales of kv_cache_dtype mxfp8 cannot be split: set decode's {pair.decode.tensor_parallel_size}",
        )


RULES: dict[EngineName, tuple[Callable[[str, _Pair], None], ...]] = {
    "vllm": (
        _check_same,
        _check_speculation,
        _check_multiple,
        _check_replicas_of_heads,
        _check_block_size,
        _check_layout,
        _check_vllm_pipeline,
        _check_length,
    ),
    "sglang": (
        _check_same,
        _check_multiple,
        _check_slices,
        _check_block_scales,
        _check_sglang_pipeline,
        _check_length,
    ),
    "sim": (),
}
