"""Ray Serve LLM's engine for vLLM with nothing behind it: what Ray Serve LLM itself costs.

Ray Serve LLM takes another engine class from ``RAYLLM_VLLM_ENGINE_CLS``.  This one is its own, vLLM's OpenAI handlers
included, but for the engine that they call.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from benchmarks.peers.fake_engine import FakeEngine


class FakeVLLMEngine(VLLMEngine):
    """Ray Serve LLM's engine over `FakeEngine`."""

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        return FakeEngine(vllm_engine_config)
