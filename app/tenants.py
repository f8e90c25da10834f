"""Who may ask: the tenants of a service, their keys, and what each may use.

They are in a file of their own (`security.keys`), so that keys come and go without a restart::

    tenants:
      - name: search
        keys: [5e88489...]  # SHA-256 of the key in hex: `baton key` makes both
        weight: 2
      - name: operators
        keys: [1a4f9c2...]
        admin: true

Keys are random and long (`baton key`: 256 bits), so that one fast hash protects them as well as a slow one would.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator

from app.config import Settings, explain
from app.errors import ConfigError
from app.routing.decision import SERVICE_CLASSES, ServiceClass

logger = logging.getLogger("baton.tenants")

FIELD = "security.keys"
FROM_ENVIRONMENT = "env:"
KEY_PREFIX, KEY_BYTES = "baton-", 32
"""A key begins so, so that it is known for one where it does not belong, and has so many random bytes."""
Rate = Literal["requests", "prompt_tokens", "output_tokens"]
RATES: tuple[Rate, ...] = get_args(Rate)
"""What limits are about that are so much in a second."""
RELOAD_S = 2.0
"""How often the file is read.  A key that is taken out is refused within this time by every frontend."""


class Tenant(Settings):
    """One of those who share the service, and what it may use."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """It is a label of metrics."""
    keys: list[str] = Field(default=[], repr=False)
    """The SHA-256 of each key, as 64 hexadecimal digits.  Any number are valid at once; with none the tenant is shut
    out."""
    admin: bool = False
    """Whether it may use every route: /stats, /metrics, /docs, the whole of /health, and control runs
    (``baton_prefill``)."""
    models: list[str] | None = None
    """The names of the models that it may use; all if this is not set.  It is told that there are no others."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How many times as many tokens it gets as a tenant of weight 1 if both want more than they get."""
    highest_class: ServiceClass = "priority"
    """The highest service class that it gets, whatever ``service_tier`` its clients ask for."""
    requests_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    prompt_tokens_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """A prompt counts once for each of its sequences, whatever of it is cached."""
    output_tokens_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """These three are of all frontends together, and so is the next.  What comes in ten seconds may be used at once
    (app/tenant_usage.py); beyond it the answer is 429 and says when to come again."""
    max_sequences: int | None = Field(default=None, ge=1)
    """How many of its sequences run at a time; those that wait for a replica count."""
    kv_share: float | None = Field(default=None, gt=0, le=1)
    """The share of each model's KV memory that these may fill, of all replicas that decode it.  A sequence counts with
    its prompt and all that it may generate (``max_tokens``), for each of ``n`` and whatever of it is cached."""
    cache_group: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Tenants of one group share the prefix cache.  By default a tenant has its own: whether a prompt has been sent
    before can be seen by how soon its answer begins, so this tells it to the others of the group."""

    @field_validator("keys")
    @classmethod
    def _are_digests(cls, keys: list[str]) -> list[str]:
        for key in keys:
            if not re.fullmatch(r"[0-9a-f]{64}", key):  # it may be a key itself, so no message may show it
                raise ValueError("each is the SHA-256 of a key, 64 lower-case hexadecimal digits: `baton key` makes it")
        return keys

    def rates(self) -> dict[Rate, float]:
        """Return what each limit brings in a second, of those that are set."""
        rates: dict[Rate, float | None] = {
            "requests": self.requests_per_s,
            "prompt_tokens": self.prompt_tokens_per_s,
            "output_tokens": self.output_tokens_per_s,
        }
        return {kind: rate for kind, rate in rates.items() if rate is not None}

    def bound_class(self, asked: ServiceClass) -> ServiceClass:
        """Return the service class that the tenant gets if it asks for `asked`."""
        if self.highest_class == SERVICE_CLASSES[0]:
            return asked
        return max(asked, self.highest_class, key=SERVICE_CLASSES.index)

    def bound_priority(self, asked: int) -> int:
        """Return the priority that engines get if its client asks for `asked`; less goes first, 0 is the default."""
        return asked if self.highest_class == "priority" else max(0, asked)

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def cache_salt(self, asked: str | None) -> str | None:
        """Return the salt with which its prompts are cached; `asked` is the one that its client sent.

        No tenant can make another's, as each is the hash of something that begins with what it cannot choose.
        """
        if not self.name:
            return asked
        own = f"group/{self.cache_group}" if self.cache_group else f"tenant/{self.name}"
        return hashlib.blake2b(f"{own}/{asked or ''}".encode(), digest_size=16).hexdigest()

    def session(self, asked: str | None) -> str | None:
        """Return the name of a session that clients of other tenants do not share."""
        return f"{self.name}/{asked}" if asked and self.name else asked


LOCAL = Tenant.model_construct(name="", admin=True)
"""Whoever asks a service without keys on loopback: they have the machine anyway."""
ANYONE = Tenant.model_construct(name="")
"""Whoever asks a service that is open to all (`security.open`), or has shown no key."""


class _KeyFile(Settings):
    """What `security.keys` names."""

    tenants: list[Tenant] = Field(min_length=1)

    @field_validator("tenants")
    @classmethod
    def _differ(cls, tenants: list[Tenant]) -> list[Tenant]:
        for what, values in (
            ("the name {} is there twice", [tenant.name for tenant in tenants]),
            ("the key with the hash {} is there twice", [key for tenant in tenants for key in tenant.keys]),
        ):
            seen: set[str] = set()
            for value in values:
                if value in seen:
                    raise ValueError(what.format(value))
                seen.add(value)
        return tenants


def parse_tenants(text: str) -> list[Tenant]:
    """Return the tenants in the YAML of a keys file.  Raises ConfigError, in which no value is that may be a key."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter two for dates, and for what is too deep
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(FIELD, f"it is no YAML: {getattr(error, 'problem', None) or 'not readable'}{where}") from None
    if not isinstance(found, dict):
        raise ConfigError(FIELD, "it has no `tenants:`; see app/tenants.py for an example")
    try:
        return _KeyFile.model_validate(found).tenants
    except ValidationError as error:
        field, problem = explain(error, shows_input=False, documented_in="app/tenants.py")
        raise ConfigError(f"{FIELD}: {field}", problem) from None


