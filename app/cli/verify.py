"""``baton verify``: does disaggregation change the output?

The running application serves each prompt greedily in two ways, and the outputs are compared.

One way is remote prefill.  The other is usually local prefill on the decode replica, which is aggregated serving on the
same weights.  If `reference` names an aggregated model of the same application, that model serves the prompt instead.
Without a `reference`, a model that only its prefill pool can prefill (SGLang without an `aggregated` pool) is compared
with that pool: the prompt and the answer so far are prefilled again for each token, so that no token depends on KV that
was moved.

Under disaggregation, decode computes the last prompt token by itself from KV that it did not make.  It does the same
after a hit in its own prefix cache, and in low precision that alone changes logprobs a little.  So the engine's own
noise is measured as the difference between aggregated serving with and without such a hit.  A token may differ only
where noise can flip it: where the logprobs of the two best candidates are closer than what passes as equal.

Each serving has its own cache salt, so that none can reuse another's KV.  With `corrupt_kv` the remote prefill computes
the KV of another prompt, and the comparison must fail: if it passed, it would prove nothing.

Before and right after a start there may be no application yet, a frontend may not have found all replicas, and each
request may reach another frontend than the one before.  So verify waits until /v1/models is there and /health says that
the pools can be reached, and serves prompts again if it was a missing pool that decided how they were served, but for
no other reason.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
import typer
from rich.console import Console
from rich.table import Table

from app.bench.client import ask, check_admin, describe, find_cards, new_client, parse_url, use_key
from app.cli.options import ApiKey
from app.cli.smoke import Explanation
from app.errors import BatonError
from app.messages import PrefillMode

PROMPT_LENGTHS = (7, 64, 65, 500, 2000)
SHARED_PREFIX_TOKENS = 500
OUTPUT_TOKENS = 24
ANSWER_TIMEOUT_S = 300.0
TOLERANCE = 0.03
"""The logprob difference that passes, whatever the noise."""
TOLERANCE_OF_PREFILL = 0.2
"""The same if the prefill pool is the reference.  Prefill uses other kernels than decode; in bfloat16 the differences
were up to 0.06 (tiny model, SGLang on a CPU).  Wrong KV shows in the first tokens, with differences of more than 1."""
LARGEST_NOISE = 0.25
"""With more logprob noise than this, the engine's own prefix cache changes its output, and nothing can be compared."""
WAIT_S = 60.0
"""How long the application, or a pool, may take to become reachable, by default."""
POLL_S = 0.25
"""The time between two questions whether a pool can be reached."""
MISSING = {"no_prefill_replica": "prefill", "no_usable_link": "prefill", "no_decode_replica": "decode"}
"""The pool that a frontend could not reach if it did not prefill remotely as asked, by the reason that it gives."""
T = TypeVar("T")
WORDS = "The quick brown fox jumps over 13 lazy dogs; while (x < 42) { return f(x, y) + 'value'; } # Größe, 東京, Ωmega"
"""Random prompts are drawn from the tokens of this text, so they suit any model's vocabulary."""


def verify(
    url: Annotated[str, typer.Option(help="Where Baton serves.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the first that is disaggregated.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="An aggregated model there of the same weights, to compare with.")
    ] = None,
    corrupt_kv: Annotated[
        bool, typer.Option("--corrupt-kv", "--spoil", help="Give decode wrong KV: the check must then fail.")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="Logprob difference that always passes; by default 0.03, or 0.2 by prefill.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for an application or a pool that is not there yet.")
    ] = WAIT_S,
    api_key: ApiKey = None,
) -> None:
    """Compare output under disaggregation with output without it, on the running application."""
    use_key(api_key)
    passed = compare_output(
        url, model=model, reference=reference, corrupt_kv=corrupt_kv, tolerance=tolerance, seed=seed, wait_s=wait
    )
    if not passed:
        raise typer.Exit(1)


class VerifyError(BatonError):
    """The comparison could not be made."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class NotReady(Exception):
    """A pool that the comparison needs cannot be reached now; the message names it."""


class _PoolHealth(msgspec.Struct):
    reachable: int


class _ModelHealth(msgspec.Struct):
    name: str
    pools: dict[str, _PoolHealth]


class _Health(msgspec.Struct):
    """What /health says of each model's pools: how many replicas the frontend that answers can reach."""

    models: list[_ModelHealth]


