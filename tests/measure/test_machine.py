"""The setting of the C library's allocator for processes whose memory is measured."""

import os
import subprocess
import sys

import pytest

from minipeft.measure.machine import allocator_environment

# blocks of 100 KB: below the default threshold (128 KiB), so that they lie in the heap, and the
# last one stays, so that the heap cannot shrink from its end
FREED = """
import ctypes
from minipeft.measure.memory import resident_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
full = resident_bytes("RssAnon")
for block in blocks[:-1]:
    libc.free(block)
print(full - resident_bytes("RssAnon"))
"""


@pytest.mark.skipif(not allocator_environment(), reason="another C library")
def test_with_the_setting_a_freed_block_goes_back_at_once():
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    given_back = [
        int(subprocess.run([sys.executable, "-c", FREED], env=clean | setting, text=True,
                           capture_output=True, check=True).stdout)
        for setting in ({}, allocator_environment())
    ]  # fmt: skip
    assert given_back[0] < 5e6 < 95e6 < given_back[1], "of 100 MB"
