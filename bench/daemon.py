"""The daemon under measurement: started, asked and stopped as a user would.

Law of this file: the only place that starts the daemon, and it always ends what it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.scenario import BenchError
from edge_runtime.client.control import ControlClient
from edge_runtime.errors import EdgeError, UnavailableError

START_TIMEOUT_S = 20.0  # a start takes half a second; a loaded machine takes several
STOP_TIMEOUT_S = 10.0
POLL_S = 0.001  # finer than any start that is measured, and cheap


class Daemon:
    """`edge-runtime serve` with its directories under `directory`.

    Args:
        core: where the daemon and its templates run; None: anywhere. (A unit file would say
            CPUAffinity=.) Workers are where their `cpuset` says.
    """

    def __init__(self, directory: Path, config: str = "", core: int | None = None) -> None:
        self.state_dir, self.run_dir = directory / "state", directory / "run"
        self.infer_socket = self.run_dir / "infer.sock"
        self._affinity = [] if core is None else ["taskset", "-c", str(core)]
        self._config = directory / "config.yaml"
        self._log = directory / "daemon.log"
        directory.mkdir(parents=True, exist_ok=True)
        self._config.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Daemon:
        self.start()
        self.wait_until_listening()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and do not wait."""
        command = [*self._affinity, sys.executable, "-m", "edge_runtime", "serve"]
        command += ["--state-dir", str(self.state_dir), "--run-dir", str(self.run_dir)]
        command += ["--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_until_listening(self) -> None:
        """Until the control socket answers.

        Raises:
            BenchError: it ended, or does not answer in time.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            self.check_alive()
            try:
                self.call("ps")
                return
            except UnavailableError:
                time.sleep(POLL_S)
        raise BenchError(f"the daemon does not answer: {self._log_end()}")

    def check_alive(self) -> None:
        """Raises: BenchError: it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise BenchError(f"the daemon ended: {self._log_end()}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes too long."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def call(self, command: str, fds: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """A control command and its answer. Raises EdgeError."""
        with ControlClient(self.run_dir / "control.sock", timeout_s=60.0) as control:
            return control.call(command, arguments, fds=fds)

    def install(self, bundle: Path, *, activate: bool = True) -> None:
        """Raises: BenchError: the bundle is refused or does not serve."""
        fd = os.open(bundle, os.O_RDONLY)
        try:
            self.call("install", fds=[fd], activate=activate)
        except EdgeError as e:
            raise BenchError(f"install of {bundle.name}: {e}\n{self._log_end()}") from e
        finally:
            os.close(fd)

    def _log_end(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]
