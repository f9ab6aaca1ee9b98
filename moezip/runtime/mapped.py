"""Pages of files that are mapped into memory, given back once what they held was taken over in another form.

Loaded tensors may be views of mapped files. What was read of such a file counts as memory of the process for as long as
one of its tensors is in use, be it the smallest, so the system is told which part is not needed. Where a page is looked
at again after all, it is read again. On systems other than Linux nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable

Range = tuple[int, int]  # addresses, from and to

_DONT_NEED = 4  # Linux' MADV_DONTNEED


def file_ranges() -> list[Range]:
    """Where files are mapped, in ascending order."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                start, _, stop = fields[0].partition("-")
                found.append((int(start, 16), int(stop, 16)))
    return found


def give_back(ranges: Iterable[Range]) -> int:
    """Tells the system that memory is not needed as far as it is a mapped file's; the bytes of which it did so.

    Only whole pages: what lies beside stays.
    """
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:  # tensors lie one behind the other in a file
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    if not joined or not sys.platform.startswith("linux"):
        return 0
    files = file_ranges()
    starts = [start for start, _ in files]
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, given = mmap.PAGESIZE, 0
    for start, stop in joined:
        number = bisect_right(starts, start) - 1
        if number < 0 or stop > files[number][1]:
            continue  # memory of the process's own
        start, stop = -(-start // page) * page, stop // page * page
        if start < stop and advise(start, stop - start, _DONT_NEED) == 0:
            given += stop - start
    return given
