"""What glibc does with freed memory of the CPU: kept for the next step, or given back at once."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Let freed tensors be used again by the next step.

    By itself glibc gives every block above 32 MiB back to the system, and smaller ones at the end of the heap too; the
    next step then pays a page fault for every 4 KiB, a fifth of the time of a step on the CPU. The process keeps what
    it needed at its peak. Variables MALLOC_... that the user set are left alone.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """The end of `keep_freed_memory`: give the system what is free now, and what comes free later."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 1 << 16)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 17)
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Let glibc give freed tensors back to the system at once, instead of keeping holes as large as a ZeRO-3 teacher.

    Its threshold for blocks of their own grows with use up to 32 MiB, above the size of most layers; a fixed one
    costs page faults on large temporaries, which a teacher that hardly fits is worth.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 1 << 16)  # this and the next undo `keep_freed_memory`
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 17)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
