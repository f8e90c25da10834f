"""Lets PyPI's torchvision, a CUDA build, be imported over the CPU build of torch.

SGLang imports torchvision for text models too. The library with the CUDA build's operators does not load here.
torchvision tolerates that, but then describes two of the operators to torch, and the import ends with ``RuntimeError:
operator torchvision::nms does not exist``. So their signatures are defined just before; nobody calls them.

``baton_sglang_cpu.pth`` calls `install` at the start of each Python process of the environment, because SGLang starts
processes of its own. This costs no import: neither torch nor anything else is loaded until torchvision is imported.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # not from typing, whose import takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")

_libraries: list[Any] = []  # torch forgets the operators of a library that nobody holds


def install() -> None:
    """Define the operators as soon as torchvision is looked for."""
    sys.meta_path.insert(0, _BeforeTorchvision)


class _BeforeTorchvision:
    """A finder that finds nothing, but is asked before torchvision is imported (``importlib.abc`` would be slow)."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and not _libraries and _lacks_operators():
            _define_operators()
        return None


def _lacks_operators() -> bool:
    """Return whether torchvision is there but not from PyTorch's index of CPU builds, which have the operators."""
    from importlib.metadata import distributions

    return any(not found.version.endswith("+cpu") for found in distributions(name="torchvision"))


def _define_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for operator in OPERATORS:
        library.define(operator + SIGNATURE)
