"""What Baton uses of vLLM's engine core and of its NixlConnector.  Both are private to vLLM and may change.

`check_names` runs when an engine starts.  The protocols also tell the type checker what the adapter may use.
tests/unit/engines/test_vllm_surface.py says when a workaround can be deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec

from app.engines.plugins.nixl_checksum import CHECKS, Result
from app.engines.plugins.nixl_lease import LATE_READS
from app.engines.plugins.nixl_pull import TIMES
from app.messages import TransferDescriptor
from app.upstream import check_attributes, check_protocol, needed

ASK_FOR_HANDOFF = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""``kv_transfer_params`` with which a prefill engine keeps the prompt's KV and says where it lies."""

SCHEDULED = "SCHEDULED"
"""The name of the event that a request got its first place in a step; a request that pulls KV gets it afterwards."""

A_QUESTION = "is_scheduler_paused"
"""The method of the engine core that `Core.call_utility_async` has it call between two steps; it only reads a field."""

ENDED_BY_AN_ERROR = "error"
"""The finish_reason of a request that failed inside the engine core."""


class CacheConfig(Protocol):
    enable_prefix_caching: bool
    num_gpu_blocks: int
    block_size: int


class ModelConfig(Protocol):
    max_model_len: int

    def get_vocab_size(self) -> int: ...


class SchedulerConfig(Protocol):
    max_num_batched_tokens: int
    max_num_seqs: int


class VllmConfig(Protocol):
    cache_config: CacheConfig
    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    kv_events_config: Any


class SamplingParams(Protocol):
    """With what vLLM derives from the model and its tokenizer."""

    all_stop_token_ids: set[int]
    bad_words_token_ids: list[list[int]] | None


class CoreRequest(Protocol):
    request_id: str
    sampling_params: SamplingParams
    reasoning_ended: bool | None
    reasoning_parser_kwargs: dict[str, Any] | None
    abort_immediately: bool


class PrefillStats(Protocol):
    """The prompt tokens of a request that were not computed: in total, cached here, and transferred."""

    num_cached_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int


class LogprobsLists(Protocol):
    """Arrays of shapes [n, k], [n, k] and [n]."""

    logprob_token_ids: Any
    logprobs: Any
    sampled_token_ranks: Any


class LogprobsTensors(Protocol):
    def tolists(self) -> LogprobsLists: ...


class Event(Protocol):
    type: Any
    timestamp: float
    """Seconds of the machine's monotonic clock."""


class Output(Protocol):
    """What one step added to one request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any
    stop_reason: int | str | None
    new_logprobs: LogprobsLists | None
    new_prompt_logprobs_tensors: LogprobsTensors | None
    kv_transfer_params: dict[str, Any] | None
    prefill_stats: PrefillStats | None
    events: Sequence[Event] | None
    """What has happened to the request since its last output."""
    finished: bool


class SchedulerStats(Protocol):
    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    """Share of the KV blocks that are used."""
    kv_connector_stats: dict[str, list[float]] | None
    """What has been added to the lists of `ConnectorStats` since the last step."""


class StepOutputs(Protocol):
    outputs: Sequence[Output]
    scheduler_stats: SchedulerStats | None


class Resources(Protocol):
    engine_dead: bool


class Core(Protocol):
    """vLLM's client of an engine core that is a process of its own."""

    vllm_config: VllmConfig
    resources: Resources

    async def add_request_async(self, request: Any) -> None: ...

    async def abort_requests_async(self, request_ids: list[str]) -> None: ...

    async def get_output_async(self) -> StepOutputs: ...

    async def call_utility_async(self, method: str) -> Any: ...

    async def collective_rpc_async(self, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        """Call a method of each worker between two steps, and return what each of them answers."""

    def shutdown(self, timeout: float) -> None: ...


class InputProcessor(Protocol):
    def process_inputs(
        self, request_id: str, prompt: Any, params: Any, *, supported_tasks: tuple[str, ...], priority: int
    ) -> CoreRequest: ...

    def assign_request_id(self, request: CoreRequest) -> None: ...


class PullTimes(msgspec.Struct, frozen=True):
    """When one request's KV was pulled, in seconds of the machine's monotonic clock (app/engines/plugins/nixl_pull.py).

    With tensor parallelism: of the first rank that began, and of the last one that was done.
    """

    began: float
    posted: float
    done: float

    def merge(self, other: PullTimes | None) -> PullTimes:
        if other is None:
            return self
        return PullTimes(min(self.began, other.began), max(self.posted, other.posted), max(self.done, other.done))


def pull_times(lists: dict[str, list[Any]]) -> dict[str, PullTimes]:
    """Return the times of the pulls that the NixlConnector reports to be done, by the engine core's request id."""
    found: dict[str, PullTimes] = {}
    for request_id, *times in lists.get(TIMES, ()):
        found[request_id] = PullTimes(*times).merge(found.get(request_id))
    return found


def late_reads(lists: dict[str, list[Any]]) -> set[str]:
    """Return the engine core's ids of the requests whose KV was read after prefill's lease, so that it is not used."""
    return set(lists.get(LATE_READS, ()))


class KvCheck(msgspec.Struct, frozen=True, array_like=True):
    """What one rank found when it compared a request's KV with what prefill had computed."""

    request_id: str
    """The engine core's."""
    result: Result
    positions: list[int]
    """The blocks that differ; the prompt's last one is -1."""


def kv_checks(lists: dict[str, list[Any]]) -> list[KvCheck]:
    """Return what the workers have compared."""
    return [KvCheck(*check) for check in lists.get(CHECKS, ())]


class ConnectorStats(msgspec.Struct):
    """What the NixlConnector has counted so far.  Each field is the sum of the connector's list of the same name."""

    num_transfers: int = 0
    transfer_duration: float = 0.0
    bytes_transferred: float = 0
    num_failed_transfers: float = 0
    num_failed_handshakes: float = 0
    num_kv_expired_reqs: float = 0

    def add(self, lists: dict[str, list[float]]) -> None:
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + sum(lists.get(name, ())))
        self.num_transfers += len(lists.get("transfer_duration", ()))