def read_tenants(where: str) -> str:
    """Return the text that `security.keys` names: of a file, or of an environment variable after ``env:``.

    Raises ConfigError if there is none.
    """
    if where.startswith(FROM_ENVIRONMENT):
        name = where.removeprefix(FROM_ENVIRONMENT)
        if name not in os.environ:
            raise ConfigError(FIELD, f"the environment variable {name} is not set")
        return os.environ[name]
    try:
        return Path(where).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ConfigError(FIELD, f"{where} cannot be read: {problem}") from None


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


class KeyRing:
    """The tenants that `security.keys` names at present."""

    def __init__(self, where: str) -> None:
        """Raises ConfigError if there is something wrong with what `where` names."""
        self._where = where
        self.is_current = True
        """Whether what it names could be read at the last look.  If not, those before stay valid."""
        self._text = read_tenants(where)
        self.tenants = parse_tenants(self._text)
        self._by_digest = _by_digest(self.tenants)

    def find(self, key: bytes) -> Tenant | None:
        """Return the tenant with this key.

        Looked up is the key's hash, so the time that it takes tells nothing of how much of a guess is right.
        """
        return self._by_digest.get(digest(key))

    async def follow(self) -> None:
        """Take each change of the file.  This runs until it is cancelled."""
        problem = ""
        while True:
            await asyncio.sleep(RELOAD_S)
            try:
                text = await asyncio.to_thread(read_tenants, self._where)
                if text != self._text:
                    self.tenants = parse_tenants(text)
                    self._by_digest = _by_digest(self.tenants)
                    self._text = text
                    logger.info("the keys have changed: %d are valid", len(self._by_digest))
                problem = ""
            except ConfigError as error:
                if str(error) != problem:
                    problem = str(error)
                    logger.error("the keys of before stay valid: %s", problem)
            self.is_current = not problem


def _by_digest(tenants: Sequence[Tenant]) -> dict[bytes, Tenant]:
    return {bytes.fromhex(key): tenant for tenant in tenants for key in tenant.keys}


def entry(name: str, key: str, *, admin: bool) -> str:
    """Return the entry of a keys file for a tenant with this key, as YAML.

    Raises ConfigError for a name that a tenant cannot have.
    """
    fields: dict[str, Any] = {"name": name, "keys": [digest(key.encode()).hex()], **({"admin": True} if admin else {})}
    try:
        Tenant(**fields)
    except ValidationError:
        raise ConfigError("TENANT", f"{name!r} is no name: 1 to 64 letters, digits and . _ -") from None
    return yaml.safe_dump([fields], sort_keys=False)
