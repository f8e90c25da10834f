"""The messages that cross deployments.  They are plain data, without Ray's or an engine's types.

A *handoff* is what prefill gives to decode, and its content is a `TransferDescriptor`.  The KV tensors themselves
never appear here: NIXL moves them between the engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from app.pace import Pace

Role = Literal["prefill", "decode", "aggregated"]
"""What a pool's engines do.  *prefill* computes prompts for others.  *decode* generates from prompts computed
elsewhere, and computes prompts too if there is no prefill pool or if the engine can.  *aggregated* serves whole
requests beside two such pools."""

EngineName = Literal["vllm", "sglang", "sim"]
"""Which engine a pool runs (app/engines/registry.py makes it)."""

COUNTS_OUTPUT = ("presence_penalty", "frequency_penalty", "repetition_penalty", "structured_outputs")
"""The sampling parameters whose effect depends on which tokens are output and which are prompt."""

PrefillMode = Literal["auto", "local", "remote", "corrupted"]
"""How one request wants its prompt prefilled: as Baton decides, by the replica that decodes it, by the prefill pool, or
by the prefill pool but from another prompt, so that decode gets wrong KV (the control run of ``baton verify``)."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate.

    `sampling` holds the sampling parameters that differ from their defaults, under the names of vLLM's
    ``SamplingParams`` (the superset that the OpenAI server produces).  An adapter that lacks one must refuse it.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: dict[str, Any]
    cache_salt: str | None = None
    priority: int = 0
    prefill_mode: PrefillMode = "auto"
    expected_cached_tokens: int = 0
    """How many of the prompt's tokens the router expects the engine that prefills it to have cached.  This only affects
    the count of the work that waits there (`ReplicaLoad.queued_tokens`)."""
    reasoning_ended: bool | None = None
    """Whether structured output applies from the first token on; None leaves that to the engine's reasoning parser."""
    reasoning_parser_kwargs: dict[str, Any] | None = None
    num_replayed: int = 0
    """How many tokens at the end of `prompt_token_ids` an earlier attempt has generated, whose replica was lost.  For
    sampling they are output, so that the sequence goes on as if nothing had happened; they are not sent again."""
    sent_at: float | None = None
    """Unix time in seconds at which the frontend sent the request to prefill; None elsewhere."""

    @property
    def is_load(self) -> bool:
        """Whether it counts as work; Baton's own measurements (app/engines/probe_request.py) do not."""
        return self.expected_cached_tokens < len(self.prompt_token_ids)

    @property
    def counts_output(self) -> bool:
        """Whether what is sampled next depends on which of the tokens so far are output."""
        return any(self.sampling.get(name) for name in COUNTS_OUTPUT)

    def resumed(self, token_ids: list[int]) -> GenerateRequest:
        """Return the request that goes on after `token_ids`, all that was generated for this one.

        What is told of the prompt has been told.
        """
        return msgspec.structs.replace(
            self,
            prompt_token_ids=self.prompt_token_ids + token_ids,
            num_replayed=len(token_ids),
            sampling={name: value for name, value in self.sampling.items() if name != "prompt_logprobs"},
        )


UNKNOWN_RANK = 0
"""The rank of a token if the engine does not tell it."""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of n positions with k candidates each.

    `token_ids` and `logprobs` have shape [n, k]; the first candidate of a row is the token itself.  `ranks`
    has shape [n] and holds that token's rank in the vocabulary: 1 for the most likely one, or UNKNOWN_RANK.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    ranks: list[int]


PrefillKind = Literal["remote", "local"]
"""Where a prompt is prefilled: on a prefill replica, or where it is decoded."""

HopPhase = Literal[
    "prefill_call", "prefill", "delivery", "admission", "connection", "transfer", "next_step", "step", "engine"
]
"""The parts of a remote prefill, in their order, each timed from the end of the one before.

*prefill_call*: Ray's call, until the prefill engine has the request.  *prefill*: waiting there and computing.
*delivery*: the descriptor's way to decode, by Ray's reference.  Here the first token goes out if prefill sampled it.
*admission*: until the decode engine begins to fetch.  *connection*: until the read is under way, which takes long only
for the first one between two engines.  *transfer*: until the engine notices that it has the KV.  *next_step*: until its
step with the sequence begins.  *step*: until the token of this step is out.  *engine* stands for all parts from
admission on if the engine does not tell them (SGLang; prefill is then part of it).

The first and third cross from one process to another by Unix time, so between nodes they are as exact as the nodes'
clocks agree."""


