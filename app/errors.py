"""Every error that crosses a seam of Baton, in one tree of classes.

Each class passes all its fields to ``super().__init__`` so that it survives pickling between Serve
deployments (tests/unit/test_errors.py pickles every one of them).
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of all errors that Baton raises on purpose."""


class ConfigError(BatonError):
    """The configuration cannot work.  This is raised before any engine starts, or when a replica cannot become ready.

    ``field`` is the dotted path inside ``args`` of the Serve application, e.g. ``models.0.decode.replicas``.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class InvalidRequest(BatonError):
    """The engine refuses the request itself, so a retry elsewhere would fail in the same way (HTTP 400)."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Quarantined(BatonError):
    """Engines died of this request, so it is refused for `seconds` (HTTP 400, after which no client tries again)."""

    def __init__(self, num_engines: int, seconds: int) -> None:
        super().__init__(num_engines, seconds)
        self.num_engines = num_engines
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"{self.num_engines} engines died while they computed this prompt with these sampling parameters. To "
            f"protect the others, it is refused for {self.seconds} s; do not send it again."
        )


class DeadlineExceeded(BatonError):
    """A request did not end in the time that it had in all, of `limits.max_request_s` or its own (HTTP 504)."""

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return "the request did not end within the time that it had in all"


class EngineDead(BatonError):
    """The engine's processes are gone or hang; Serve replaces the replica after its health check fails."""

    def __init__(self, detail: str = "the engine process died") -> None:
        super().__init__(detail)


class CannotResume(BatonError):
    """The engine cannot go on with a sequence of this kind that another one has begun (see the README's list)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the sequence cannot be resumed: {self.reason}"


class TakenElsewhere(BatonError):
    """A sequence leaves its replica, which is being removed or needed by a higher class, and goes on; nobody failed.

    It only ends the attempt, inside the frontend.
    """

    def __init__(self) -> None:
        super().__init__()

    def __str__(self) -> str:
        return "the sequence goes on elsewhere"


class EngineFailed(BatonError):
    """The engine ended one request with an internal error, and goes on serving others."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)


class DeltaNotTaken(BatonError):
    """The frontend could not take a token that an engine sent, so that no attempt could complete the answer."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)


class PrefillFailed(BatonError):
    """A prompt's KV did not come from prefill, and this decode engine cannot compute it; another prefill may."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)


class ReplicaLost(BatonError):
    """A replica is gone, or is no longer the one that the caller meant."""

    def __init__(self, replica_id: str, detail: str = "the replica is gone") -> None:
        super().__init__(replica_id, detail)
        self.replica_id = replica_id
        self.detail = detail

    def __str__(self) -> str:
        return f"replica {self.replica_id}: {self.detail}"


class HandoffNotTaken(ReplicaLost):
    """A decode replica could not be given a handoff, so that its engine never had the sequence."""


class NoReplica(BatonError):
    """A pool that the request needs has no ready replica, or none that could serve it (HTTP 503)."""

    def __init__(self, pool: str, problem: str = "has no ready replica") -> None:
        super().__init__(pool, problem)
        self.pool = pool
        self.problem = problem

    def __str__(self) -> str:
        return f"the {self.pool} pool {self.problem}"


class Asleep(BatonError):
    """A model whose pools slept did not wake within ``limits.max_wake_s`` (HTTP 503 with ``Retry-After``)."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the model is still waking up, for about another {self.retry_after_s} s"


class LimitReached(BatonError):
    """A tenant has used what one of its limits allows for now (HTTP 429 with ``Retry-After``)."""

    def __init__(self, tenant: str, limit: str, retry_after_s: float) -> None:
        super().__init__(tenant, limit, retry_after_s)
        self.tenant = tenant
        self.limit = limit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.tenant} has reached its limit `{self.limit}`; please retry in {self.retry_after_s} s"


class Overloaded(BatonError):
    """No replica will have room in time (HTTP 429 with ``Retry-After``).

    `retry_after_s` is by how much the first token would come later than ``limits.max_ttft_ms`` allows.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"every replica that could prefill has too much to do for another {self.retry_after_s} s"
