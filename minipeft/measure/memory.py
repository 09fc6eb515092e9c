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

    On Linux the resident memory, whose highest mark is set back first.  Where the mark cannot be
    set back (macOS, some containers) it is the highest of the process so far, less what that was
    when this was made: too little where it had been higher before.  On Windows Python has no such
    figure, and `figures` gives None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self.earlier = 0
        gc.collect()
        if device.type != "cuda":
            self.before = self._highest()
        self.restarts = self._set_back()
        if self.restarts and device.type != "cuda":
            self.before = resident_bytes("VmRSS")

    def part(self) -> None:
        """From now on `part_peak_bytes` is counted anew; the peak of the whole goes on."""
        self.earlier = max(self.earlier, self._highest())
        self.restarts = self._set_back()

    def _set_back(self) -> bool:
        """Let the highest mark start again from now; whether it could."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            _MARK.write_text("5")
        except OSError:
            return False
        return True

    def _highest(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if _STATUS.exists():
            return resident_bytes("VmHWM")
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def figures(self) -> dict[str, int | None]:
        """Bytes above what was there at the start, and of the whole process; None: not known.

        `peak_bytes` is the highest of all parts, `part_peak_bytes` of the last one.
        """
        part = self._highest()
        peak = max(self.earlier, part)
        return {
            "peak_bytes": peak - self.before if peak else None,
            "process_peak_bytes": peak or None,
            "part_peak_bytes": part - self.before if self.restarts else None,
        }
