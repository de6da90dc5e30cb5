"""The unit files by themselves: no warning, hardened, and what their comments promise holds."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
SERVICE = PACKAGING / "edge-runtime.service"
SOCKETS = [PACKAGING / f"edge-runtime-{name}.socket" for name in ("infer", "control")]
EXPOSURE_MAX = 1.5  # of 10; a bare service has 9.6

analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"LC_ALL": "C"})


def settings(unit: Path) -> dict[str, dict[str, list[str]]]:
    """Section -> key -> every value, in order; as systemd reads it, keys may repeat."""
    found: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and line[0] not in "#;":
            key, _, value = line.partition("=")
            section.setdefault(key, []).append(value)
    return found


@analyze
def test_verify_prints_nothing(tmp_path: Path) -> None:
    # `verify` exits 0 on unknown keys, so silence is what counts. It wants the program to exist.
    for unit in [SERVICE, *SOCKETS]:
        text = unit.read_text().replace(
            "/opt/edge-runtime/bin/edge-runtime serve", "/bin/true serve"
        )
        (tmp_path / unit.name).write_text(text)
    done = run("systemd-analyze", "verify", "--man=no", *sorted(tmp_path.iterdir()))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@analyze
def test_verify_would_notice_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "a.service").write_text("[Service]\nExecStart=/bin/true\nProtectHoem=yes\n")
    done = run("systemd-analyze", "verify", "--man=no", tmp_path / "a.service")
    assert "ProtectHoem" in done.stdout + done.stderr


@analyze
def test_the_service_is_hardened() -> None:
    gate = ["--offline=true", f"--threshold={round(EXPOSURE_MAX * 10)}", "--no-pager"]
    done = run("systemd-analyze", "security", *gate, SERVICE)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@analyze
def test_what_hardening_leaves_open_is_what_the_comments_name() -> None:
    done = run("systemd-analyze", "security", "--offline=true", "--json=short", SERVICE)
    exposed = {row["json_field"] for row in json.loads(done.stdout) if not row["set"]}
    assert exposed == {
        "PrivateUsers",
        "ProcSubset",
        "SystemCallFilter_resources",
        "RestrictAddressFamilies_AF_UNIX",
        "DeviceAllow",  # ProtectClock=yes brings the clock devices back, for reading
        "RootDirectoryOrRootImage",
    }


def test_the_watchdog_kills_before_systemd_gives_up_stopping() -> None:
    service = settings(SERVICE)["Service"]
    assert service["Type"] == ["notify"] and service["Restart"] == ["always"]
    assert int(service["TimeoutAbortSec"][0]) < int(service["TimeoutStopSec"][0])
    assert settings(SERVICE)["Unit"]["StartLimitIntervalSec"] == ["0"]


@pytest.mark.parametrize("unit", SOCKETS, ids=lambda unit: str(unit.name))
def test_each_socket_starts_the_service_and_has_its_name(unit: Path) -> None:
    socket = settings(unit)["Socket"]
    name = socket["FileDescriptorName"][0]
    assert unit.name == f"edge-runtime-{name}.socket"
    assert socket["Service"] == [SERVICE.name]
    assert socket["ListenStream"] == [f"%t/edge-runtime/{name}.sock"]
    assert unit.name in settings(SERVICE)["Unit"]["Requires"][0].split()


def test_the_dynamic_user_is_not_named_like_the_group() -> None:
    # systemd refuses a dynamic user when a group of that name exists (EILSEQ at start).
    group = settings(SOCKETS[0])["Socket"]["SocketGroup"][0]
    assert settings(SERVICE)["Service"]["User"] != [group]
    assert f"\ng {group} -\n" in (PACKAGING / "edge-runtime.sysusers.conf").read_text()


@pytest.mark.parametrize("script", sorted(PACKAGING.glob("*.sh")), ids=lambda path: str(path.name))
def test_scripts_are_plain_posix_shell(script: Path) -> None:
    assert run("sh", "-n", script).returncode == 0
    assert script.read_text().startswith("#!/bin/sh\n")


def test_install_and_purge_leave_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("systemd-sysusers is not installed")
    script = PACKAGING / "install.sh"

    def files() -> set[str]:
        return {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir()}

    def act(command: str) -> set[str]:
        done = subprocess.run(
            ["sh", script, command],
            capture_output=True,
            text=True,
            timeout=60,
            env={"DESTDIR": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        return files()

    (tmp_path / "etc").mkdir()
    act("uninstall")
    first = act("units")
    assert first == act("units")
    assert "etc/systemd/system/sockets.target.wants/edge-runtime-infer.socket" in first
    assert "etc/systemd/system/multi-user.target.wants/edge-runtime.service" in first
    (tmp_path / "etc/edge-runtime/config.yaml").write_text("{}")
    assert "etc/edge-runtime/config.yaml" in act("uninstall")
    left = act("purge")
    assert left == act("purge")
    assert not [name for name in left if "edge" in name], left