class GreedyOutput(msgspec.Struct, frozen=True):
    """The output of one serving of a prompt.  Each list has one value for each token.

    `margins` are the logprob differences between the two likeliest candidates, of which greedy decoding took the first.
    """

    token_ids: list[str]
    logprobs: list[float]
    margins: list[float]

    def num_equal(self, other: GreedyOutput) -> int:
        """Return how many leading tokens are the same."""
        pairs = zip(self.token_ids, other.token_ids, strict=False)
        shorter = min(len(self.token_ids), len(other.token_ids))
        return next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)

    def max_difference(self, other: GreedyOutput) -> float:
        """Return the largest logprob difference before the first token that differs.

        It is infinite if the very first token differs.
        """
        num = self.num_equal(other)
        pairs = zip(self.logprobs[:num], other.logprobs[:num], strict=True)
        return max((abs(a - b) for a, b in pairs), default=float("inf"))


class Case(msgspec.Struct, frozen=True):
    """One prompt's comparison."""

    name: str
    prompt_tokens: int
    remote: GreedyOutput
    local: GreedyOutput
    noise: float

    def passes(self, tolerance: float) -> bool:
        if self.noise > LARGEST_NOISE:
            return False
        allowed = max(tolerance, 2 * self.noise)
        num_equal = self.remote.num_equal(self.local)
        if num_equal < len(self.local.token_ids) and self.local.margins[num_equal] > allowed:
            return False
        return num_equal > 0 and self.remote.max_difference(self.local) <= allowed


class Transfers(msgspec.Struct, frozen=True):
    """What the decode replicas have pulled so far.  Probes do not count in `num`."""

    num: int
    num_bytes: int
    transports: list[str]


