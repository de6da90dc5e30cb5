"""The drop-in of docs/install.md that opens loopback; the unit is closed without it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "packaging" / "edge-runtime.service"


def drop_in() -> str:
    """The indented block that follows the paragraph about the port."""
    text = (ROOT / "docs" / "install.md").read_text()
    block = text.partition("A port for Prometheus")[2].partition("    [Service]\n")[2]
    lines = block.partition("\n\n")[0].splitlines()
    return "[Service]\n" + "\n".join(line.strip() for line in lines) + "\n"


def test_the_drop_in_opens_what_the_unit_closes_and_no_more() -> None:
    unit = UNIT.read_text().splitlines()
    for closed in ("PrivateNetwork=yes", "RestrictAddressFamilies=AF_UNIX", "IPAddressDeny=any"):
        assert closed in unit
    assert drop_in().splitlines()[1:] == [
        "PrivateNetwork=no",
        "RestrictAddressFamilies=AF_UNIX AF_INET",
        "IPAddressAllow=localhost",
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_systemd_takes_it_without_a_word(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/edge-runtime/bin/edge-runtime serve", "/bin/true serve")
    (tmp_path / UNIT.name).write_text(text)
    for socket in UNIT.parent.glob("*.socket"):
        shutil.copy(socket, tmp_path)
    (tmp_path / f"{UNIT.name}.d").mkdir()
    (tmp_path / f"{UNIT.name}.d" / "metrics.conf").write_text(drop_in())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name],
        env={"LC_ALL": "C", "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
