"""Ray Serve LLM's engine for vLLM with nothing behind it, to measure what Ray Serve LLM itself costs.

``RAYLLM_VLLM_ENGINE_CLS`` names the engine class that Ray Serve LLM uses.  This class is Ray Serve LLM's own, with
vLLM's OpenAI handlers; only the engine that these call is another.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from benchmarks.peers.fake_engine import FakeEngine


class FakeVLLMEngine(VLLMEngine):
    """Ray Serve LLM's engine over `FakeEngine`."""

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        return FakeEngine(vllm_engine_config)
