"""Backends whose template must not fork: one says so, the other has started a thread at import."""

import threading

from edge_runtime.backends.reference import Reference


class Backend(Reference):
    name = "unforkable"
    fork_safe = False


class Threaded(Reference):
    name = "threaded"

    def version(self):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return super().version()
