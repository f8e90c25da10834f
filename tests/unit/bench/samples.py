"""Measurements and reports that the tests of `baton bench` make up."""

from __future__ import annotations

from typing import Any

from app.bench.load import LoadResult
from app.bench.report import Machine, Measurement, Report


def make_result(**changes: Any) -> LoadResult:
    """All latencies and rates are 1, of 8 requests with 64 tokens each."""
    fields: dict[str, Any] = {name: 1.0 for name in LoadResult.__struct_fields__ if name != "failures"}
    known = {"num_completed": 8, "num_failed": 0, "input_tokens": 4000, "output_tokens": 512, "client_cores": 0.1}
    return LoadResult(**{**fields, **known, **changes})


def make_measurement(target: str, repetition: int, concurrency: int = 1, **changes: Any) -> Measurement:
    """0.25 CPU seconds per request; `cpu_s`, `rate` and `speed` are the measurement's, other changes the result's."""
    own = {name: changes.pop(name) for name in ("rate", "speed") if name in changes}
    cpu_s = changes.pop("cpu_s", 0.25)
    return Measurement(target, repetition, concurrency, make_result(**changes), cpu_s, **own)


def make_report(**changes: Any) -> Report:
    """Of a machine that there is not; the baseline is vllm."""
    fields: dict[str, Any] = {
        "command": "baton bench",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": Machine(cpu="Abacus", num_cores=2, memory_gib=24.0, kernel="Linux 6"),
        "versions": {"ray": "2.60.0"},
        "baseline": "vllm",
    }
    return Report(**{**fields, **changes})
