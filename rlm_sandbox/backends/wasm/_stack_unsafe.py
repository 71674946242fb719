"""How large the stack of the running thread is. `threading.stack_size` is the whole process's, so asking for one proves nothing."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

__all__ = ("stack_bytes",)

#: ``pthread_attr_t`` has 56 bytes on x86-64 and 64 on aarch64; no C library needs as many as these.
_ATTRIBUTES_BYTES: Final = 512


def stack_bytes() -> int | None:
    """The size of this thread's stack, None where there is no way to ask."""
    try:
        if sys.platform == "win32":
            low, high = ctypes.c_size_t(), ctypes.c_size_t()
            ctypes.windll.kernel32.GetCurrentThreadStackLimits(ctypes.byref(low), ctypes.byref(high))
            return high.value - low.value
        library = ctypes.CDLL(None)
        library.pthread_self.restype = ctypes.c_void_p
        thread = ctypes.c_void_p(library.pthread_self())
        if sys.platform == "darwin":
            library.pthread_get_stacksize_np.restype = ctypes.c_size_t
            return int(library.pthread_get_stacksize_np(thread))
        attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
        if library.pthread_getattr_np(thread, attributes):
            return None
        size = ctypes.c_size_t()
        try:
            failed = library.pthread_attr_getstacksize(attributes, ctypes.byref(size))
        finally:
            library.pthread_attr_destroy(attributes)
        return None if failed else size.value
    except (AttributeError, OSError):
        return None
