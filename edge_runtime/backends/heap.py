"""What a load freed goes back to the system.

Law of this file: one call to the C library, where it has it (glibc); no backend library.
"""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Have the C library return the memory that it keeps for later.

    Loaders copy weights and free the originals, and glibc keeps those pages: 30 of 62 MB for an
    EfficientNet-Lite0 in fp32 with onnxruntime.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
