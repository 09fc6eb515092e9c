"""The highest memory of this process, from a moment on."""

import gc
import sys
from pathlib import Path

import torch

_STATUS, _MARK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM at its highest (Linux)."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


class PeakMemory:
    """The highest memory since this object was made: of the process, or of CUDA's allocations.

    On Linux the resident memory, whose highest mark is set back first; elsewhere the highest of the
    process so far, less what it was when this was made, which is too little where it had been
    higher before.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        self.before = self._highest()
        if _MARK.exists():
            _MARK.write_text("5")  # the highest mark starts again from now
            self.before = resident_bytes("VmRSS")

    @staticmethod
    def _highest() -> int:
        if _STATUS.exists():
            return resident_bytes("VmHWM")
        import resource  # no such module on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def figures(self) -> dict[str, int]:
        """Bytes: the peak above what was there at the start, and of the whole process."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            return {"peak_bytes": peak, "process_peak_bytes": peak}
        peak = self._highest()
        return {"peak_bytes": peak - self.before, "process_peak_bytes": peak}
