"""The client examples run as their docstrings say, and the client in docs/protocol.md runs too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.errors import BY_CODE
from edge_runtime.wire import frames, messages, regions

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("name", "says"), [("client_sync.py", "100 answers"), ("client_async.py", "20 answers")]
)
def test_the_example_runs(endpoint, name, says):
    command = [sys.executable, str(EXAMPLES / name), endpoint, "affine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_the_client_of_the_protocol_document_runs(endpoint, tmp_path):
    text = (ROOT / "docs" / "protocol.md").read_text()
    (tmp_path / "whole.py").write_text(text.split("```python\n")[1].split("```")[0])
    command = [sys.executable, "-I", "-S", str(tmp_path / "whole.py"), endpoint, "affine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("y (1.0, 3.0, 5.0,")


def test_the_document_has_the_limits_and_codes_of_the_code():
    text = (ROOT / "docs" / "protocol.md").read_text()
    assert f"at most {frames.HEADER_SIZE_MAX}" in text
    assert f"default {frames.BODY_SIZE_MAX >> 20} MiB" in text
    assert f"| {messages.REGIONS_MAX} | the protocol |" in text
    assert f"| {regions.REGION_SIZE_MAX >> 20} MiB | server's configuration |" in text
    assert f"| {messages.TENSORS_MAX} each | the protocol |" in text
    for code in BY_CODE:
        assert f"`{code}`" in text, code
    for kind in frames.Kind:
        assert f"| 0x{kind:02X} | {kind.name} |" in text