COUNTED = tuple(name for name in ConnectorStats.__struct_fields__ if name != "num_transfers")


def check_names(*, is_disaggregated: bool) -> None:
    """Raise UpstreamChanged if a class of the installed vLLM lacks a name that Baton uses."""
    with needed("vllm", "run requests on an engine core"):
        from vllm.sampling_params import SamplingParams as VllmSamplingParams
        from vllm.v1.engine import (
            EngineCoreEvent,
            EngineCoreEventType,
            EngineCoreOutput,
            EngineCoreOutputs,
            EngineCoreRequest,
            FinishReason,
        )
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.engine.input_processor import InputProcessor as VllmInputProcessor
        from vllm.v1.metrics import stats
        from vllm.v1.outputs import LogprobsLists as VllmLogprobsLists
        from vllm.v1.outputs import LogprobsTensors as VllmLogprobsTensors

        used: list[tuple[Any, type]] = [
            (EngineCoreEvent, Event),
            (EngineCoreOutput, Output),
            (EngineCoreOutputs, StepOutputs),
            (EngineCoreRequest, CoreRequest),
            (VllmInputProcessor, InputProcessor),
            (stats.PrefillStats, PrefillStats),
            (stats.SchedulerStats, SchedulerStats),
            (VllmLogprobsLists, LogprobsLists),
            (VllmLogprobsTensors, LogprobsTensors),
            (VllmSamplingParams, SamplingParams),
        ]
        for found, protocol in used:
            check_protocol(found, protocol)
        check_attributes(EngineCoreEventType, SCHEDULED)
        check_attributes(EngineCore, A_QUESTION)
        if ENDED_BY_AN_ERROR not in map(str, FinishReason):
            raise AttributeError(f"no request ends with {ENDED_BY_AN_ERROR!r}")
    if is_disaggregated:
        with needed("vllm", "report what its NixlConnector moved"):
            from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

            if missing := set(COUNTED) - set(NixlKVConnectorStats().data):
                raise AttributeError(f"it does not count {', '.join(sorted(missing))}")


def check_environment(names: Iterable[str]) -> None:
    """Raise UpstreamChanged if vLLM does not read one of the variables in `names` that begin with ``VLLM_``."""
    with needed("vllm", "set up an engine core"):
        from vllm.envs import environment_variables

        for name in names:
            if name.startswith("VLLM_") and name not in environment_variables:
                raise AttributeError(f"it reads no environment variable {name}")


def start_core(config: VllmConfig) -> tuple[Core, InputProcessor]:
    """Start an engine core and return when its model is loaded."""
    with needed("vllm", "start an engine core"):
        from vllm.renderers import renderer_from_config
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.engine.input_processor import InputProcessor as VllmInputProcessor
        from vllm.v1.executor import Executor

    processor: InputProcessor = VllmInputProcessor(config, renderer_from_config(config))
    core: Core = EngineCoreClient.make_async_mp_client(
        vllm_config=config, executor_class=Executor.get_class(config), log_stats=True
    )
    try:
        with needed("vllm", "talk to an engine core"):
            check_protocol(core, Core)
            check_protocol(core.resources, Resources)
    except BaseException:
        core.shutdown(0.0)
        raise
    return core, processor


def dead_error() -> type[Exception]:
    """The exception that `Core.get_output_async` raises once the engine core has died."""
    with needed("vllm", "notice the death of an engine core"):
        from vllm.v1.engine.exceptions import EngineDeadError
    error: type[Exception] = EngineDeadError
    return error


def rejection(descriptor: TransferDescriptor) -> CoreRequest:
    """A request that the core aborts at once, so that its connector tells prefill to free the blocks.

    vLLM's ``AsyncLLM.notify_kv_transfer_request_rejected`` sends the same.
    """
    with needed("vllm", "have KV freed that nobody fetches"):
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

    request: CoreRequest = EngineCoreRequest(
        request_id=f"release-{descriptor.params['remote_request_id']}",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": dict(descriptor.params)}, watermarking=False
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        abort_immediately=True,
    )
    return request
