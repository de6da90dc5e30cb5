"""The command line against the real daemon, with a real model in onnxruntime.

The model knows brightness: ten classes, one for each tenth from black to white.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from .conftest import Done, run_process

onnx = pytest.importorskip("onnx", reason="models are made with the onnx package (extra dev)")
pytest.importorskip("onnxruntime", reason="the models run in onnxruntime")

START_TIMEOUT_S = 30.0
CONFIG = "models: {tuned: {nice: 3}}\nlimits: {connections_max: 40}\n"


class World(NamedTuple):
    """A running daemon and bundles for it: `bundles[version]` of the model `light`."""

    run_dir: Path
    state_dir: Path
    process: subprocess.Popen[bytes]
    bundles: dict[int, Path]
    log: Path


def brightness_model(path: Path, sharpness: float) -> Path:
    """score of class k = s * (k/10 * mean - (k/10)^2 / 2): largest where k/10 is the mean."""
    levels = np.arange(10, dtype=np.float32) / 10
    weights = np.repeat(levels[None, :] / 64 * sharpness, 64, axis=0).astype(np.float32)
    biases = (-(levels**2) / 2 * sharpness).astype(np.float32)
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "biases"], ["scores"]),
        ],
        "brightness",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 10])],
        [
            onnx.numpy_helper.from_array(weights, "weights"),
            onnx.numpy_helper.from_array(biases, "biases"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def create(directory: Path, name: str, version: int, sharpness: float) -> Path:
    model = brightness_model(directory / f"{name}-{version}.onnx", sharpness)
    labels = directory / "labels.txt"
    labels.write_text("\n".join(f"level-{i}" for i in range(10)))
    out = directory / f"{name}-{version}.bundle"
    done = run_process(
        *(
            "bundle",
            "create",
            model,
            "--name",
            name,
            "--version",
            version,
            "--label",
            f"1.{version}",
        ),
        *("--labels", labels, "--activation", "softmax", "-o", out),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    base = Path(tempfile.mkdtemp(prefix="edge-"))
    (base / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "edge_runtime", "serve"]
    command += ["--state-dir", str(base / "state"), "--run-dir", str(base / "run")]
    command += ["--config", str(base / "config.yaml")]
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        _wait_for(base / "run" / "control.sock", process, base / "log")
        bundles = {version: create(base, "light", version, 100.0 * version) for version in (1, 2)}
        yield World(base / "run", base / "state", process, bundles, base / "log")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        shutil.rmtree(base)


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the socket answers; a daemon that ended is reported with its log."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        time.sleep(0.02)
    pytest.fail("the daemon did not start: " + log.read_text())


@pytest.fixture
def cli(
    world: World, edge: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """Runs a command against the daemon, which has no model at first."""
    monkeypatch.setenv("EDGE_RUNTIME_RUN_DIR", str(world.run_dir))
    return edge


def ok(done: Done) -> str:
    assert done.code == 0, done.err or done.out
    return done.out


def picture(path: Path, value: int) -> Path:
    Image.new("L", (16, 16), value).save(path)
    return path


def test_the_life_of_a_model(world: World, cli: Callable[..., Done], tmp_path: Path) -> None:
    assert "installed light@1" in ok(cli("install", world.bundles[1], "--activate"))
    assert "light is ready" in ok(cli("ready", "light"))
    bright = picture(tmp_path / "bright.png", 204)
    assert "level-8" in ok(cli("infer", "light", "--image", bright)).split("\n")[1]

    assert "edge-runtime activate light@2" in ok(cli("install", world.bundles[2]))
    assert "light@2 is active" in ok(cli("activate", "light@2"))
    row = ok(cli("models")).split("\n")[1].split()
    assert row[:5] == ["light", "ready", "2", "1.2", "fp32"] and row[-2:] == ["1", "2"]
    sharper = json.loads(ok(cli("infer", "light", "--image", bright, "--json")))
    assert sharper["model_version"] == "2"

    assert "light@1 is active" in ok(cli("rollback", "light"))
    assert "light  " in ok(cli("ps"))
    story = ok(cli("why", "light"))
    assert story.startswith("light is ready")
    assert story.index("light@2 serves") < story.rindex("light@1 serves")

    assert cli("remove", "light@1").code == 10  # it serves
    assert "of memory came back" in ok(cli("unload", "light"))
    assert cli("ready", "light").code == 6
    ok(cli("gc"))


@pytest.fixture
def light(world: World, cli: Callable[..., Done]) -> Callable[..., Done]:
    """The command line of a daemon in which `light` serves."""
    ok(cli("install", world.bundles[1]))
    ok(cli("activate", "light@1"))
    ok(cli("ready", "light", "--wait", "--timeout", 20))
    return cli


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("models",), {"models"}),
        (("ps",), {"daemon", "templates", "workers"}),
        (("why", "light"), {"name", "state", "summary", "history"}),
        (("ready", "light"), {"name", "ready"}),
        (("activate", "light@1"), {"name", "version", "variant"}),
        (("gc",), {"freed_bytes"}),
        (("config", "show"), {"source", "options"}),
        (("infer", "light"), {"name", "inputs", "outputs"}),
        (("unload", "light"), {"freed_bytes"}),
        (("why", "absent"), {"error"}),
        (("remove", "light@9"), {"error"}),
    ],
)
def test_json_is_one_document_with_these_keys(
    light: Callable[..., Done], words: tuple[str, ...], keys: set[str]
) -> None:
    done = light(*words, "--json")
    assert done.err == ""
    document = json.loads(done.out)
    assert keys <= set(document)
    assert (done.code == 0) == ("error" not in document)


def test_arrays_and_json_get_the_same_answer(light: Callable[..., Done], tmp_path: Path) -> None:
    array = np.full((1, 1, 8, 8), 0.3, np.float32)
    np.save(tmp_path / "x.npy", array)
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": array.tolist()}
    (tmp_path / "x.json").write_text(json.dumps({"inputs": [tensor]}))
    by_json = json.loads(ok(light("infer", "light", "--json", tmp_path / "x.json")))
    by_npy = json.loads(ok(light("--json", "infer", "light", "--npy", tmp_path / "x.npy")))
    assert by_json == by_npy
    assert int(np.argmax(by_json["outputs"][0]["data"])) == 3


def test_a_wrong_request_is_the_models_answer_and_not_a_traceback(
    light: Callable[..., Done], tmp_path: Path
) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((1, 1, 9, 9), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((1, 1, 8, 8), np.float64))
    for path in ("wide.npy", "double.npy"):
        done = light("infer", "light", "--npy", tmp_path / path)
        assert done.code == 11, done
    done = light("infer", "light@9", "--npy", tmp_path / "double.npy", "--timeout", 1)
    assert done.code in (3, 6), done


def test_what_must_not_be_installed_is_refused(
    world: World, cli: Callable[..., Done], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.bundle"
    cut.write_bytes(world.bundles[1].read_bytes()[:-600])
    assert cli("install", cut).code == 4
    ok(cli("install", world.bundles[1]))
    assert "already installed" in ok(cli("install", world.bundles[1]))
    other = create(tmp_path, "light", 1, 5.0)
    assert cli("install", other).code == 10  # the same version with other content


def test_a_bundle_directory_is_installed_like_its_file(
    world: World, cli: Callable[..., Done], tmp_path: Path
) -> None:
    ok(cli("bundle", "extract", world.bundles[2], tmp_path / "light"))
    assert "light@2" in ok(cli("install", tmp_path / "light"))


def test_the_daemon_shows_the_configuration_it_was_started_with(cli: Callable[..., Done]) -> None:
    options = json.loads(ok(cli("config", "show", "--json")))["options"]
    changed: dict[str, Any] = {
        option["path"]: option["value"]
        for option in options
        if option["value"] != option["default"]
    }
    assert changed == {"limits.connections_max": 40, "models.tuned.nice": 3}


def test_a_second_daemon_on_the_same_directories_is_refused(world: World) -> None:
    done = run_process("--run-dir", world.run_dir, "serve", "--state-dir", world.state_dir)
    assert done.returncode == 10, done.stderr
    assert "Traceback" not in done.stderr
    assert world.process.poll() is None


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_may_infer_but_not_control(light: Callable[..., Done], world: World) -> None:
    world.run_dir.parent.chmod(0o711)
    run_dir = str(world.run_dir)
    code = (
        "import os\n"
        "from edge_runtime.cli import main\n"
        # once as root, because the other user may not be able to read the modules
        f"main(['--run-dir', {run_dir!r}, 'ready', 'light'])\n"
        "main(['--run-dir', '/nowhere', 'unload', 'light'])\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"print(main(['--run-dir', {run_dir!r}, 'ready', 'light']))\n"
        f"print(main(['--run-dir', {run_dir!r}, 'unload', 'light']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().split("\n")
    assert lines == ["light is ready", "light is ready", "0", "8"], done.stderr
