"""The applications that are measured: which engine, with which arguments, and the Serve config of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from app.errors import ConfigError
from app.messages import EngineName

Device = Literal["cpu", "cuda"]

MODEL = "measured"
"""The name under which each application serves its model."""

CONTEXT_TOKENS = 16_384
DEFAULT_ARGS: dict[EngineName, dict[str, Any]] = {
    "vllm": {"max_model_len": CONTEXT_TOKENS, "gpu_memory_utilization": 0.7},
    "sglang": {"context_length": CONTEXT_TOKENS, "page_size": 16, "mem_fraction_static": 0.7},
}
"""The engine arguments on GPUs; those of the command line come on top."""
CPU_ARGS: dict[EngineName, dict[str, Any]] = {
    "vllm": {"max_model_len": 4096},
    "sglang": {
        "context_length": 4096,
        "page_size": 16,
        "max_total_tokens": 16_384,
        "max_running_requests": 32,
    },
}
"""The same on a CPU, where this only shows that the benchmark works."""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change of the first application that is measured against it in the same run."""

    name: str
    engine_args: dict[str, Any] = {}
    prefill_args: dict[str, Any] = {}
    decode_args: dict[str, Any] = {}
    environment: dict[str, str] = {}


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("prefill-without-graphs", prefill_args={"enforce_eager": True}),
        Variant("without-graphs", engine_args={"enforce_eager": True}),
        Variant("decode-compiled", decode_args={"compilation_config": {"mode": 3}}),
        Variant("blocks-of-64", engine_args={"block_size": 64}),
        Variant("blocks-of-128", engine_args={"block_size": 128}),
    )
}
"""Variants of vLLM that have a name."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says of the applications."""

    engines: Sequence[str]
    """Other words than engines have no meaning here."""
    source: str
    device: Device
    tensor_parallel_size: int = 1
    required_transport: str = "any"
    vllm_args: dict[str, Any] = {}
    sglang_args: dict[str, Any] = {}
    sglang_python: str = ""
    """Empty if there is none; then SGLang is not measured."""
    variants: Sequence[Variant] = ()


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """One application."""

    name: str
    engine: EngineName
    mode: Literal["disaggregated", "aggregated"]
    source: str
    device: Device = "cuda"
    tensor_parallel_size: int = 1
    engine_args: dict[str, Any] = {}
    prefill_args: dict[str, Any] = {}
    decode_args: dict[str, Any] = {}
    environment: dict[str, str] = {}
    python: str | None = None
    """The interpreter of the replicas; None for this one's."""
    required_transport: str = "any"

    def varied(self, variant: Variant) -> Setup:
        """Return the same application with the changes of `variant`."""
        return msgspec.structs.replace(
            self,
            name=variant.name,
            engine_args={**self.engine_args, **variant.engine_args},
            prefill_args={**self.prefill_args, **variant.prefill_args},
            decode_args={**self.decode_args, **variant.decode_args},
            environment={**self.environment, **variant.environment},
        )


def find_variants(named: str | None) -> list[Variant]:
    """Return the variants that ``--variants`` names: comma-separated names, or a YAML or JSON file with a list.

    Raises ConfigError.
    """
    if not named:
        return []
    if named.endswith((".yaml", ".yml", ".json")):
        try:
            return msgspec.convert(yaml.safe_load(Path(named).read_text()), list[Variant])
        except OSError as error:
            raise ConfigError("--variants", f"{named}: {error.strerror or 'cannot be read'}") from None
        except (yaml.YAMLError, msgspec.ValidationError) as error:
            raise ConfigError("--variants", f"{named} is no list of variants: {' '.join(str(error).split())}") from None
    names = named.split(",")
    for name in names:
        if name not in VARIANTS:
            raise ConfigError("--variants", f"there is no variant {name!r}; known are {', '.join(VARIANTS)}")
    return [VARIANTS[name] for name in names]


def parse_args(option: str, text: str) -> dict[str, Any]:
    """Parse the engine arguments that `option` gives as a JSON object.  Raises ConfigError."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(option, f"{text!r} is no JSON object: {error}") from None


def find_setups(choice: Choice) -> list[Setup]:
    """Return the applications to measure, in order: vLLM's and its variants, then SGLang's two."""
    defaults = DEFAULT_ARGS if choice.device == "cuda" else CPU_ARGS
    common: dict[str, Any] = {
        name: getattr(choice, name) for name in ("source", "device", "tensor_parallel_size", "required_transport")
    }
    setups = []
    if "vllm" in choice.engines:
        arguments = {**defaults["vllm"], **choice.vllm_args}
        base = Setup(name="vllm", engine="vllm", mode="disaggregated", engine_args=arguments, **common)
        setups += [base, *(base.varied(variant) for variant in choice.variants)]
    if "sglang" in choice.engines and choice.sglang_python:
        arguments = {**defaults["sglang"], **choice.sglang_args}
        apart = Setup(
            name="sglang",
            engine="sglang",
            mode="disaggregated",
            engine_args=arguments,
            prefill_args={"disable_cuda_graph": True},  # as in cluster/profiles: prompts differ in length
            python=choice.sglang_python,
            **common,
        )
        setups += [apart, msgspec.structs.replace(apart, name="sglang-aggregated", mode="aggregated", prefill_args={})]
    return setups


def serve_document(setup: Setup, port: int) -> dict[str, Any]:
    """Return the Serve config of one application, which serves at 127.0.0.1:`port`."""
    pool: dict[str, Any] = {
        "engine": setup.engine,
        "replicas": 1,
        "tensor_parallel_size": setup.tensor_parallel_size,
        "environment": dict(setup.environment),
    }
    if setup.device == "cpu":
        pool["resources"] = {"num_cpus": 0.5}
        pool["environment"].setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if setup.python is not None:
        pool["python"] = setup.python
    model = {
        "name": MODEL,
        "source": setup.source,
        "engine_args": setup.engine_args,
        "decode": {**pool, "engine_args": setup.decode_args},
    }
    if setup.mode == "disaggregated":
        model["prefill"] = {**pool, "engine_args": setup.prefill_args}
    args = {
        "models": [model],
        "device": setup.device,
        "transfer": {"required_transport": setup.required_transport},
        "frontend": {"replicas": 1, "resources": {"num_cpus": 0.5}},
    }
    application = {"name": "baton", "route_prefix": "/", "import_path": "deployments.build:build", "args": args}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
