"""What a plain copy between two GPUs takes, as the bound for every KV transfer.

``python -m benchmarks.gpu.peer_copy [DEVICE DEVICE]`` prints JSON.  It has a process of its own, so that no memory of
the GPUs is taken when the engines start.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

import msgspec

from app.errors import BatonError

SIZES_MIB = (1, 8, 64, 256, 1024)
REPEAT = 20
WARM_UPS = 3
TIMEOUT_S = 180.0


class PeerCopy(msgspec.Struct, frozen=True):
    """Copies of one size from one device to another."""

    size_bytes: int
    seconds: float
    """The median."""

    @property
    def gb_per_s(self) -> float:
        return self.size_bytes / self.seconds / 1e9


class PeerCopyFailed(BatonError):
    """The copies could not be measured."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


def measure_peer_copy(device: str) -> list[PeerCopy]:
    """Measure in another process, between the first two GPUs or inside of a CPU's memory.  Raises PeerCopyFailed."""
    devices = ["cuda:0", "cuda:1"] if device == "cuda" else ["cpu", "cpu"]
    command = [sys.executable, "-m", "benchmarks.gpu.peer_copy", *devices]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise PeerCopyFailed(f"the copies did not end within {TIMEOUT_S:.0f} s") from None
    if answer.returncode:
        raise PeerCopyFailed(f"the copies failed: {(answer.stderr.strip() or 'no message').splitlines()[-1]}")
    return msgspec.json.decode(answer.stdout.splitlines()[-1], type=list[PeerCopy])


def _copy(source: str, target: str) -> list[PeerCopy]:
    import torch

    devices = [torch.device(name) for name in (source, target) if name != "cpu"]

    def synchronize() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    results = []
    for mib in SIZES_MIB:
        size = mib * 1024**2
        sent = torch.ones(size, dtype=torch.uint8, device=source)
        received = torch.empty(size, dtype=torch.uint8, device=target)
        seconds = []
        for _ in range(WARM_UPS + REPEAT):
            synchronize()
            began = time.perf_counter()
            received.copy_(sent)
            synchronize()
            seconds.append(time.perf_counter() - began)
        results.append(PeerCopy(size, median(seconds[WARM_UPS:])))
    return results


if __name__ == "__main__":
    print(msgspec.json.encode(_copy(*(sys.argv[1:] or ("cuda:0", "cuda:1")))).decode())
