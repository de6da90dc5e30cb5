"""A booted systemd to test in: systemd-nspawn over an overlay of this machine's own root.

Everything mounted lives in a mount namespace of the command, so that nothing is left however it
ends; the control groups that a container needs where systemd is not the init are removed by name.
In there:

    /opt/edge-runtime   an environment with this test's interpreter and packages, and this checkout
    /inside             tests/systemd/inside, read-only
    /results            what comes back
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside")
BOOT_TIME_MAX_S = 120  # far beyond the 20 s that it takes; then it is killed
LANDLOCK = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
REMOVE_TRIES = 100  # 50 ms apart

INTERPRETER = Path(sys.base_prefix)
# A directory below /root or /home is out of reach for a hardened service, so it shows up elsewhere.
INTERPRETER_INSIDE = Path("/opt/edge-python")

COMMAND = """#!/opt/edge-runtime/bin/python
import sys
from edge_runtime.cli import main
sys.exit(main())
"""

# Not multi-user.target: what else this machine starts is no concern of ours, and the service itself
# is to be started by the first connection.
TARGET = """[Unit]
Requires=basic.target
Wants=edge-test.service
"""

SERVICE = """[Unit]
After=basic.target
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
Environment=PYTHONUNBUFFERED=1
StandardOutput=file:/results/output
StandardError=file:/results/output
ExecStart=/opt/edge-runtime/bin/python /inside/scenario.py
"""

# Runs in its own mount namespace. $1 work directory, $2 results, the rest: nspawn's arguments.
SCRIPT = """
set -eu
work=$1; shift
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root"
cp -a "$work.files/." "$work/root/"
: >"$work/root/etc/machine-id"
DESTDIR="$work/root" sh "$EDGE_CHECKOUT/packaging/install.sh" units
exec systemd-nspawn --directory="$work/root" "$@"
"""


def missing() -> str:
    """Why no machine can be booted here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root to boot a systemd"
    tools = ("systemd-nspawn", "systemd-sysusers", "systemctl", "unshare")
    gone = [tool for tool in tools if shutil.which(tool) is None]
    if gone:
        return f"{', '.join(gone)} is not installed"
    mounts = subprocess.run(["unshare", "--mount", "true"], capture_output=True, timeout=10)
    return "" if mounts.returncode == 0 else "mounts are not allowed here"


def boot(directory: Path, *, read_only: dict[Path, str]) -> Path:
    """Boot, run inside/scenario.py to its end, shut down.

    Args:
        directory: empty, ours.
        read_only: further files of the host and where they appear inside.

    Returns:
        The directory with what the scenario left in /results; `output` has what it printed.
    """
    files, work, results = (directory / name for name in ("root.files", "root", "results"))
    for each in (files, work, results):
        each.mkdir(parents=True)
    binds = {
        Path(sysconfig.get_path("purelib")): "/opt/edge-site",
        CHECKOUT / "edge_runtime": "/opt/edge-source/edge_runtime",
        CHECKOUT / "device_profiles": "/opt/edge-source/device_profiles",
        INSIDE: "/inside",
        **read_only,
    }
    python = _interpreter(binds)
    _write_files(files, python)
    name = f"edge-test-{os.getpid()}"
    arguments = [
        *("--quiet", "--register=no", "--private-network", "--link-journal=no", "--console=pipe"),
        *(f"--machine={name}", f"--bind={results}:/results"),
        *(f"--bind-ro={source}:{target}" for source, target in binds.items()),
        # nspawn's own filter refuses these to every process inside, whatever the unit allows.
        f"--system-call-filter={LANDLOCK}",
        *("--boot", "systemd.unit=edge-test.target"),
    ]
    groups = _control_groups(name)
    if groups:
        arguments.insert(0, "--keep-unit")
    # The process namespace ends with `unshare`; killing nspawn alone leaves the machine running.
    command = [
        *("unshare", "--mount", "--propagation=private"),
        *("--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
        *("sh", "-c", SCRIPT, "sh", str(work)),
    ]
    try:
        done = subprocess.run(
            ["timeout", "-s", "KILL", str(BOOT_TIME_MAX_S), *command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"EDGE_CHECKOUT": str(CHECKOUT)},
            preexec_fn=lambda: _enter(groups),
            text=True,
            timeout=BOOT_TIME_MAX_S + 10,
        )
    finally:
        _remove(groups)
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{name}", ignore_errors=True)
    (results / "nspawn").write_text(f"exit {done.returncode}\n{done.stdout}")
    return results


def _interpreter(binds: dict[Path, str]) -> Path:
    """Where the interpreter is inside; bound there unless every user can reach it anyway."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if INTERPRETER.is_relative_to("/usr"):
        return INTERPRETER / "bin" / version
    binds[INTERPRETER] = str(INTERPRETER_INSIDE)
    return INTERPRETER_INSIDE / "bin" / version


def _write_files(root: Path, python: Path) -> None:
    """/opt/edge-runtime as `python -m venv` would make it, and the test's units."""
    prefix, units = root / "opt/edge-runtime", root / "etc/systemd/system"
    packages = prefix / "lib" / python.name / "site-packages"
    for each in (prefix / "bin", packages, units):
        each.mkdir(parents=True)
    (prefix / "pyvenv.cfg").write_text(f"home = {python.parent}\n")
    (prefix / "bin/python").symlink_to(python)
    (packages / "edge.pth").write_text("/opt/edge-source\n/opt/edge-site\n")
    (prefix / "bin/edge-runtime").write_text(COMMAND)
    (prefix / "bin/edge-runtime").chmod(0o755)
    (units / "edge-test.target").write_text(TARGET)
    (units / "edge-test.service").write_text(SERVICE)


def _control_groups(name: str) -> list[Path]:
    """Control groups for the container; where systemd is the init it makes them itself."""
    if Path("/run/systemd/system").is_dir():  # sd_booted(3)
        return []
    top = Path("/sys/fs/cgroup")
    hierarchies = (
        [top] if (top / "cgroup.controllers").exists() else [top / "systemd", top / "unified"]
    )
    groups = [each / name for each in hierarchies if (each / "cgroup.procs").exists()]
    for group in groups:
        group.mkdir()
    return groups


def _enter(groups: list[Path]) -> None:
    for group in groups:
        (group / "cgroup.procs").write_text("0")


def _remove(groups: list[Path]) -> None:
    """The groups and what the container made below them, deepest first.

    The kernel empties a group a moment after the last process in it has been waited for.
    """
    for group in groups:
        for directory, _, _ in os.walk(group, topdown=False):
            for left in reversed(range(REMOVE_TRIES)):
                try:
                    Path(directory).rmdir()
                    break
                except OSError:
                    if not left:
                        raise
                    time.sleep(0.05)
