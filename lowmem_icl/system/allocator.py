"""When memory is given back.

The C library is made to keep freed memory for the next tensor instead of giving it back at once.

A layer's intermediate tensors are tens to hundreds of megabytes, which glibc maps anew from the kernel for
every allocation: the page faults cost more than the arithmetic on them (a ReLU on [1024, 36864] took 147 ms,
with kept memory 9 ms). Other C libraries are left alone.
"""

import ctypes
import functools
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_KEPT_BYTES = 1 << 30


@functools.cache
def keep_freed_memory() -> None:
    """Let this process reuse up to a gigabyte of freed memory without asking the kernel."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@contextmanager
def without_collection() -> Iterator[None]:
    """Look for no garbage meanwhile: for work that makes hundreds of thousands of objects which all stay, so
    that looking through them again and again is a fifth of its time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