class PrefillReport(msgspec.Struct, frozen=True, array_like=True):
    """How the prompt's KV came to be on the decode replica.

    It comes with a sequence's first delta.  If prefill sampled that token, the KV is still on its way; another report
    then comes with the first delta that decode computed, and replaces this one.
    """

    kind: PrefillKind
    reason: str
    """Why the prompt was prefilled locally; empty if it was prefilled remotely.  It is the reason of the decision
    (app/routing/decision.py) if that was for a local prefill, else what stood in the way: ``no_prefill_replica``,
    ``prefill_failed``, ``prefill_timeout``, ``descriptor_expired``, ``transfer_failed``, ``transport_refused``,
    ``incompatible_kv``, ``descriptor_corrupted``, ``kv_changed`` if the KV was not what prefill computed, or
    ``already_cached`` if decode had the whole prompt."""
    prefill_replica: str | None
    decode_replica: str
    cached_tokens: int
    """Prompt tokens that no engine had to compute for this request."""
    transferred_tokens: int | None
    """Prompt tokens whose KV was read from the prefill replica; None while it is on its way."""
    transport: str
    """What carried them, e.g. ``intra-node cuda_ipc/cuda (zero-copy)``; empty if nothing moved or nobody tells."""
    prefill_s: float | None = None
    """`TransferDescriptor.prefill_s`, if the KV came from prefill."""
    prefill_cached_tokens: int | None = None
    """`TransferDescriptor.cached_tokens`, where `prefill_s` is known."""
    phases: dict[HopPhase, float] = {}
    """The seconds of the hop's phases as far as they are known; empty for a local prefill."""

    @property
    def is_complete(self) -> bool:
        """Whether the KV is there, so that no other report follows."""
        return self.transferred_tokens is not None


def local_prefill(replica: str, cached_tokens: int, reason: str = "") -> PrefillReport:
    """Return the report of a prompt that `replica` prefilled itself."""
    return PrefillReport("local", reason, None, replica, cached_tokens, transferred_tokens=0, transport="")


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step added to one sequence, or what several steps added if the frontend was behind."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort", "repetition"] | None = None
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    report: PrefillReport | None = None


Emit = Callable[[TokenDelta], None]
"""Takes one sequence's delta of one engine step.  Called on the event loop, never blocks, never raises."""


class KvFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the KV of a replica is like (app/engines/kv_format.py says what of it has to be alike)."""

    protocol: int
    engine: str
    engine_version: str
    model: str
    """The model's `source`."""
    settings: dict[str, str]
    """Engine arguments and variables that decide how the KV is stored, or which model it is of."""
    block_size_tokens: int
    tensor_parallel_size: int


class TransferDescriptor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prompt's KV lies on a prefill replica and until when.

    `params` belongs to the engine that wrote it, and is opaque to everything else.  For vLLM its size grows by one
    integer for each KV block of the prompt, by another one for each rank if it has checksums, and by nothing else.
    """

    engine: str
    replica_id: str
    request_id: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that prefill found in its prefix cache."""
    ready_at: float
    """Unix time in seconds when the KV became readable, by prefill's clock.  Only `phases` are computed from it."""
    lease_s: float
    """Seconds after `ready_at` during which prefill keeps the KV for a decode that has not asked for it yet."""
    params: dict[str, Any]
    prefill_s: float | None = None
    """Seconds from the request's arrival at the prefill engine to `ready_at`, waiting included; None if the descriptor
    comes before the KV is computed (SGLang)."""
    first_token: TokenDelta | None = None
    """The first token of the answer, if prefill sampled it as decode would have.  Then decode passes it on before it
    pulls the KV, and computes from the second token on.  With a finish_reason it is also the last one, and nobody needs
    the KV.  If None, decode computes the last prompt token again and samples the first token itself."""
    phases: dict[HopPhase, float] = {}
    """The seconds of the hop's phases so far."""
    kv_format: KvFormat | None = None
    """What the KV is like; None before the replica has added it to what its engine wrote."""
    prompt_digest: bytes = b""
    seal: bytes = b""
    """Digests of the prompt, and of all this but `phases` (app/handoff_seal.py); empty before the replica adds them."""

    def has_expired(self, waited_s: float) -> bool:
        """Whether pulling now is unsafe: after half the lease prefill may free and reuse the blocks during the read.

        `waited_s` is how long decode has had the sequence, by its own clock.  The KV has been there for that time
        without what computing it took, by prefill's clock; no time of one clock is compared with one of the other.
        If decode got the sequence late, the KV has been there for longer.  So the engine has to see for itself whether
        what it has read was still prefill's.
        """
        return waited_s - (self.prefill_s or 0.0) > self.lease_s / 2


def merge_deltas(first: TokenDelta, second: TokenDelta) -> TokenDelta:
    """Return what two successive deltas of a sequence add together."""
    return TokenDelta(
        token_ids=first.token_ids + second.token_ids,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        logprobs=_merge_logprobs(first.logprobs, second.logprobs),
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        report=second.report or first.report,
    )


