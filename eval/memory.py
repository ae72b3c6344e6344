"""How much memory a piece of work takes at its peak."""

import ctypes
import gc
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the peak between entering and leaving.

    On a GPU it counts what PyTorch allocated there; elsewhere the resident memory of the whole process, on Linux only.

    Args:
        device: Where the work runs.

    Attributes:
        result: ``measure`` (what was counted), ``before`` and ``peak`` in bytes; ``None`` where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.result: dict[str, Any] | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        try:
            ctypes.CDLL(None).malloc_trim(0)  # buffers kept for reuse are not this work's
            RESET.write_text("5")  # sets the peak to what is resident now
            self.before = _status("VmRSS")
        except (OSError, AttributeError, TypeError):
            self.before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            peak, measure = torch.cuda.max_memory_allocated(self.device), "allocated on the GPU"
        elif self.before is None:
            return
        else:
            peak, measure = _status("VmHWM"), "resident memory of the process"
        self.result = {"measure": measure, "before": self.before, "peak": peak}


def _status(name: str) -> int:
    """A line of the process's status that is given in KiB, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
