"""Where Baton departs from vLLM's own behaviour, each with the reason and when it can go."""

from __future__ import annotations


def allow_several_greedy_sequences() -> None:
    """Serve ``n`` > 1 with temperature 0, as OpenAI's API does; vLLM 0.32 refuses it with 400.

    vLLM's reason is that the sequences come out equal, not that it could not serve them: each one is a request of
    its own by the time it reaches an engine.  Can go once vLLM accepts it.
    """
    from vllm.sampling_params import SamplingParams

    SamplingParams._verify_greedy_sampling = lambda self: None
