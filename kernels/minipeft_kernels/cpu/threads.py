"""Who runs a loop: the threads that torch already has.

A loop's work is cut into pieces, and each thread takes the next piece until none is left: a thread
that is held up by other work takes fewer.  torch computes on the threads of an OpenMP library,
which wait for work in a busy loop after each of torch's operations, so threads of our own would
have to share the cores with them.  GOMP_parallel is the function of that library which a compiler
calls for `#pragma omp parallel`; found in the library that torch itself has loaded, it gives our
loop to the very threads that have just multiplied.  Where torch has no such library (macOS,
Windows), a pool of Python's threads does it: C functions called through ctypes hold no lock.

numba's own threads (`parallel=True`) load a second OpenMP library beside torch's, or end the
process when two threads of Python call.  After a fork the child has none of torch's threads, and
waits for them for ever, in our loops as in torch's own: it must call torch.set_num_threads(1), as
workers of DataLoader do.
"""

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, types

from minipeft_kernels.cpu.compiled import call_loop, compiled, take_piece

ALONE = 2**15  # weights: less is done before a second thread has begun


@compiled(types.voidptr)
def _work(address: Any) -> None:
    """Take pieces until none is left."""
    header = carray(address, 3, types.int64)
    place = header.ctypes.data
    scratch = np.empty(8192, np.float32)
    while True:
        piece = take_piece(place)
        if piece >= header[1]:
            return
        call_loop(header[2], place, piece, scratch.ctypes.data)


_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_work.address)


def _team() -> Any:
    """GOMP_parallel(function, data, threads, flags) of torch's library, or None."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.restype, found.argtypes = None, (ctypes.c_void_p,) * 2 + (ctypes.c_uint,) * 2
    return found


_parallel = _team()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="minipeft")


def run(loop: Any, arguments: Any, weights: int) -> None:
    """Run all pieces of a loop, which has this many weights to work on."""
    arguments.loop, place = loop.address, ctypes.addressof(arguments)
    threads = (
        torch.get_num_threads()
    )  # all: the library ends threads that a smaller team leaves out
    if threads <= 1 or weights <= ALONE or arguments.pieces <= 1:
        _alone(place)
    elif _parallel is not None:
        _parallel(_work.address, place, threads, 0)
    else:
        list(_pool(os.getpid(), threads).map(_alone, [place] * threads))