def _merge_logprobs(first: Logprobs | None, second: Logprobs | None) -> Logprobs | None:
    if first is None or second is None:
        return first or second
    return Logprobs(
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        ranks=first.ranks + second.ranks,
    )


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's load at one moment, and what it has moved since it started."""

    num_running: int = 0
    num_waiting: int = 0
    num_held_up: int = 0
    """Requests that wait only for a slot on decode, if the engine can tell (SGLang can, on either side)."""
    num_blocks: int = 0
    num_used_blocks: int = 0
    """KV blocks that requests hold, including those kept for a decode that has not pulled yet."""
    num_transfers: int = 0
    """KV that arrived, that of probes included."""
    num_probes: int = 0
    """Transfers of probes (deployments/replica/links.py), if this is of a decode replica and not only of its engine."""
    num_failed_transfers: int = 0
    transferred_bytes: int = 0
    transfer_s: float = 0.0
    num_expired_handoffs: int = 0
    """Handoffs whose lease ran out before decode pulled them; on decode, those whose KV it pulled in vain for that."""
    num_checksum_matches: int = 0
    """Handoffs whose KV decode has compared with what prefill computed (``transfer.checksum_rate``); with tensor
    parallelism each rank counts, also in the next two."""
    num_checksum_mismatches: int = 0
    """Those of which it was not that, so that decode did not use it."""
    num_checksums_skipped: int = 0
    """Those chosen that could not be compared, because the two engines store KV differently."""
    transport: str = ""


class TransportEvidence(msgspec.Struct, frozen=True, array_like=True):
    """What is known of the way that KV takes between two engines."""

    transport: str
    """What carries it, e.g. ``intra-node cuda_ipc/cuda (zero-copy)``; empty if that is not told."""
    problem: str = ""
    """Why this does not satisfy ``transfer.required_transport``; empty if it does."""


class Link(msgspec.Struct, frozen=True, array_like=True):
    """How KV gets from one prefill replica to one decode replica, as the latest probe of the pair found it."""

    prefill_replica: str
    transport: str = ""
    """`TransportEvidence.transport`."""
    bytes_per_s: float | None = None
    """The speed of the transfer of a long prompt; None if the engine does not tell."""
    latency_s: float | None = None
    """The time of the transfer of a short prompt; None if the engine does not tell."""
    probe_s: float | None = None
    """The time from sending a short prompt to the first token that needs its KV, with the connection made."""
    problem: str = ""
    """Why no KV is moved this way; empty if the link is usable."""


PrefixCache = Literal["published", "silent", "none"]
"""How an engine's prefix cache is known: by its events, by what was sent to it (it has no events), or there is none."""


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica tells about itself once, when it is ready."""

    replica_id: str
    role: Role
    model: str
    engine: str
    engine_version: str
    node_ip: str
    pid: int
    num_blocks: int
    block_size_tokens: int
    max_model_len: int
    kv_address: str = ""
    """host:port at which other engines ask this one for its KV layout."""
    prefix_cache: PrefixCache = "none"
    max_sequences: int = 0
    """The most sequences that decode at once; 0 if nobody tells."""
    pace: Pace | None = None
    """How fast its engine computes; None if that was not measured."""


class ReplicaLoad(msgspec.Struct, frozen=True, array_like=True):
    """The work that a replica has at present, for all frontends together."""

    sequences: int = 0
    """Requests that it has not finished, including waiting ones."""
    queued_tokens: int = 0
    """Prompt tokens that it has still to compute, without cached ones, for requests that have no first token yet."""
    used_blocks: int = 0
    """KV blocks that requests hold."""
    decoding: int = 0
    """Those of `sequences` that have a token; each step of the engine gives them another one."""
    queued_s: float = 0.0
    """The sum of `Pace.compute_s` over the prompts of `queued_tokens`; 0 if the pace is not known."""
    prefill_share: float = 0.0
    """The share of the recent time in which prompts were computed here (app/recent_load.py)."""
    slowness: float = 1.0
    """How many times as long as by the pace steps took lately."""
    window_s: float = 2.0
    """How long sequences typically decode here; it is what "recent" and "lately" mean."""
    growth_tokens: int = 0
    """By how much longer those of `decoding` will be, in tokens together, on the mean over their time here."""
    output_tokens: int = 0
    """How many tokens sequences typically get here."""
    kv_tokens: int = 0
    """The tokens, prompts included, that sequences have here which decode or will.  Unlike in `used_blocks`, a prefix
    that several share counts for each: a step reads it for each."""


class KvUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What changed in a replica's prefix cache.  Empty it if `is_reset`, then take out `removed`, then put in `stored`.

    Blocks are named by the hashes of app/kv_cache/block_hashes.py, which are the same for every engine.  No hash is in
    both lists.
    """

    stored: list[int]
    removed: list[int]
    is_reset: bool = False


BlockHash = int | bytes
"""An engine's own name of a KV block.  Only that engine understands it."""


class BlockStored(msgspec.Struct, frozen=True, tag=True):
    """Full KV blocks that an engine's prefix cache holds from now on.  They are a chain: each is the next one's parent.

    `token_ids` holds the blocks' tokens one after the other.
    """

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    """The block before the first one; None at the beginning of a prompt."""
    token_ids: list[int]
    block_size: int
    cache_salt: str | None = None
    """The salt of the prompts that may use the blocks."""


class BlockRemoved(msgspec.Struct, frozen=True, tag=True):
    """Blocks that the prefix cache no longer holds."""

    block_hashes: list[BlockHash]


class AllBlocksCleared(msgspec.Struct, frozen=True, tag=True):
    """The prefix cache is to be taken as empty, whatever earlier events said."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared
