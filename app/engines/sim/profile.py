"""How long an engine takes: a model of the times of one machine with one LLM, and how it is fitted to measurements.

An engine step that computes `n` new prompt tokens of sequences, each from position `p` on, and one token for each
of `b` others, which have `k` tokens of KV together, takes

    max(prefill.base_s, if n; step.base_s, if b)
    + prefill.per_token_s * n + prefill.per_token_squared_s * sum((p + n)^2 - p^2)
    + step.per_sequence_s * b + step.per_kv_token_s * k

so the squares of a prompt add up to the same whether it is computed at once, in chunks, or after a cached prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.errors import ConfigError
from app.least_squares import fit_non_negative

FOLDER = Path(__file__).with_name("profiles")
"""The profiles that come with Baton."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PrefillTimes(_Section):
    """The time of a prompt in seconds: `base_s`, and what each uncached token and its square adds."""

    base_s: float = Field(ge=0)
    per_token_s: float = Field(ge=0)
    per_token_squared_s: float = Field(ge=0)


class StepTimes(_Section):
    """The time of one token for each running sequence in seconds: `base_s`, and what each sequence and each token of KV
    adds."""

    base_s: float = Field(ge=0)
    per_sequence_s: float = Field(ge=0)
    per_kv_token_s: float = Field(ge=0)


class TransferTimes(_Section):
    """The time of pulling one prompt's KV, in seconds."""

    base_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)


class LatencyTimes(_Section):
    """What a prompt takes in seconds besides its steps, while others may run.

    Only fleets in virtual time (benchmarks/routing) read these times: around an engine in real time they pass anyway.
    """

    engine_s: float = Field(default=0.0, ge=0)
    """In the engine: on the way to its first step and from its last one."""
    prefill_call_s: float = Field(default=0.0, ge=0)
    """From the frontend to a prefill engine."""
    delivery_s: float = Field(default=0.0, ge=0)
    """From the end of a remote prefill to its first token, which travels with the descriptor."""


class SimProfile(_Section):
    """The times of one engine."""

    source: str = Field(min_length=1)
    """Where each number comes from."""
    prefill: PrefillTimes
    step: StepTimes
    transfer: TransferTimes
    latency: LatencyTimes = LatencyTimes()
    kv_bytes_per_token: int = Field(gt=0)
    """2 (key and value) * layers * KV heads * head size * bytes of one number."""

    def prefill_s(self, num_tokens: int) -> float:
        """Return the seconds that a prompt of `num_tokens` takes, computed alone and in one step."""
        times = self.prefill
        return times.base_s + times.per_token_s * num_tokens + times.per_token_squared_s * num_tokens**2

    def step_s(self, num_sequences: int, num_kv_tokens: int) -> float:
        """Return the seconds for one token of each of `num_sequences` with `num_kv_tokens` tokens of KV together."""
        times = self.step
        return times.base_s + times.per_sequence_s * num_sequences + times.per_kv_token_s * num_kv_tokens

    def transfer_s(self, num_bytes: int) -> float:
        """Return the seconds that pulling `num_bytes` of KV takes."""
        return self.transfer.base_s + num_bytes / self.transfer.bytes_per_s


def built_in_profiles() -> list[str]:
    """Return the names of the profiles that come with Baton."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(name: str) -> SimProfile:
    """Return the built-in profile `name`, or the one in the YAML file at the path `name`.  Raises ConfigError."""
    is_path = "/" in name or name.endswith((".yaml", ".yml"))
    if not is_path and name not in built_in_profiles():
        known = ", ".join(built_in_profiles())
        raise ConfigError("engine_args.profile", f"there is no profile {name!r}; known are {known}, or a file's path")
    path = Path(name).expanduser() if is_path else FOLDER / f"{name}.yaml"
    try:
        fields: Any = yaml.safe_load(path.read_text())
        return SimProfile.model_validate(fields)
    except OSError as error:
        raise ConfigError("engine_args.profile", f"{path}: {error.strerror or 'cannot be read'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("engine_args.profile", f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise ConfigError("engine_args.profile", f"{path}: {field}: {problem['msg']}") from None


def fit_prefill(measured: Sequence[tuple[int, float]]) -> PrefillTimes:
    """Return the times that come closest to `measured`: (tokens of a prompt, seconds)."""
    rows = [[1.0, tokens, tokens**2] for tokens, _ in measured]
    base_s, per_token_s, per_token_squared_s = fit_non_negative(rows, [seconds for _, seconds in measured])
    return PrefillTimes(base_s=base_s, per_token_s=per_token_s, per_token_squared_s=per_token_squared_s)


def fit_step(measured: Sequence[tuple[int, int, float]]) -> StepTimes:
    """Return the times that come closest to `measured`: (sequences, tokens of KV that they have together, seconds)."""
    rows = [[1.0, sequences, kv_tokens] for sequences, kv_tokens, _ in measured]
    base_s, per_sequence_s, per_kv_token_s = fit_non_negative(rows, [seconds for *_, seconds in measured])
    return StepTimes(base_s=base_s, per_sequence_s=per_sequence_s, per_kv_token_s=per_kv_token_s)


def to_yaml(profile: SimProfile) -> str:
    """Return the text of a file that `load_profile` reads."""
    fields = profile.model_dump(exclude={"source"})
    source = "".join(f"  {line}\n" for line in profile.source.splitlines())
    return f"source: |\n{source}{yaml.safe_dump(fields, sort_keys=False)}"
