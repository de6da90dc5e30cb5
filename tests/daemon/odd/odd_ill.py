"""A wheel that was built for another processor: the import itself is the illegal instruction."""

import signal

signal.raise_signal(signal.SIGILL)
