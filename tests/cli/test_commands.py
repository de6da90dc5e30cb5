"""Every command against a daemon on real sockets: what it asks and what it prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.cli import status
from edge_runtime.errors import ConflictError

from .conftest import Asked, Done, FakeDaemon, classifier

Edge = Callable[..., Done]

MODELS = {
    "models": [
        {
            "name": "fashion",
            "state": "ready",
            "active": {
                "version": 2,
                "label": "1.4.2",
                "generation": 5,
                "variant": "int8",
                "backend": "onnxruntime",
                "precision": "int8",
            },
            "previous": {"version": 1, "generation": 4},
            "installed": [1, 2],
            "reason": "activated",
            "device": "CPU",
        },
        {
            "name": "broken",
            "state": "failed",
            "active": None,
            "previous": None,
            "installed": [7],
            "reason": "golden 0 differs by 0.3",
        },
    ]
}
PS = {
    "daemon": {"pid": 10, "rss_bytes": 25 << 20, "uptime_s": 300},
    "templates": [
        {
            "backend": "onnxruntime",
            "pid": 11,
            "version": "1.32",
            "state": "up",
            "rss_bytes": 1 << 26,
        }
    ],
    "workers": [
        {
            "pid": 12,
            "model": "fashion",
            "version": 2,
            "variant": "int8",
            "backend": "onnxruntime",
            "state": "ready",
            "rss_bytes": 50 << 20,
            "private_bytes": 4 << 20,
            "connections": 1,
            "requests": 1000,
            "errors": 0,
            "restarts": 1,
            "uptime_s": 4.2,
        }
    ],
}


# --- change -------------------------------------------------------------------------------------


def test_install_passes_the_file_and_says_how_to_activate_it(
    edge: Edge, daemon: FakeDaemon, tmp_path: Path
) -> None:
    bundle = tmp_path / "m.bundle"
    bundle.write_bytes(b"the bytes")
    daemon.replies["install"] = {
        "name": "m",
        "version": 2,
        "generation": 3,
        "new": True,
        "activated": False,
        "size_bytes": 1536,
    }
    done = edge("install", bundle)
    assert daemon.asked == [
        Asked("install", {"activate": False, "filename": "m.bundle"}, [b"the bytes"])
    ]
    assert done.out == ("installed m@2 (1.5 KiB)\nto serve it: edge-runtime activate m@2\n")


def test_install_of_a_directory_passes_the_packed_bundle(
    edge: Edge, daemon: FakeDaemon, tmp_path: Path
) -> None:
    from edge_runtime.bundle import archive

    directory = make_bundle(tmp_path / "tiny")
    daemon.replies["install"] = {"name": "tiny", "version": 1, "new": False, "activated": True}
    done = edge("install", directory, "--activate")
    assert done.code == 0, done.err
    assert "already installed: tiny@1" in done.out and "tiny@1 is active" in done.out
    (asked,) = daemon.asked
    assert asked.arguments == {"activate": True, "filename": "tiny"}
    packed = tmp_path / "again.bundle"
    packed.write_bytes(asked.files[0])
    with archive.open_bundle(packed) as bundle:
        assert bundle.manifest.name == "tiny"


def make_bundle(directory: Path) -> Path:
    """A bundle directory with one small artifact; nobody loads it here."""
    import hashlib

    artifact = b"weights"
    sha256 = hashlib.sha256(artifact).hexdigest()
    (directory / "blobs").mkdir(parents=True)
    (directory / "blobs" / sha256).write_bytes(artifact)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    manifest = {
        "schema": 1,
        "name": "tiny",
        "version": 1,
        "inputs": [tensor],
        "outputs": [tensor],
        "variants": [
            {
                "name": "fp32",
                "backend": "reference",
                "artifact": {"sha256": sha256, "size": len(artifact)},
            }
        ],
    }
    (directory / "model.yaml").write_text(json.dumps(manifest))
    return directory


def test_what_is_no_bundle_is_refused_before_the_daemon_is_asked(
    edge: Edge, daemon: FakeDaemon, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert edge("install", tmp_path / "absent.bundle").code == 3
    assert edge("install", fifo).code == 2
    assert edge("install", "/dev/null").code == 2
    assert edge("install", "nul\0byte").code in (2, 3)
    assert edge("install", tmp_path).code in (3, 4)  # a directory without model.yaml
    assert daemon.asked == []


def test_descriptors_do_not_leak(edge: Edge, daemon: FakeDaemon, tmp_path: Path) -> None:
    bundle = tmp_path / "m.bundle"
    bundle.write_bytes(b"x")
    daemon.replies["install"] = ConflictError("same version, other content")
    assert edge("install", bundle).code == 10

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    for _ in range(5):
        assert edge("install", bundle).code == 10
    assert count() <= before + 1


@pytest.mark.parametrize(
    ("words", "asked", "reply", "says"),
    [
        (
            ("activate", "m@2"),
            Asked("activate", {"name": "m", "version": 2}, []),
            {"name": "m", "version": 2, "variant": "int8", "swap_ms": 20.4},
            "m@2 is active (variant int8, switched in 20 ms)",
        ),
        (
            ("rollback", "m"),
            Asked("rollback", {"name": "m"}, []),
            {"name": "m", "version": 1},
            "m@1 is active",
        ),
        (
            ("unload", "m"),
            Asked("unload", {"name": "m"}, []),
            {"freed_bytes": 5 << 20},
            "5.0 MiB of memory came back",
        ),
        (
            ("remove", "m@1"),
            Asked("remove", {"name": "m", "version": 1}, []),
            {"freed_bytes": 1024},
            "removed m@1: 1.0 KiB of disk came back",
        ),
        (
            ("gc",),
            Asked("gc", {}, []),
            {"freed_bytes": 0, "removed": ["m@1"]},
            "removed m@1\n0 B of disk came back",
        ),
    ],
)
def test_a_change_asks_for_itself_and_says_what_happened(
    edge: Edge,
    daemon: FakeDaemon,
    words: tuple[str, ...],
    asked: Asked,
    reply: dict[str, object],
    says: str,
) -> None:
    daemon.replies[words[0]] = reply
    done = edge(*words)
    assert (done.code, daemon.asked) == (0, [asked])
    assert says in done.out
    assert json.loads(edge(*words, "--json").out) == reply


# --- status -------------------------------------------------------------------------------------


def test_models_is_a_table_and_says_why_one_does_not_serve(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["models"] = MODELS
    lines = edge("models").out.split("\n")
    assert lines[0].split() == [h.lstrip(">") for h in status._MODELS]
    assert lines[1].split() == [
        "fashion",
        "ready",
        "2",
        "1.4.2",
        "int8",
        "onnxruntime",
        "CPU",
        "1",
        "2",
    ]
    assert lines[3] == "broken is failed: golden 0 differs by 0.3"
    assert json.loads(edge("models", "--json").out) == MODELS


def test_a_device_without_models_is_told_what_to_do(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["models"] = {"models": []}
    assert "edge-runtime install BUNDLE" in edge("models").out


def test_the_models_table_fits_a_narrow_terminal() -> None:
    lines = status.models_text(MODELS, 80).split("\n")
    assert max(len(line) for line in lines[:3]) <= 80


def test_ps_shows_daemon_templates_and_workers(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["ps"] = PS
    out = edge("ps").out
    assert out.startswith("daemon: pid 10, 25.0 MiB, up 5 min\n")
    assert "onnxruntime   11  1.32" in out
    worker = out.strip().split("\n")[-1].split()
    assert worker[:6] == ["fashion", "2", "int8", "onnxruntime", "ready", "12"]
    assert worker[-6:] == ["1", "1000", "0", "1", "4", "s"]
    assert json.loads(edge("ps", "--json").out) == PS
    daemon.replies["ps"] = {"daemon": {}, "templates": [], "workers": []}
    assert "no worker is running" in edge("ps").out


def test_why_tells_the_story_newest_last() -> None:
    reply = {
        "name": "m",
        "state": "ready",
        "summary": "version 2 serves",
        "history": [
            {"wall_s": 1000.0, "event": "installed", "message": "installed version 2"},
            {"wall_s": 1180.0, "event": "ready", "message": "ready\x1b[2J after 20 ms"},
        ],
    }
    lines = status.why_text(reply, now_s=1181.5).split("\n")
    assert lines[0] == "m is ready: version 2 serves"
    assert lines[2].endswith("3 min ago  installed version 2")
    assert lines[3].endswith("  2 s ago  ready\\x1b[2J after 20 ms")


def test_why_of_a_model_without_history(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["why"] = {"name": "m", "state": "stopped", "summary": "", "history": []}
    done = edge("why", "m")
    assert daemon.asked == [Asked("why", {"name": "m"}, [])]
    assert "m is stopped\n" in done.out and "nothing has happened" in done.out


def test_ready_is_an_exit_code(edge: Edge, daemon: FakeDaemon) -> None:
    model = classifier([1, 1, 2, 2])
    daemon.models = {"up": model, "down": model._replace(ready=False)}
    assert edge("ready", "up").code == 0
    assert json.loads(edge("ready", "up", "--json").out) == {"name": "up", "ready": True}
    refused = edge("ready", "down")
    assert refused.code == 6 and "why down" in refused.err
    assert edge("ready", "absent").code == 3


def test_ready_wait_asks_until_it_is_or_the_time_is_over(edge: Edge, daemon: FakeDaemon) -> None:
    model = classifier([1, 1, 2, 2])
    answers = iter([False, False, True])

    class Waking(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> object:
            return model._replace(ready=next(answers, True))

    daemon.models = Waking(up=model)
    assert edge("ready", "up", "--wait", "--timeout", 20).code == 0
    daemon.models = {"up": model._replace(ready=False)}
    assert edge("ready", "up", "--wait", "--timeout", 0.2).code == 6


def test_ready_of_a_daemon_that_says_nothing_is_over_after_the_timeout(
    edge: Edge, run_dir: Path
) -> None:
    from edge_runtime.wire import sockets

    with sockets.listen_unix(run_dir / "infer.sock"):  # nobody accepts
        done = edge("--run-dir", run_dir, "ready", "m", "--timeout", 0.1)
    assert done.code == 7


# --- config -------------------------------------------------------------------------------------


def test_config_show_of_a_file_marks_what_is_not_the_default(edge: Edge, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("limits: {region_bytes_max: 64 MiB}\nmodels: {m: {nice: 3}}")
    out = edge("config", "show", "--config", path).out
    changed = [line.split()[:4] for line in out.split("\n") if line.startswith("*")]
    assert changed == [
        ["*", "limits.region_bytes_max", "64.0", "MiB"],
        ["*", "models.m.nice", "3", "0"],
    ]
    options = json.loads(edge("config", "show", "--config", path, "--json").out)["options"]
    assert {"path", "value", "default", "unit", "reason", "from"} == set(options[0])


def test_config_show_asks_the_running_daemon(edge: Edge, daemon: FakeDaemon) -> None:
    import msgspec

    from edge_runtime import config

    running = config.parse({"models": {"m": {"nice": 3, "access": {"users": [1]}}}}, "test")
    daemon.replies["config"] = {"config": msgspec.to_builtins(running)}
    out = edge("config", "show").out
    assert out.startswith("configuration: the running daemon\n")
    changed = [line.split()[:2] for line in out.split("\n") if line.startswith("*")]
    assert changed == [["*", "models.m.nice"], ["*", "models.m.access"]]
    daemon.replies["config"] = {"config": msgspec.to_builtins(config.Config())}
    defaults = edge("config", "show", "--defaults").out
    assert edge("config", "show").out == defaults.replace("defaults", "the running daemon")


def test_config_check_says_what_a_file_changes_or_what_is_wrong(edge: Edge, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: {nice: 3}")
    done = edge("config", "check", path)
    assert (done.code, "workers.nice = 3" in done.out) == (0, True)
    path.write_text("workers: {niec: 3}")
    wrong = edge("config", "check", path)
    assert wrong.code == 2
    assert "did you mean 'nice'?" in wrong.err and f"{path}: workers.niec" in wrong.err
    assert edge("config", "check", tmp_path / "absent").code == 3


def test_serve_refuses_a_wrong_configuration_before_anything_starts(
    edge: Edge, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: {nice: 99}")
    done = edge(
        "serve", "--state-dir", tmp_path / "s", "--run-dir", tmp_path / "r", "--config", path
    )
    assert done.code == 2 and "workers.nice" in done.err
    assert not (tmp_path / "s").exists()


def test_serve_hands_directories_and_configuration_to_the_daemon(
    edge: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime import daemon as real
    from edge_runtime.config import Stated

    seen: list[tuple[object, ...]] = []

    def serve(*given: object) -> int:
        seen.append(given)
        return 0

    monkeypatch.setattr(real, "serve", serve, raising=False)
    assert edge("--run-dir", tmp_path / "r", "serve", "--state-dir", tmp_path / "s").code == 0
    assert seen == [(tmp_path / "s", tmp_path / "r", Stated(None, "defaults"))]
