"""What Baton uses of SGLang's ``Engine``.  It is private to SGLang and may change.

`launch` checks that all of it is there.  The protocols also tell the type checker what the adapter may use.
tests/unit/engines/test_sglang_surface.py says when a workaround can be deleted.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal, NotRequired, Protocol, TypedDict, cast

from app.upstream import check_protocol, needed

READ_ELSEWHERE = {"SGLANG_USE_CPU_ENGINE"}
"""Environment variables that SGLang reads although they are not in its own table."""


class FinishReason(TypedDict):
    type: Literal["stop", "length", "abort"]
    message: NotRequired[str]
    status_code: NotRequired[int | None]
    matched: NotRequired[int | None]


TokenLogprob = tuple[float | None, int, str | None]
"""The log probability of a token (a prompt's first has none), the token, and its text where SGLang detokenizes."""

Candidates = list[tuple[float, int, str | None]]
"""The most likely tokens of one position, likewise."""


class MetaInfo(TypedDict):
    finish_reason: FinishReason | None
    cached_tokens: int
    input_token_logprobs: NotRequired[list[TokenLogprob]]
    input_top_logprobs: NotRequired[list[Candidates | None]]
    output_token_logprobs: NotRequired[list[TokenLogprob]]
    output_top_logprobs: NotRequired[list[Candidates | None]]


class Output(TypedDict):
    """What SGLang adds to one request in one step."""

    output_ids: list[int]
    meta_info: MetaInfo


class Dtype(Protocol):
    itemsize: int


class AttentionArch(Protocol):
    name: str


class ModelConfig(Protocol):
    vocab_size: int
    dtype: Dtype
    attention_arch: AttentionArch
    num_hidden_layers: int
    head_dim: int
    v_head_dim: int

    def get_total_num_kv_heads(self) -> int: ...


class MlaConfig(Protocol):
    """The configuration of a model with multi-head latent attention."""

    kv_lora_rank: int
    qk_rope_head_dim: int


class DisaggregationLoad(Protocol):
    prefill_bootstrap_queue_reqs: int
    prefill_inflight_queue_reqs: int


class QueueLoad(Protocol):
    prealloc_ready: int


class Load(Protocol):
    """The load that a scheduler reports."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    disaggregation: DisaggregationLoad | None
    queues: QueueLoad | None


class LoadReader(Protocol):
    def read_all(self) -> Sequence[Load]: ...


class TokenizerManager(Protocol):
    model_config: ModelConfig
    context_len: int
    tokenizer: Any
    load_snapshot_reader: LoadReader

    def auto_create_handle_loop(self) -> None: ...

    async def get_internal_state(self) -> Sequence[dict[str, Any]]: ...


class ServerArgs(Protocol):
    page_size: int | None
    chunked_prefill_size: int | None
    kv_cache_dtype: str


class SchedulerInitResult(Protocol):
    scheduler_infos: Sequence[dict[str, Any]]


class Engine(Protocol):
    tokenizer_manager: TokenizerManager
    server_args: ServerArgs
    _scheduler_init_result: SchedulerInitResult

    async def async_generate(
        self,
        *,
        input_ids: list[int],
        sampling_params: dict[str, Any],
        stream: bool,
        rid: str,
        cache_salt: str | None,
        require_reasoning: bool,
        return_logprob: bool = ...,
        logprob_start_len: int = ...,
        top_logprobs_num: int = ...,
        priority: int = ...,
        bootstrap_host: str = ...,
        bootstrap_port: int = ...,
        bootstrap_room: int = ...,
    ) -> AsyncGenerator[Output, None]: ...

    def get_all_child_pids(self) -> list[int]: ...

    def shutdown(self) -> None: ...


class OlderTokenizerManager(Protocol):
    def generate_request(self, obj: Any, request: None) -> AsyncGenerator[Output, None]: ...


class OlderEngine(Protocol):
    """What differs in an ``Engine`` that has no `cache_salt` (0.5.17, the newest for torch 2.11)."""

    tokenizer_manager: OlderTokenizerManager

    def get_all_child_pids(self) -> list[int]: ...

    def shutdown(self) -> None: ...


def has_cache_salt() -> bool:
    """Return whether this SGLang knows a request's `cache_salt`, and tells it in its KV events.

    An older one takes it as `extra_key`, which has the same effect on its cache, but it tells nobody.
    """
    with needed("sglang", "keep the caches of tenants apart"):
        from sglang.srt.entrypoints.engine import Engine as SglangEngine

        return _takes_cache_salt(SglangEngine.async_generate)


@cache
def _takes_cache_salt(async_generate: Callable[..., Any]) -> bool:
    parameters = inspect.signature(async_generate).parameters.values()
    return any(each.name == "cache_salt" or each.kind == each.VAR_KEYWORD for each in parameters)


async def generate(engine: Engine, arguments: dict[str, Any]) -> AsyncGenerator[Output, None]:
    """Start a request; `arguments` are those of `Engine.async_generate`.  Raises ValueError if SGLang refuses them."""
    if _takes_cache_salt(type(engine).async_generate):
        return await engine.async_generate(**arguments)
    from sglang.srt.managers.io_struct import GenerateReqInput

    fields = {("extra_key" if name == "cache_salt" else name): value for name, value in arguments.items()}
    older = cast(OlderEngine, engine)
    return older.tokenizer_manager.generate_request(GenerateReqInput(**fields), None)


def argument_names() -> frozenset[str]:
    """Return the names of all arguments of an engine."""
    with needed("sglang", "check an engine's arguments"):
        from sglang.srt.server_args import ServerArgs

        fields = getattr(ServerArgs, "__struct_fields__", None) or ServerArgs.__dataclass_fields__
        return frozenset(fields)


def launch(arguments: dict[str, Any]) -> Engine:
    """Start SGLang's processes and return when the model is loaded.

    Raises TypeError or ValueError for arguments that SGLang refuses, and UpstreamChanged if SGLang lacks a name that
    Baton uses.
    """
    import sglang

    check_classes()
    engine: Engine = sglang.Engine(**arguments)
    try:
        _check_engine(engine)
    except BaseException:
        engine.shutdown()
        raise
    return engine


def check_classes() -> None:
    """Raise UpstreamChanged if a class of the installed SGLang lacks a name that Baton uses."""
    with needed("sglang", "see an engine's load"):
        from sglang.srt.managers.load_snapshot import DisaggregationMetrics, LoadSnapshot, QueueMetrics

        check_protocol(LoadSnapshot, Load)
        check_protocol(DisaggregationMetrics, DisaggregationLoad)
        check_protocol(QueueMetrics, QueueLoad)


def check_environment(names: Iterable[str]) -> None:
    """Raise UpstreamChanged if SGLang does not read one of the variables in `names` that begin with ``SGLANG_``."""
    with needed("sglang", "set up an engine"):
        from sglang.srt.environ import envs

        for name in names:
            if name.startswith("SGLANG_") and name not in READ_ELSEWHERE and not hasattr(envs, name):
                raise AttributeError(f"it reads no environment variable {name}")


def _check_engine(engine: Engine) -> None:
    with needed("sglang", "run requests on an engine"):
        check_protocol(engine, Engine if has_cache_salt() else OlderEngine)
        manager = engine.tokenizer_manager
        check_protocol(manager, TokenizerManager)
        check_protocol(manager.model_config, ModelConfig)
        check_protocol(manager.load_snapshot_reader, LoadReader)
        check_protocol(engine.server_args, ServerArgs)
        check_protocol(engine._scheduler_init_result, SchedulerInitResult)


def version() -> str:
    import sglang

    return str(sglang.__version__)


def num_kv_tokens(engine: Engine) -> int:
    """Return how many tokens the KV memory of one rank holds."""
    with needed("sglang", "know the size of its KV memory"):
        return int(engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"])


def kv_bytes_per_token(engine: Engine) -> int:
    """Return the bytes of one token's KV over all layers and ranks.

    They follow from the model's shape, because SGLang does not report them.
    """
    model = engine.tokenizer_manager.model_config
    itemsize = 1 if engine.server_args.kv_cache_dtype.startswith("fp8") else model.dtype.itemsize
    if model.attention_arch.name == "MLA":
        with needed("sglang", "know the size of a token's KV"):
            check_protocol(model, MlaConfig)
        latent = cast(MlaConfig, model)
        per_layer = latent.kv_lora_rank + latent.qk_rope_head_dim
    else:
        per_layer = model.get_total_num_kv_heads() * (model.head_dim + model.v_head_dim)
    return int(model.num_hidden_layers * per_layer * itemsize)


KV_CHANGED = "KV checksum mismatch"


def has_lease_run_out(abort: FinishReason) -> bool:
    """Return whether SGLang ended a prefill because decode had not entered its room in time.

    Only the message tells.
    """
    return "timed out" in abort["message"]


def has_kv_changed(abort: FinishReason) -> bool:
    """Return whether SGLang did not decode because KV was not what prefill had computed.  Only the message tells."""
    return abort["message"].startswith(KV_CHANGED)
