"""A model that tries to get out. Each attempt's errno is one number of the output (0: it worked).

Options: `files` to read, `write` a directory to write to, `pid` to kill, `sock` to connect to.
"""

import os
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np

from edge_runtime.backends.protocol import Placement
from edge_runtime.tensors import TensorSpec


def attempts(options):
    """(name, function) of everything that is tried, in the order of the output."""
    found = [
        (f"read {path}", lambda path=path: Path(path).read_bytes()) for path in options["files"]
    ]
    return [
        *found,
        ("list the root", lambda: list(Path("/root").iterdir())),
        ("write a file", lambda: (Path(options["write"]) / "loot").touch()),
        ("make a directory", lambda: (Path(options["write"]) / "den").mkdir()),
        ("unlink", lambda: Path(options["files"][0]).unlink()),
        ("tcp socket", lambda: socket.socket(socket.AF_INET).close()),
        ("unix socket", lambda: socket.socket(socket.AF_UNIX).close()),
        ("execute", lambda: subprocess.run(["/bin/true"], check=True)),
        ("kill the daemon", lambda: os.kill(options["pid"], 0)),
        ("trace the daemon", lambda: _trace(options["pid"])),
        ("read the daemon's memory", lambda: _memory(options["pid"])),
        ("in another thread", lambda: _in_thread(lambda: socket.socket(socket.AF_INET).close())),
    ]


def _memory(pid):
    with Path(f"/proc/{pid}/mem").open("rb"):
        pass


def _trace(pid):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, pid, None, None) != 0:  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")


def _in_thread(work):
    caught = []

    def body():
        try:
            work()
        except OSError as error:
            caught.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


class Model:
    inputs = (TensorSpec("x", "FP32", (-1, 16)),)
    outputs = (TensorSpec("y", "FP32", (-1, 16)),)
    concurrent = True
    placement = (Placement("CPU"),)

    def __init__(self, options):
        self._options = options

    def run(self, inputs):
        codes = np.full((len(inputs["x"]), 16), -1, np.float32)
        for index, (_, attempt) in enumerate(attempts(self._options)):
            try:
                attempt()
                codes[0, index] = 0
            except OSError as error:
                codes[0, index] = error.errno or -2
        return {"y": codes}

    def bind(self, inputs, outputs):
        def run():
            results = self.run(inputs)
            for name, out in outputs.items():
                if out is not None:
                    out[...] = results[name]
            return results

        return run


class Backend:
    name = "burglar"
    fork_safe = True

    def version(self):
        return "1"

    def load(self, artifact, options):
        return Model(dict(options))
