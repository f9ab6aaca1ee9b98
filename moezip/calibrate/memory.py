"""Keeps the process's memory where the ceiling puts it: libraries hold on to memory unless told not to."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# Compiled kernels that the matrix library keeps, about 0.7 MB each (measured, bf16); its default is 1024.
KERNELS = "64"
# torch keeps prepared products of its own beside those, 1024 in each thread, by shape; experts see a new number of
# tokens in every layer, so that without a limit the process grew by 6 MB a layer (measured: 16 layers of 64 experts).
PRODUCTS = "16"
# Blocks from this size on are mapped and given back one by one. Left alone, glibc raises its own limit to 32 MiB as
# blocks are freed, and the heaps of several threads then keep what they once held: 100 MB on the reference model.
MAPPED_FROM = 4 * 2**20
# With a limit of ours for mapped blocks, glibc keeps no more than 128 KiB free at the end of a heap: temporaries of a
# few MiB then come from the system and go back to it again and again. 8 MiB for each thread's heap is little, and
# spares most of that (measured, 4-bit GPTQ of 4 layers: 780,000 page faults before, 280,000 after).
KEPT_FREE = 2 * MAPPED_FROM
# Heaps that threads share. With one for each, what a thread has freed is of no use to the others: GPTQ of 4, 16 and 48
# layers on two threads peaked at 612, 616 and 646 MiB, and at 580, 598 and 613 with two heaps (measured; no slower).
# Many threads would wait for so few, so there is one for every four.
HEAPS = max(2, (os.cpu_count() or 1) // 4)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


@cache
def steady() -> None:
    """Sets the limits, once per process. All of them take hold if that is before a second thread wants memory."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", PRODUCTS)
    if sys.platform == "linux":
        # musl and others have no such knob, and no such habit
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
            mallopt(_M_TRIM_THRESHOLD, KEPT_FREE)
            if "MALLOC_ARENA_MAX" not in os.environ:
                mallopt(_M_ARENA_MAX, HEAPS)


def give_back() -> None:
    """Hands what the process has freed back to the system.

    Gradients come in many small blocks from several threads, and what lies between two of them stays resident: 70 MB
    after one layer of 64 experts (measured, 512 tokens, D 1024).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
