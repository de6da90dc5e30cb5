"""The promises of the repository itself: bare imports, floors, documents, the public contract."""

from __future__ import annotations

import configparser
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("numpy", "onnxruntime", "PIL", "openvino", "ai_edge_litert", "tflite_runtime")


def _packages() -> list[str]:
    names = []
    for top in ("edge_runtime", "quantize", "device_profiles", "ota"):
        names.append(top)
        names += [
            found.name
            for found in pkgutil.walk_packages([str(ROOT / top)], top + ".")
            if found.ispkg
        ]
    return names


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_bare_install_imports_every_package() -> None:
    block = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    done = _python(block + "".join(f"import {name}\n" for name in _packages()))
    assert done.returncode == 0, done.stderr


def test_the_daemon_imports_no_numpy_and_no_backend() -> None:
    done = _python(
        "import sys, edge_runtime.daemon.supervisor, edge_runtime.cli.serve\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_daemon_imports_no_library_of_cryptography() -> None:
    """`ssl` and `hashlib` map libcrypto: 4 MiB of a daemon that speaks no TLS and is idle."""
    heavy = ("ssl", "_ssl", "hashlib", "_hashlib", "secrets", "hmac")
    done = _python(
        "import sys, edge_runtime.cli.serve, edge_runtime.daemon.supervisor\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "import asyncio, hashlib, ssl\n"  # whoever wants them gets them
        "print(ssl.create_default_context() is not None)"
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"], done.stdout + done.stderr


def test_every_module_states_its_law_first() -> None:
    silent = []
    for path in (ROOT / "edge_runtime").rglob("*.py"):
        text = path.read_text()
        if not text.startswith('"""') or len(text.split('"""')[1]) < 20:
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_the_extras_of_the_public_contract_exist() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    promised = {"onnxruntime", "openvino", "litert", "gateway", "grpc", "link", "ota", "fleet"}
    promised |= {"quantize", "all", "dev"}
    assert promised <= set(config["options.extras_require"])


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/**/*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []


@pytest.mark.parametrize("folder", ["edge_runtime/daemon", "edge_runtime/serving", "quantize"])
def test_the_architecture_page_names_every_module_and_no_other(folder: str) -> None:
    table = (ROOT / "docs/architecture.md").read_text().split(f"| in `{Path(folder).name}` |")[1]
    named = set(re.findall(r"`(\w+)`", table.split("\n\n")[0]))
    found = [path for path in (ROOT / folder).iterdir() if not path.name.startswith("__")]
    assert named == {path.stem for path in found}


def test_each_choice_of_torch_is_installed_where_another_one_is_already(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    ours = ("MAKEFLAGS", "MAKELEVEL", "TORCH")  # of the make that runs this test
    environ = {name: value for name, value in os.environ.items() if name not in ours}

    def recipe(*settings: str) -> str:
        command = ["make", "-n", "-C", str(ROOT), f"QUANTIZE={tmp_path}", *settings]
        return subprocess.run(
            [*command, "test-quantize"], capture_output=True, text=True, check=True, env=environ
        ).stdout

    (stamp,) = re.findall(r"touch (\S+)", recipe())
    Path(stamp).touch()
    assert "pip install" not in recipe()
    assert "quantize-torch]" in recipe("TORCH=1")
    assert "quantize-torch-litert]" in recipe("TORCH=litert")


def test_the_readme_begins_with_what_it_is_and_the_two_commands() -> None:
    screen = (ROOT / "README.md").read_text().splitlines()[:14]
    assert any(line.startswith("make demo") for line in screen)
    assert any(line.startswith("make test") for line in screen)


def test_committed_code_names_no_absolute_home_of_ours() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    here = str(ROOT.parent) + "/"
    if here in ("/", "/tmp/", "/home/"):
        pytest.skip(f"{here} is a common place")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".onnx", ".png", ".bin") or not path.is_file():
            continue
        if here in path.read_text(errors="replace"):
            found.append(name)
    assert found == []
