"""How this process takes memory from the system."""

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_KEPT_BLOCK = 32 * 2**20  # the largest that all versions of glibc accept
_KEPT_TOTAL = 512 * 2**20


def keep_freed_memory(device: torch.device) -> bool:
    """Let a network that runs on the CPU find the memory of its last step again, and say whether that was possible.

    As it is, glibc soon hands freed blocks back, and the system clears the pages of every step anew: a fifth of the
    time of MobileNetV2's training steps on four images of 320 pixels. PyTorch's guide to CPUs advises another allocator
    for that reason; here glibc's is asked to keep half a gigabyte, and of blocks those of up to 32 MB: with larger ones
    VGG16 gains 8%, and takes a quarter more memory. On a GPU, and with other C libraries, nothing changes.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_TOTAL))
