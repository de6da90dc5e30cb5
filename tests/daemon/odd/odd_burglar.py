"""A model that tries to get out. Each attempt's errno is one number of the output (0: it worked).

Options: `files` to read, `write` a directory to write to, `pid` of the daemon, `leave` what is not
to be tried.
"""

import ctypes
import os
import socket
import subprocess
import threading
import types
from pathlib import Path

import numpy as np

from edge_runtime.backends.protocol import Placement
from edge_runtime.tensors import TensorSpec

WIDTH = 32


def attempts(options):
    """(name, function) of everything that is tried, in the order of the output."""
    den = Path(options["write"])
    tried = [
        *((f"read {path}", Path(path).read_bytes) for path in options["files"]),
        ("list the root", lambda: list(Path("/root").iterdir())),
        ("write a file", lambda: (den / "loot").touch()),
        ("make a directory", lambda: (den / "den").mkdir()),
        ("unlink", lambda: (den / "keep").unlink()),
        ("tcp socket", lambda: socket.socket(socket.AF_INET).close()),
        ("unix socket", lambda: socket.socket(socket.AF_UNIX).close()),
        ("execute", lambda: subprocess.run(["/bin/true"], check=True)),
        ("kill the daemon", lambda: os.kill(options["pid"], 0)),
        ("kill a thread of the daemon", lambda: _call(234, options["pid"], options["pid"], 0)),
        ("queue a signal", lambda: _call(129, options["pid"], 0, None)),
        ("pin the daemon to a core", lambda: os.sched_setaffinity(options["pid"], {0})),
        ("in another thread", lambda: _in_thread(lambda: socket.socket(socket.AF_INET).close())),
        ("trace the daemon", lambda: _call(101, 16, options["pid"], None, None)),  # PTRACE_ATTACH
        ("read the daemon's memory", lambda: _memory(options["pid"])),
    ]
    return [one for one in tried if one[0] not in options.get("leave", ())]


def _memory(pid):
    with Path(f"/proc/{pid}/mem").open("rb"):
        pass


def _call(number, *arguments):
    """A bare system call (x86_64 numbers)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "syscall")


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
    inputs = (TensorSpec("x", "FP32", (-1, WIDTH)),)
    outputs = (TensorSpec("y", "FP32", (-1, WIDTH)),)
    concurrent = True
    keeps_state = False
    facts = types.MappingProxyType({})
    placement = (Placement("CPU"),)

    def __init__(self, options):
        self._options = options

    def run(self, inputs):
        codes = np.full((len(inputs["x"]), WIDTH), -1, np.float32)
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