class VerifyTarget:
    """The application under test."""

    def __init__(
        self, client: httpx.Client, model: str | None = None, reference: str | None = None, wait_s: float = WAIT_S
    ) -> None:
        self._client = client
        self._wait_s = wait_s
        self._has_said_so = False
        self._when_ready(self._check_deployed)
        card = self._find(model, "disaggregated")
        self.model: str = card["id"]
        self.reference: str | None = self._find(reference, "aggregated")["id"] if reference else None
        self.max_model_len: int = card["max_model_len"]
        self.can_prefill_locally: bool = card["local_prefill"]
        self.num_remote_requests = 0
        tokenized = self._ask("POST", "/tokenize", {"model": self.model, "prompt": WORDS})
        self._vocabulary: list[int] = _json(tokenized)["tokens"]

    def _find(self, name: str | None, mode: str) -> Any:
        """Return what the server says about the model called `name`, or about its first model in `mode`."""
        cards = find_cards("--url", self._client)
        for card in cards:
            if card.get("mode") == mode and card["id"] == (name or card["id"]):
                return card
        served = ", ".join(f"{card['id']} ({card.get('mode')})" for card in cards)
        wanted = f"{mode} model {name}" if name else f"{mode} model"
        raise VerifyError(f"{self._client.base_url} serves no {wanted}; it serves {served or 'none'}")

    def random_prompt(self, rng: random.Random, num_tokens: int) -> list[int]:
        return rng.choices(self._vocabulary, k=num_tokens)

    @property
    def tolerance(self) -> float:
        """The logprob difference that passes by default."""
        return TOLERANCE if self.reference or self.can_prefill_locally else TOLERANCE_OF_PREFILL

    def wait_until_ready(self) -> None:
        """Return when every pool of the models that are compared has a replica that can be reached.

        Raises VerifyError that names the pool if that takes too long.
        """
        self._when_ready(self._check_ready)

    def _check_deployed(self) -> None:
        """Raise NotReady as long as Serve has no application here, or no frontend of it."""
        answer = self._ask("GET", "/v1/models", also=(404, 503))
        if not answer.is_success:
            raise NotReady(f"{self._client.base_url} serves no application (/v1/models answered {describe(answer)})")

    def _check_ready(self) -> None:
        answer = self._ask("GET", "/health", also=(503,))  # 503 tells of pools too
        try:
            models = msgspec.json.decode(answer.content, type=_Health).models
        except msgspec.DecodeError as error:
            check_admin(self._client)
            raise VerifyError(f"GET /health is not Baton's ({error}); is it Baton that runs there?") from None
        for model in models:
            missing = [role for role, pool in model.pools.items() if not pool.reachable]
            if missing and model.name in (self.model, self.reference):
                raise NotReady(_unreachable(missing[0], model.name))

    def _when_ready(self, action: Callable[[], T]) -> T:
        """Return what `action` returns; while it raises NotReady, repeat it."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return action()
            except NotReady as problem:
                if time.monotonic() >= deadline:
                    raise VerifyError(
                        f"{problem}, for {self._wait_s:g} s: `baton status` says why; --wait SECONDS waits longer"
                    ) from None
                self._say_once(f"waiting up to {self._wait_s:g} s: {problem}")
                time.sleep(POLL_S)

    def _say_once(self, progress: str) -> None:
        if not self._has_said_so:
            typer.echo(progress, err=True)
        self._has_said_so = True

    def serve(self, prompts: list[list[int]], mode: PrefillMode) -> GreedyOutput:
        """Serve `prompts` one after the other with one cache salt, and return the greedy answer to the last.

        If a pool cannot be reached, all are served again.  They get another salt, because decode would not fetch what
        it has cached by now.
        """
        return self._when_ready(lambda: self._serve(prompts, mode))

    def _serve(self, prompts: list[list[int]], mode: PrefillMode) -> GreedyOutput:
        salt = uuid.uuid4().hex
        answers = [self._complete(prompt, mode, salt, OUTPUT_TOKENS) for prompt in prompts]
        return answers[-1]

    def serve_without_transfer(self, prompts: list[list[int]], *, after_hit: bool) -> GreedyOutput:
        """Return the answer to the last of `prompts`, computed from KV that was not moved.

        With `after_hit` the prompt is served again, so that it hits the prefix cache.
        """
        if self.reference is None and not self.can_prefill_locally:
            return self._when_ready(lambda: self._serve_by_prefill(prompts[-1], share_prefixes=after_hit))
        return self.serve([*prompts, prompts[-1]] if after_hit else prompts, "local")

    def _serve_by_prefill(self, prompt: list[int], *, share_prefixes: bool) -> GreedyOutput:
        """Return the greedy answer; a prefill replica computes each of its tokens from all tokens before it."""
        salt = uuid.uuid4().hex
        whole = GreedyOutput([], [], [])
        for _ in range(OUTPUT_TOKENS):
            so_far = prompt + [int(token.removeprefix("token_id:")) for token in whole.token_ids]
            salt = salt if share_prefixes else uuid.uuid4().hex
            next_one = self._complete(so_far, "remote", salt, 1)
            whole = GreedyOutput(
                whole.token_ids + next_one.token_ids,
                whole.logprobs + next_one.logprobs,
                whole.margins + next_one.margins,
            )
        return whole

    def _complete(self, prompt: list[int], mode: PrefillMode, salt: str, max_tokens: int) -> GreedyOutput:
        is_reference = mode == "local" and self.reference is not None
        body = {
            "model": self.reference if is_reference else self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 2,
            "return_tokens_as_token_ids": True,
            "cache_salt": salt,
            "vllm_xargs": {"baton_prefill": mode},
        }
        answer = self._ask("POST", "/v1/completions", body, headers={"x-baton-explain": "1"}, also=(503,))
        if answer.status_code == 503:  # no replica for it, so nothing has run
            raise NotReady(f"{body['model']} cannot be served ({describe(answer)})")
        if mode != "local":
            if (pool := _missing_pool(answer)) is not None:
                raise NotReady(_unreachable(pool, self.model))
            self.num_remote_requests += 1
        logprobs = _json(answer)["choices"][0]["logprobs"]
        best = [sorted(candidates.values(), reverse=True) for candidates in logprobs["top_logprobs"]]
        margins = [first - second for first, second, *_ in best]
        return GreedyOutput(logprobs["tokens"], logprobs["token_logprobs"], margins)

    def transfers(self) -> Transfers:
        return self._when_ready(self._transfers)

    def _transfers(self) -> Transfers:
        replicas = _json(self._ask("GET", "/stats"))["replicas"]
        decode = [replica for replica in replicas if replica["role"] == "decode" and replica["model"] == self.model]
        if not decode:
            raise NotReady(_unreachable("decode", self.model))
        if silent := [replica["replica_id"] for replica in decode if "error" in replica]:
            raise VerifyError(f"decode replica {silent[0]} does not tell what it received: {decode}")
        return Transfers(
            sum(replica["num_transfers"] - replica["num_probes"] for replica in decode),
            sum(replica["transferred_bytes"] for replica in decode),
            sorted({replica["transport"] for replica in decode if replica["transport"]}),
        )

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
        return ask("--url", self._client, method, path, body, **options)


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        request = answer.request
        raise VerifyError(
            f"{request.method} {request.url.path} answered no JSON; is it Baton that runs there?"
        ) from error


def _missing_pool(answer: httpx.Response) -> str | None:
    """Return the pool that the answering frontend could not reach, if it prefilled locally for that reason alone."""
    explained = msgspec.json.decode(answer.headers.get("x-baton-explain", "[]"), type=list[Explanation])
    return MISSING.get(explained[0].actual.reason or "") if explained else None


def _unreachable(pool: str, model: str) -> str:
    return f"the {pool} pool of {model} has no replica that the frontend can reach"


def compare_output(
    url: str,
    *,
    model: str | None = None,
    reference: str | None = None,
    corrupt_kv: bool,
    tolerance: float | None = None,
    seed: int,
    wait_s: float = WAIT_S,
) -> bool:
    """Print the comparison of `model` (by default the first disaggregated one) as a table.  Returns whether all passed.

    `reference` is an aggregated model of the same application, with the same weights and engine.

    An application that is not there yet, or a pool that cannot be reached, has `wait_s` to come up.

    Raises ConfigError if the application cannot be reached, and VerifyError if a pool cannot or if it did not transfer
    every prompt's KV.
    """
    _, base_url = parse_url("--url", url)
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        endpoint = VerifyTarget(client, model, reference, wait_s)
        endpoint.wait_until_ready()
        before = endpoint.transfers()
        prompts = _prompts(endpoint, random.Random(seed))
        cases = [_compare(endpoint, name, group, "corrupted" if corrupt_kv else "remote") for name, group in prompts]
        after = endpoint.transfers()
    num_remote = endpoint.num_remote_requests
    tolerance = endpoint.tolerance if tolerance is None else tolerance
    _print(cases, tolerance, Console(highlight=False))
    num, num_bytes = after.num - before.num, after.num_bytes - before.num_bytes
    by = ", ".join(after.transports) or "nothing"
    print(f"KV of {num} of {num_remote} prompts moved: {num_bytes / 1e6:.1f} MB by {by}")
    if num < num_remote:
        raise VerifyError(f"only {num} of {num_remote} prompts were prefilled remotely: nothing was verified")
    passed = all(case.passes(tolerance) for case in cases)
    print("passed" if passed else "FAILED: output under disaggregation differs from aggregated output")
    return passed


def _prompts(endpoint: VerifyTarget, rng: random.Random) -> list[tuple[str, list[list[int]]]]:
    """Named groups of prompts; the last of a group is compared."""
    longest = endpoint.max_model_len - OUTPUT_TOKENS
    groups = [
        (f"{length} tokens", [endpoint.random_prompt(rng, length)]) for length in PROMPT_LENGTHS if length <= longest
    ]
    prefix = endpoint.random_prompt(rng, max(1, min(SHARED_PREFIX_TOKENS, longest - 64)))
    shared = [prefix + endpoint.random_prompt(rng, 64) for _ in range(3)]
    return [
        *groups,
        (f"shared prefix of {len(prefix)}", shared),
        ("the same prompt again", [shared[0], shared[0]]),
    ]


def _compare(endpoint: VerifyTarget, name: str, prompts: list[list[int]], mode: PrefillMode) -> Case:
    remote = endpoint.serve(prompts, mode)
    local = endpoint.serve_without_transfer(prompts, after_hit=False)
    after_hit = endpoint.serve_without_transfer(prompts, after_hit=True)
    return Case(name, len(prompts[-1]), remote, local, noise=local.max_difference(after_hit))


def _print(cases: list[Case], tolerance: float, console: Console) -> None:
    table = Table(title="disaggregated against aggregated, greedy")
    for heading in ("prompt", "tokens", "equal output tokens", "max logprob difference", "noise", ""):
        table.add_column(heading, justify="left" if heading in ("prompt", "") else "right")
    for case in cases:
        table.add_row(
            case.name,
            str(case.prompt_tokens),
            f"{case.remote.num_equal(case.local)}/{len(case.local.token_ids)}",
            f"{case.remote.max_difference(case.local):.2g}",
            f"{case.noise:.2g}",
            "ok" if case.passes(tolerance) else "DIFFERS",
        )
    console.print(table)
