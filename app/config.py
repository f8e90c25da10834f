"""Every setting of Baton, in one tree that is validated once and passed whole.

The tree is the ``args`` of the Serve application in serve_config.yaml.  Serve's own settings (HTTP host and
port, proxies, logging) stay where Serve documents them, beside ``applications`` in the same file.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.engines.owned_args import OWNED_ARGS
from app.engines.transport import FABRIC_PROVIDERS
from app.errors import ConfigError
from app.messages import EngineName, Role
from app.models.shapes import SHAPES

NOT_FOR_CLIENTS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""Of vLLM's extra arguments: the first two give access to another request's KV, and with the third some cached blocks
would be told twice, or not at all, which routing counts on."""


class Settings(BaseModel):
    """The base of every section: it is immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(Settings):
    """What Ray reserves for one replica; see Ray's ``ray_actor_options``."""

    num_cpus: float = Field(default=1.0, ge=0)
    """CPU cores; also the number of threads (OMP_NUM_THREADS) of an engine on a CPU."""
    num_gpus: float | None = Field(default=None, ge=0)
    """GPUs; the default is tensor_parallel_size on CUDA and 0 on a CPU."""
    memory_bytes: int | None = Field(default=None, gt=0)
    custom: dict[str, float] = {}
    """Ray custom resources that a replica takes."""
    node_labels: dict[str, str] = {}
    """Labels that a replica's node must have (Ray's label selectors), e.g. ``{baton/pool: prefill}``.  They keep a pool
    on its worker group."""


