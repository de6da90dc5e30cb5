"""The reference backend, whose template dies at import the first time (a file remembers)."""

import os
import signal
from pathlib import Path

from edge_runtime.backends.reference import Reference

_flag = Path(os.environ["EDGE_TEST_DIES_ONCE"])
if not _flag.exists():
    _flag.touch()
    signal.raise_signal(signal.SIGSEGV)


class Backend(Reference):
    name = "dies-once"