class DeploymentConfig(Settings):
    """What Serve needs to know about a deployment."""

    replicas: int | None = Field(default=None, ge=1)
    """A fixed number of replicas; 1 if neither this nor `autoscaling` is set."""
    autoscaling: dict[str, Any] | None = None
    """Serve's AutoscalingConfig, verbatim, instead of `replicas`: `min_replicas`, `max_replicas`, `upscale_delay_s`,
    `downscale_delay_s`, `look_back_period_s`, ...  Unless this names another `policy`, Baton decides how many replicas
    the load takes, by the model's `slo` (app/autoscaling/replica_plan.py).  `target_ongoing_requests` is for frontends
    (200 by default); for a pool it is an additional bound.  With ``min_replicas: 0`` in all pools of a model it sleeps
    once it has had no work for `downscale_delay_s` (`downscale_to_zero_delay_s` for the last replicas), and a request
    wakes it (`limits.max_wake_s`)."""
    resources: Resources = Resources()
    environment: dict[str, str] = {}
    """Environment variables of the replicas' processes."""
    health_check_period_s: float = Field(default=2.0, gt=0)
    """Serve replaces a replica after three failed checks."""
    health_check_timeout_s: float = Field(default=10.0, gt=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    """How long a replica that is being removed may go on with its requests."""
    max_surge_percent: int = Field(default=1, ge=0, le=100)
    """How many new replicas an update may start before it stops as many old ones, as a percentage of the pool rounded
    up: one by default.  Without room for them the update waits, and the old ones serve on.  With 0 an old replica is
    stopped first, so an update needs no room, but a pool of one serves nothing until its new replica is ready."""

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Self:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("set either replicas or autoscaling, not both")
        return self


class PoolConfig(DeploymentConfig):
    """One pool: the engines of a model in one role."""

    engine: EngineName = "vllm"
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that one replica's engine is spread over."""
    engine_args: dict[str, Any] = {}
    """Arguments of the engine (vLLM: AsyncEngineArgs), passed on untouched; they override those of the model, and the
    chunk size that Baton derives from `slo.itl_ms` for GPUs that decode."""
    graceful_shutdown_timeout_s: float = Field(default=600.0, ge=0)
    """How long a replica that is being removed may go on with its sequences, and a prefill replica wait until its KV
    has been pulled."""
    drain_s: float = Field(default=5.0, ge=0)
    """After so many seconds, a replica that is being removed (scale-down, update, drain of its node) asks to have its
    sequences go on elsewhere.  Those for which no other replica has room, and with SGLang those with penalties or
    structured output, still end there.  Each costs its client a gap, as its prompt and output are prefilled anew; with
    `graceful_shutdown_timeout_s` or more none is moved (docs/decisions/0034-drain.md)."""
    python: str | None = Field(default=None, min_length=1)
    """The Python interpreter that the replicas run in, if the engine's environment is not that of Ray's workers.  A
    relative path counts from the repository's root.  The default is ``.venv-sglang/bin/python`` for SGLang if that
    exists, and otherwise the workers' own (on Kubernetes the worker group's image is the environment)."""

    @model_validator(mode="after")
    def _refuse_owned_args(self) -> Self:
        _check_owned(self.engine, self.engine_args)
        return self


class PrefillWeights(Settings):
    """How much each score of a prefill replica counts.  Scores are from 0 to 1; app/routing/scores.py explains them.

    `prefix` and `queue` count in the same unit, tokens to compute before this prompt is done.  So with equal weights
    the replica with the fewest of them is the best for this prompt.
    """

    prefix: float = Field(default=4.0, ge=0)
    """How much of the prompt it has cached.  This counts more than the queue for the sake of other prompts: what is
    computed a second time pushes something else out of a cache.  Under load 4 gave both more hits and a lower mean TTFT
    than 1 (docs/benchmarks/2026-11-21-routing.md)."""
    queue: float = Field(default=1.0, ge=0)
    """How little it has to compute before this prompt."""
    affinity: float = Field(default=0.05, ge=0)
    """Whether it is the session's own."""


class DecodeWeights(Settings):
    """How much each score of a replica that decodes counts; app/routing/scores.py explains the scores."""

    prefix: float = Field(default=1.0, ge=0)
    """How much of the prompt it has cached, which is neither computed nor transferred."""
    queue: float = Field(default=1.0, ge=0)
    """How few prompt tokens wait there to be computed."""
    batch: float = Field(default=1.0, ge=0)
    """How few sequences it runs."""
    kv: float = Field(default=0.5, ge=0)
    """How much of its KV memory would still be free."""
    affinity: float = Field(default=0.05, ge=0)
    """Whether it is the session's own."""
    topology: float = Field(default=0.1, ge=0)
    """How near it is to the prefill replica: on the same node, or by the transfers measured between the nodes."""


class PredictedPlacement(Settings):
    """Serve each request in the way that leaves most requests within the model's `slo`, by predicted times."""

    policy: Literal["predicted"] = "predicted"


class ThresholdPlacement(Settings):
    """Prefill locally by fixed numbers."""

    policy: Literal["thresholds"]
    max_local_tokens: int = Field(default=512, ge=0)
    """A prompt is prefilled on decode if at most this many of its tokens are not cached there."""
    max_prefill_queue_tokens: int = Field(default=65_536, ge=0)
    """Any prompt is prefilled on decode if more tokens than this wait on the best prefill replica."""


class RemotePlacement(Settings):
    """Prefill remotely whatever can be prefilled remotely."""

    policy: Literal["remote"]


class RoutingConfig(Settings):
    """Which replicas serve a request, and where its prompt is prefilled."""

    placement: PredictedPlacement | ThresholdPlacement | RemotePlacement = Field(
        default=PredictedPlacement(), discriminator="policy"
    )
    prefill_weights: PrefillWeights = PrefillWeights()
    decode_weights: DecodeWeights = DecodeWeights()


class SloConfig(Settings):
    """The times within which sequences are to be served.  The router decides by them, autoscaling aims at them, and
    goodput counts by them."""

    ttft_ms: float = Field(default=2000.0, gt=0)
    """Time to the first token.  Pools that compute prompts scale by it."""
    itl_ms: float = Field(default=50.0, gt=0)
    """Time between two tokens, as the mean over a sequence.  Pools that decode scale by it, by their KV memory and by
    the sequences that wait for a slot.  If a model with a prefill pool sets its `slo`, this also bounds the chunks in
    which GPUs that decode compute prompts (app/chunk_size.py), unless `engine_args` has vLLM's `max_num_batched_tokens`
    or SGLang's `chunked_prefill_size`."""


CORS_ARGS = ("allow_credentials", "allowed_origins", "allowed_methods", "allowed_headers")
"""Those of `server_args` that say which pages of other origins may ask, and how."""


class ModelConfig(Settings):
    """One model and the pools that serve it."""

    name: str = Field(min_length=1)
    """The name that clients put into ``model``."""
    source: str = Field(min_length=1)
    """A Hugging Face id, a folder, or a model that Baton makes: ``baton:tiny`` and ``baton:small``, or without weights
    (``load_format: dummy``), for timing, ``baton:shape/llama-8b`` and the others of app/models/shapes.py."""
    engine_args: dict[str, Any] = {}
    """Engine arguments of all pools, e.g. max_model_len.  On CPUs `dtype` is bfloat16 if the node on which Serve
    builds the application multiplies it natively, else float32.  Set it here if the nodes' CPUs differ, or if a
    quantised model needs another one."""
    server_args: dict[str, Any] = {}
    """Options of vLLM's API server, e.g. ``tool_call_parser: hermes``, ``reasoning_parser``, ``chat_template``.  Those
    about pages of other origins (``allowed_origins``) must be the same for all models."""
    vllm_xargs: list[str] = []
    """What clients may send in ``vllm_xargs`` beside ``baton_prefill``: names that logits processors of your own read.
    Engines take other things there too, which are not for clients."""
    prefill: PoolConfig | None = None
    """Without it the decode pool serves alone (aggregated)."""
    decode: PoolConfig
    aggregated: PoolConfig | None = None
    """Engines beside prefill and decode that serve whole requests whose prompt is better not transferred.  SGLang's
    decode engines cannot prefill, so SGLang needs this pool for conditional disaggregation; vLLM does not."""
    gpus: int | None = Field(default=None, ge=2)
    """The most GPUs that the prefill and decode replicas of the model take together; with engines on CPUs, replicas.
    Then autoscaling, which both pools need, moves replicas between the two roles while they run before it asks for new
    ones (app/autoscaling/role_plan.py)."""
    routing: RoutingConfig = RoutingConfig()
    slo: SloConfig = SloConfig()

    @field_validator("vllm_xargs")
    @classmethod
    def _are_for_clients(cls, names: list[str]) -> list[str]:
        for name in names:
            if name.startswith("baton_") or name in NOT_FOR_CLIENTS:
                raise ValueError(f"{name} is not for clients")
        return names

    @field_validator("server_args")
    @classmethod
    def _one_way_to_set_keys(cls, server_args: dict[str, Any]) -> dict[str, Any]:
        if "api_key" in server_args:
            raise ValueError("api_key guards only some of vLLM's routes: set security.keys, which guards all")
        return server_args

    @field_validator("name")
    @classmethod
    def _printable_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w./:@-]+", name):
            raise ValueError("letters, digits and . _ - / : @ only: it is part of URLs and metric labels")
        return name

    @model_validator(mode="after")
    def _pools_fit_together(self) -> Self:
        _check_owned(self.decode.engine, self.engine_args)
        if self.prefill is not None and self.prefill.engine != self.decode.engine:
            raise ValueError("prefill and decode must run the same engine: their KV layouts differ")
        if self.aggregated is not None and self.prefill is None:
            raise ValueError(
                "aggregated is for beside a prefill pool: without one the decode pool is aggregated itself"
            )
        if self.aggregated is not None and self.aggregated.engine != self.decode.engine:
            raise ValueError(
                "aggregated and decode must run the same engine, so that answers do not depend on the pool"
            )
        return self

    @model_validator(mode="after")
    def _pools_sleep_together(self) -> Self:
        least = {role: (pool.autoscaling or {}).get("min_replicas") for role, pool in self.pools().items()}
        awake = [role for role, number in least.items() if number != 0]
        if awake and len(awake) < len(least):
            raise ValueError(
                f"autoscaling.min_replicas is 0 for some pools, but not for {' and '.join(awake)}: a model's pools "
                "sleep and wake together, so set 0 for all of them or for none"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_needs_two_pools_that_scale(self) -> Self:
        pools = (self.prefill, self.decode)
        if self.gpus is not None and not all(pool is not None and pool.autoscaling is not None for pool in pools):
            raise ValueError("gpus is a budget for autoscaling: set `autoscaling` in both prefill and decode")
        if self.gpus is not None and self.may_sleep:
            raise ValueError("gpus: pools that share a budget do not sleep; set autoscaling.min_replicas to 1 or more")
        return self

    @property
    def may_sleep(self) -> bool:
        """Whether the model has no replicas while nobody uses it."""
        return (self.decode.autoscaling or {}).get("min_replicas") == 0

    @property
    def is_disaggregated(self) -> bool:
        return self.prefill is not None

    def transfers_kv(self, role: Role) -> bool:
        """Whether KV crosses between the engines of this pool and those of another."""
        return self.is_disaggregated and role != "aggregated"

    @property
    def engine(self) -> EngineName:
        """The engine that the model's pools run."""
        return self.decode.engine

    @property
    def can_decode_prefill(self) -> bool:
        """Whether an engine that decodes for a prefill pool can prefill a prompt itself, when that is better or needed.

        SGLang's cannot: its scheduler in ``disaggregation_mode="decode"`` has no forward pass over a prompt.
        """
        return self.engine != "sglang"

    @property
    def can_prefill_decode(self) -> bool:
        """Whether an engine that prefills for a decode pool can run whole sequences too, when decode is full or gone.

        SGLang's cannot: its scheduler in ``disaggregation_mode="prefill"`` ends each request with its first token.
        """
        return self.engine != "sglang"

    @property
    def can_resume_counting(self) -> bool:
        """Whether an engine can go on with a sequence of another one whose sampling depends on which tokens are output.

        SGLang's cannot: it takes those tokens for prompt (docs/decisions/0030-resume.md).
        """
        return self.engine != "sglang"

    @property
    def can_switch_roles(self) -> bool:
        """Whether replicas can change between prefill and decode while they run."""
        return self.is_disaggregated and self.can_decode_prefill and self.can_prefill_decode

    @property
    def hands_over_early(self) -> bool:
        """Whether prefill has to know where a sequence will be decoded before it computes the prompt, as SGLang's does.

        Its two engines agree on the transfer first.
        """
        return self.engine == "sglang"

    def runs_whole_sequences(self, role: Role) -> bool:
        """Whether one engine of this pool can run a sequence from its prompt to its last token."""
        if not self.transfers_kv(role):
            return True
        return self.can_prefill_decode if role == "prefill" else self.can_decode_prefill

    def deployment_name(self, role: Role) -> str:
        """Return the name of a pool's Serve deployment, which does not depend on other models."""
        return f"{role}-{re.sub(r'[^A-Za-z0-9._-]', '-', self.name)}"

    def pool(self, role: Role) -> PoolConfig | None:
        """Return the pool of a role; None if the model has none."""
        pools: dict[Role, PoolConfig | None] = {
            "prefill": self.prefill,
            "decode": self.decode,
            "aggregated": self.aggregated,
        }
        return pools[role]

    def pools(self) -> dict[Role, PoolConfig]:
        """Return the pools that the model has, by role."""
        return {role: pool for role in get_args(Role) if (pool := self.pool(role)) is not None}

    def merged_engine_args(self, pool: PoolConfig) -> dict[str, Any]:
        """Return the arguments that an engine of `pool` starts with."""
        has_no_weights = self.source in SHAPES and pool.engine != "sim"
        dummy = {"load_format": "dummy"} if has_no_weights else {}
        return {**self.engine_args, **pool.engine_args, **dummy}


class TransferConfig(Settings):
    """How KV moves from prefill to decode."""

    backends: list[str] = Field(default=["UCX"], min_length=1)
    """NIXL plug-ins, in order of preference: UCX, LIBFABRIC, GDS, ..."""
    required_transport: Literal["any", "rdma", "nvlink", "shm", "tcp"] = "any"
    """What KV must move by.  Each decode replica probes each prefill replica before KV of requests moves between them.
    A pair whose probe took another way, or a way that nobody tells, is not used.  If this is so of every pair when a
    decode replica starts, it does not become ready, and its message says what to do; a probe that fails otherwise does
    not keep it from starting.  With UCX the way is read from its log; with LIBFABRIC, which offers ``rdma`` and
    ``tcp``, all other providers are switched off."""
    port_min: int = Field(default=20000, ge=1024, le=65535)
    port_max: int = Field(default=29999, ge=1024, le=65535)
    """`port_min` to `port_max` are the side-channel ports that the replicas on one node share."""
    lease_s: int = Field(default=30, ge=12)
    """How long prefill keeps KV for a decode that has not asked for it; vLLM renews the lease every sixth of this."""
    checksum_rate: float = Field(default=0.0, ge=0, le=1)
    """The part of the handoffs, chosen at random, whose KV decode compares by checksums with what prefill computed.  If
    it differs, decode computes the prompt itself, logs an error and counts it (``baton_kv_checksum_mismatches_total``).
    The sums of such a prompt occupy each of its two engines for a moment (docs/decisions/0029-kv-checksum.md).  0.01
    costs next to nothing and finds what is wrong all the time; 1 finds every change.  SGLang takes 0 or 1, has its own
    checksums, for GPUs only, and tries such a request again."""

    @model_validator(mode="after")
    def _ports_in_order(self) -> Self:
        if self.port_min > self.port_max:
            raise ValueError(f"port_min {self.port_min} is above port_max {self.port_max}")
        return self

    @model_validator(mode="after")
    def _transport_suits_backend(self) -> Self:
        required, backends = self.required_transport, self.backends
        if required == "any" or backends == ["UCX"]:
            return self
        if backends != ["LIBFABRIC"]:
            raise ValueError(
                f"required_transport: {required} can be enforced with backends: [UCX] or [LIBFABRIC] only, not with "
                f"{backends}: name one of them, or set required_transport: any"
            )
        if required not in FABRIC_PROVIDERS:
            raise ValueError(
                f"required_transport: {required} is nothing that LIBFABRIC offers: set backends: [UCX], or one of "
                f"{', '.join(FABRIC_PROVIDERS)}"
            )
        return self


class FrontendConfig(DeploymentConfig):
    """The deployment that serves HTTP; it needs no GPU and loads no weights."""

    max_ongoing_requests: int = Field(default=10_000, ge=1)
    """Requests that one frontend replica holds before Serve's proxy makes new ones wait."""
    metrics_port: int | None = Field(default=None, ge=1024, le=65535)
    """The port at which each frontend serves its own /metrics for Prometheus, since any frontend may answer on the HTTP
    port.  If several are on one node, each takes the first free port from this one on."""


class LimitsConfig(Settings):
    """Bounds on what one request may take."""

    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    """The largest HTTP body in bytes; a larger one is refused with 413."""
    max_inflight_body_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    """The most bytes of bodies that one frontend receives at once, over all requests; a body that does not fit is
    refused with 429.  By default eight of the largest, which a frontend's memory holds beside everything else."""
    body_timeout_s: float = Field(default=60.0, gt=0)
    """How long a body may take to arrive; after it the answer is 408.  By default the largest body may come over a line
    of 5 Mbit/s."""
    max_sequences_per_request: int = Field(default=256, ge=1)
    """The most sequences of one request, ``n`` times the number of prompts; more are refused with 400.  Each is routed
    by itself, in about half a millisecond of the frontend's loop, for which all other requests wait.  By default twice
    the ``n`` that OpenAI's API allows."""
    max_prompt_tokens_per_request: int = Field(default=2 * 1024 * 1024, ge=1)
    """The most prompt tokens of one request in sum; more are refused with 400.  A prompt counts once for each of its
    sequences, as each takes it to a replica, in up to 5 bytes for each token.  A request with only one sequence is
    bounded by the model's length alone."""
    max_field_bytes: int = Field(default=256 * 1024, ge=1024)
    """The largest that one field of a request may be, as JSON and apart from its prompt, messages and tools: a schema
    or grammar, all stop strings or bad words together, ``vllm_xargs``, ``chat_template_kwargs``; 400 beyond it."""
    max_prompt_logprobs: int = Field(default=512 * 1024, ge=1)
    """The most log probabilities of prompt tokens that one request may ask for: candidates times prompt tokens times
    ``n``; 400 beyond it.  Each takes about 200 bytes of the frontend's memory."""
    schema_timeout_s: float = Field(default=2.0, gt=0)
    """How long the translation of one request's schemas or grammars (``response_format``, ``structured_outputs``,
    ``tools``) may take, beside the loop; 400 beyond it.  Ordinary ones take a few milliseconds."""
    ttft_timeout_s: float = Field(default=300.0, gt=0)
    """The longest time from a request's arrival to its first token, queueing included; after it the answer is 504."""
    itl_timeout_s: float = Field(default=60.0, gt=0)
    """The longest time between two tokens; after it the request fails."""
    max_request_s: float = Field(default=3600.0, gt=0)
    """The longest time from a request's arrival to its end, whatever it does; a client may ask for less by the header
    ``x-baton-timeout-s``.  Before the first token the answer is 504, after it the stream ends with an error event.  In
    an hour come 72,000 tokens, at 50 ms each."""
    max_ttft_ms: float | None = Field(default=None, gt=0)
    """A request that has to wait in the frontend, and whose first token is predicted to take longer than this, is
    refused with 429 and told when to come again.  The default is ten times ``slo.ttft_ms``.  Under overload
    that lasts, late ones have few turns.  Then who will be late may wait for half of that time, so most are refused at
    once."""
    allow_control: bool = False
    """Whether any client may have a prompt prefilled in a way that it chooses, or wrongly, by
    ``vllm_xargs: {"baton_prefill": ...}``.  Otherwise an admin's key is needed, or to be on the machine if there are no
    keys (`security`)."""
    prefill_timeout_s: float = Field(default=60.0, gt=0)
    """How long decode waits for a handoff before it prefills itself."""
    max_wake_s: float = Field(default=120.0, gt=0)
    """How long a request may wait for a model that sleeps (``min_replicas: 0``) to wake; after it the answer is 503 and
    says when to come again.  By default the time in which engines with weights on a local disk start."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a sequence may be tried, the first time included; to go on elsewhere after its first token counts too.
    Once an attempt before that has failed on an engine, rather than on the way there, one more is the last one, as the
    request may have ended that engine."""


class SecurityConfig(Settings):
    """Who may ask."""

    keys: str | None = Field(default=None, min_length=1)
    """The file with the tenants and the hashes of their keys (app/tenants.py), as each frontend's node has it, or
    ``env:NAME`` for an environment variable with the same text.  Then every request but the short form of /health needs
    a key, as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``.  A file is read again when it changes; a change that
    cannot be read is logged, and the keys of before stay valid."""
    usage_records: str | None = Field(default=None, min_length=1)
    """A folder in which each frontend appends a line of JSON for each sequence that ends: whose it was, and how many
    tokens it took (app/frontend/usage_records.py)."""
    open: bool = False
    """Without `keys` Baton serves on loopback only, unless this says that whoever reaches the port may use it: all
    routes, but no control runs (`limits.allow_control`)."""

    @model_validator(mode="after")
    def _open_means_without_keys(self) -> Self:
        if self.keys is not None and self.open:
            raise ValueError("open: true is for a service without keys: remove it, or remove keys")
        return self


class BatonConfig(Settings):
    """The whole application."""

    models: list[ModelConfig] = Field(min_length=1)
    """The models, each with pools of its own behind the one endpoint.  Their names must differ."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engines run; `auto` means CUDA if the cluster has a GPU."""
    transfer: TransferConfig | None = Field(default=None, validate_default=True)
    """This section is needed as soon as a model has a prefill pool."""
    frontend: FrontendConfig = FrontendConfig()
    limits: LimitsConfig = LimitsConfig()
    security: SecurityConfig = SecurityConfig()

    @field_validator("models")
    @classmethod
    def _models_differ(cls, models: list[ModelConfig]) -> list[ModelConfig]:
        seen: dict[str, int] = {}
        for index, model in enumerate(models):
            other = seen.setdefault(model.deployment_name("decode"), index)
            if other != index:
                # This is no ValueError, so that the error names the field inside the list.
                raise ConfigError(
                    f"models.{index}.name",
                    f"{model.name!r} and models.{other}.name {models[other].name!r} would be the same deployment "
                    f"({model.deployment_name('decode')}): rename one",
                )
        return models

    @field_validator("models")
    @classmethod
    def _same_origins(cls, models: list[ModelConfig]) -> list[ModelConfig]:
        for index, model in enumerate(models):
            for name in CORS_ARGS:
                if model.server_args.get(name) != models[0].server_args.get(name):
                    raise ConfigError(
                        f"models.{index}.server_args.{name}",
                        f"it must be the same as models.0.server_args.{name}: a browser asks before it names a model",
                    )
        return models

    @field_validator("transfer")
    @classmethod
    def _sglang_compares_all_or_none(
        cls, transfer: TransferConfig | None, info: ValidationInfo
    ) -> TransferConfig | None:
        for index, model in enumerate(info.data.get("models", [])):
            is_of_sglang = model.is_disaggregated and model.engine == "sglang"
            if is_of_sglang and transfer is not None and 0 < transfer.checksum_rate < 1:
                raise ValueError(
                    f"checksum_rate {transfer.checksum_rate}: SGLang (models.{index}) compares all handoffs or none: "
                    "set 1 or 0"
                )
        return transfer

    @field_validator("transfer")
    @classmethod
    def _disaggregation_needs_transfer(
        cls, transfer: TransferConfig | None, info: ValidationInfo
    ) -> TransferConfig | None:
        for index, model in enumerate(info.data.get("models", [])):
            if model.is_disaggregated and transfer is None:
                raise ValueError(
                    f"missing, but models.{index}.prefill is set, so KV has to be transferred: add it "
                    "(`transfer: {}` takes the defaults) or remove the prefill pool"
                )
        return transfer


def parse(args: dict[str, Any]) -> BatonConfig:
    """Validate the tree.  Raises ConfigError that names the first wrong field and says how many more there are."""
    try:
        return BatonConfig.model_validate(args)
    except ValidationError as error:
        field, problem = explain(error)
        raise ConfigError(field or "args", problem) from None


def explain(
    error: ValidationError, *, shows_input: bool = True, documented_in: str = "app/config.py"
) -> tuple[str, str]:
    """Return the dotted path of the first wrong field, and what is wrong with it and how many more are wrong.

    `shows_input`: whether this may show the value.
    """
    problems = error.errors(include_url=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _path(problems[0]["loc"]), _explain(problems[0], shows_input, documented_in) + more


def _path(location: tuple[str | int, ...]) -> str:
    """Return the dotted path of a field, without a union's choice, which pydantic puts after the union's field."""
    parts = [str(part) for part in location]
    return ".".join(part for before, part in zip(["", *parts], parts, strict=False) if before != "placement")


def _explain(problem: Any, shows_input: bool, documented_in: str) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key; see {documented_in} for those that exist"
    if problem["type"] == "missing":
        return "missing"
    return str(problem["msg"]).removeprefix("Value error, ") + (
        f", got {problem['input']!r}" if shows_input and isinstance(problem["input"], str | int | float) else ""
    )


def _check_owned(engine: EngineName, engine_args: dict[str, Any]) -> None:
    for name, instead in OWNED_ARGS[engine].items():
        if name in engine_args:
            raise ValueError(f"engine_args.{name} is set by Baton; use {instead}")
