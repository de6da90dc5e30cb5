"""From load to unload: what is ready when, what is told, what comes back, what survives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import (
    ConflictError,
    DeadlineError,
    EdgeError,
    GoldenError,
    ModelError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind
from tests.daemon.world import (
    WIDTH,
    bundle,
    filled,
    infer_frame,
    large_onnx_bundle,
    onnx_bundle,
    running,
    serve_command,
    until,
)

# --- loading --------------------------------------------------------------------------------------


def test_a_model_loads_warms_up_keeps_its_goldens_and_answers(daemon):
    answer = daemon.add("life", golden_off=0.0)
    assert answer["activated"] and answer["version"] == 1
    assert daemon.infer("life") == 7.0
    ready = daemon.events("worker_ready", model="life")[-1]
    assert "1 goldens" in ready["message"]
    assert daemon.model("life")["state"] == "ready"


def test_an_onnx_model_answers_from_its_worker(daemon):
    daemon.install(onnx_bundle(daemon.bundles, "real"))
    assert daemon.infer("real") == 6.0
    worker = daemon.worker("real")
    assert worker["backend"] == "onnxruntime" and worker["requests"] >= 1
    assert daemon.model("real")["device"] == "CPU"


def test_a_version_that_misses_its_goldens_never_serves_and_the_old_one_goes_on(daemon):
    daemon.add("gold", 1, golden_off=0.0)
    with pytest.raises(GoldenError) as caught:
        daemon.add("gold", 2, scale=5.0, golden_off=0.5)
    assert "golden 0" in caught.value.message and "gold@2" in caught.value.where
    assert daemon.infer("gold") == 7.0
    why = daemon.control("why", name="gold")
    assert why["state"] == "ready" and why["model"]["active"]["version"] == 1
    refused = [one for one in why["history"] if one["event"] == "variant_refused"]
    assert refused and refused[-1]["fields"]["code"] == "golden_mismatch"
    with pytest.raises(NotFoundError):
        daemon.infer("gold", version="2")


def test_a_model_whose_first_version_misses_its_goldens_is_never_ready(daemon):
    with pytest.raises(GoldenError):
        daemon.add("never", golden_off=0.5)
    with daemon.impatient() as client:
        assert client.ready("never") is False
        with pytest.raises((UnavailableError, NotFoundError)):
            client.infer("never", {"x": filled(1)})
    assert daemon.model("never")["active"] is None


def test_the_next_variant_serves_when_the_first_is_not_fit(daemon):
    broken = {"faults": [{"action": "raise", "at": "load"}]}
    answer = daemon.add("variants", variants=[("fast", broken), ("safe", {})], golden_off=0.0)
    assert answer["variant"] == "safe"
    assert daemon.infer("variants") == 7.0
    assert daemon.events("variant_refused", model="variants", variant="fast")


def test_when_no_variant_is_fit_every_reason_is_told(daemon):
    one = {"faults": [{"action": "raise", "at": "load"}]}
    two = {"faults": [{"action": "segv", "at": "load"}]}
    with pytest.raises(ModelError) as caught:
        daemon.add("unfit", variants=[("one", one), ("two", two)])
    assert "one: fault on order" in caught.value.message
    assert "two: " in caught.value.message and "SIGSEGV" in caught.value.message


def test_the_phase_of_a_slow_load_is_told_while_it_lasts(daemon):
    events: list[dict[str, object]] = []
    options = {"load_ms": 300, "run_ms": 100}
    path = bundle(daemon.bundles, "slow-load", options=options, golden_off=0.0)
    thread = threading.Thread(target=lambda: events.append(daemon.install(path)))
    thread.start()
    until(lambda: "slow-load" in [m["name"] for m in daemon.control("models")["models"]])
    phases: list[str] = []
    while not events:
        loading = daemon.control("why", name="slow-load")["model"]["loading"]
        if loading and loading["phase"] not in phases:
            phases.append(loading["phase"])
    assert [one for one in phases if one in ("load", "warmup", "goldens")] == [
        "load",
        "warmup",
        "goldens",
    ]
    assert daemon.model("slow-load")["loading"] is None
    with daemon.client() as client:  # waits, because a retry may help while it loads
        assert client.infer("slow-load", {"x": filled(3)})["y"][0, 0] == 7.0
    thread.join()


# --- which version, which model, which socket -----------------------------------------------------


def test_active_and_warm_versions_can_be_asked_for_and_others_are_not_found(daemon):
    daemon.add("versions", 1, scale=1.0)
    daemon.add("versions", 2, scale=2.0)
    assert daemon.infer("versions", version="1") == 4.0
    assert daemon.infer("versions", version="2") == 7.0
    assert daemon.infer("versions") == 7.0
    with daemon.client() as client:
        for version, want in ("1", 4.0), ("", 7.0), ("2", 7.0), ("1", 4.0):
            result = client.infer_result("versions", {"x": filled(3)}, version=version)
            assert result.outputs["y"][0, 0] == want
            assert result.model_version == ("1" if want == 4.0 else "2")
        for version in ("3", "01", "x", "-1"):
            with pytest.raises(NotFoundError):
                client.infer("versions", {"x": filled(3)}, version=version)
        assert client.infer("versions", {"x": filled(3)})["y"][0, 0] == 7.0


def test_one_connection_serves_several_models_in_turn(daemon):
    daemon.add("turn-a", scale=1.0)
    daemon.add("turn-b", scale=2.0)
    daemon.install(onnx_bundle(daemon.bundles, "turn-c", scale=3.0))
    wants = {"turn-a": 4.0, "turn-b": 7.0, "turn-c": 9.0}
    order = [*wants, *reversed(wants)] * 3
    with daemon.raw() as raw:
        for number, name in enumerate(order, 1):
            raw.send(infer_frame(name, request_id=number))
            assert raw.value() == ("1", wants[name], number)
        # and without waiting for the answers in between
        raw.send(b"".join(infer_frame(n, request_id=i) for i, n in enumerate(order, 100)))
        answers = [raw.value() for _ in order]
        assert answers == [("1", wants[n], i) for i, n in enumerate(order, 100)]


def test_requests_to_the_server_and_to_models_mix_on_one_connection(daemon):
    daemon.add("mixed")
    live = messages.encode_document(Kind.SERVER_LIVE, {}, request_id=9)
    with daemon.raw() as raw:
        raw.send(infer_frame("mixed") + live + infer_frame("mixed", request_id=2) + live)
        assert raw.value()[2] == 1
        assert raw.frame().prefix.kind == Kind.SERVER_LIVE | frames.RESPONSE
        assert raw.value()[2] == 2
        assert raw.frame().prefix.kind == Kind.SERVER_LIVE | frames.RESPONSE


def test_a_models_own_socket_serves_it_and_no_other(daemon):
    daemon.add("own-a")
    daemon.add("own-b")
    path = str(daemon.run_dir / "models" / "own-a.sock")
    with daemon.raw(path) as raw:
        raw.send(infer_frame("own-a"))
        assert raw.value() == ("1", 7.0, 1)
        raw.send(infer_frame("own-b", request_id=2))
        assert isinstance(raw.error(), PermissionDeniedError)
        raw.send(infer_frame("own-a", request_id=3))
        assert raw.value() == ("1", 7.0, 3)


def test_metadata_and_readiness_come_from_the_worker(daemon):
    daemon.add("meta", 4)
    with daemon.client() as client:
        metadata = client.metadata("meta")
        assert metadata["name"] == "meta" and metadata["versions"] == ["4"]
        assert metadata["inputs"][0]["shape"] == [-1, WIDTH]
        assert client.ready("meta") is True
        with pytest.raises(NotFoundError):
            client.ready("nobody")
        assert "meta" in client.server_metadata()["models"]


# --- rollback and unload --------------------------------------------------------------------------


def test_a_rollback_uses_the_warm_worker_and_a_second_one_has_nowhere_to_go(daemon):
    daemon.add("back", 1, scale=1.0)
    daemon.add("back", 2, scale=2.0)
    warm = daemon.worker("back", "warm")["pid"]
    change = daemon.control("rollback", name="back")
    assert change["version"] == 1 and change["warm"] is True
    assert daemon.infer("back") == 4.0
    assert daemon.worker("back")["pid"] == warm
    with pytest.raises(ConflictError):
        daemon.control("rollback", name="back")
    daemon.control("activate", name="back", version=2)
    assert daemon.infer("back") == 7.0


def test_a_rollback_without_a_previous_version_is_a_conflict(daemon):
    daemon.add("only")
    with pytest.raises(ConflictError):
        daemon.control("rollback", name="only")
    assert daemon.infer("only") == 7.0


def test_activating_the_active_version_changes_nothing(daemon):
    daemon.add("again", 1, scale=1.0)
    daemon.add("again", 2)
    before = daemon.worker("again")["pid"], daemon.worker("again", "warm")["pid"]
    change = daemon.control("activate", name="again", version=2)
    assert change["version"] == 2 and change["previous"] == 1
    assert (daemon.worker("again")["pid"], daemon.worker("again", "warm")["pid"]) == before


def test_an_unload_ends_the_process_and_says_how_many_bytes_came_back(daemon):
    megabytes = 60
    hoard = {"faults": [{"action": "allocate", "size_mb": megabytes, "at": "load"}]}
    daemon.add("unload", options=hoard)
    worker = daemon.worker("unload")
    private = worker["private_bytes"]
    assert private > megabytes * 1_000_000
    answer = daemon.control("unload", name="unload")
    assert answer["freed_bytes"] == pytest.approx(private, rel=0.1)
    assert not Path(f"/proc/{worker['pid']}").exists()
    assert not daemon.worker("unload")
    with daemon.impatient() as client:
        assert client.ready("unload") is False
        with pytest.raises(UnavailableError):
            client.infer("unload", {"x": filled(1)})
    daemon.control("activate", name="unload", version=1)
    assert daemon.infer("unload") == 7.0


def test_an_unload_answers_what_is_in_flight(daemon):
    daemon.add("inflight", options={"run_ms": 300})
    with daemon.raw() as raw:
        raw.send(infer_frame("inflight"))
        until(lambda: daemon.worker("inflight").get("connections"))
        time.sleep(0.1)  # into the run: the wait is for the model, not for an event of ours
        daemon.control("unload", name="inflight")
        assert raw.value() == ("1", 7.0, 1)


def test_sixty_loads_and_unloads_leave_no_slope(daemon, record_property):
    daemon.add("cycle", 1)

    def cycle() -> None:
        daemon.control("activate", name="cycle", version=1)
        assert daemon.infer("cycle") == 7.0
        daemon.control("unload", name="cycle")

    for _ in range(15):
        cycle()
    fds, grown = daemon.fds(), []
    began_s = time.monotonic()
    for _ in range(2):  # a leak grows in both; a heap that finds its size takes one step
        rss = daemon.rss_bytes()
        for _ in range(30):
            cycle()
        grown.append(daemon.rss_bytes() - rss)
    per_cycle_ms = (time.monotonic() - began_s) / 60 * 1e3
    print(f"load + infer + unload {per_cycle_ms:.1f} ms; daemon grew {grown} bytes in 30 each")
    record_property("points", ("loads and unloads of a model", 60))
    until(lambda: daemon.fds() <= fds, f"{fds} descriptors, {daemon.descriptors()}")
    assert min(grown) < 300 * 1024


# --- the daemon's own life ------------------------------------------------------------------------


def test_two_daemons_on_one_state_directory_the_second_is_a_conflict(daemon):
    second = subprocess.run(
        serve_command(daemon.state_dir, daemon.root / "run2"),
        capture_output=True,
        timeout=20,
    )
    assert second.returncode == ConflictError.exit_code, second.stderr
    assert b"Traceback" not in second.stderr
    assert daemon.control("models")


def test_two_daemons_on_one_run_directory_the_second_is_a_conflict(daemon):
    second = subprocess.run(
        serve_command(daemon.root / "state2", daemon.run_dir),
        capture_output=True,
        timeout=20,
    )
    assert second.returncode == ConflictError.exit_code, second.stderr
    assert b"Traceback" not in second.stderr
    assert daemon.control("models")


def test_after_kill_9_nothing_is_left_and_the_next_start_serves_the_same(make_daemon):
    daemon = make_daemon().start()
    daemon.add("kept", 1, scale=1.0)
    daemon.add("kept", 2, scale=2.0)
    daemon.add("unloaded")
    daemon.control("unload", name="unloaded")
    assert len(daemon.relatives()) >= 4  # daemon, template, two workers
    daemon.kill()
    assert (daemon.run_dir / "infer.sock").exists()  # stale
    daemon.start()
    until(lambda: daemon.ready("kept"))
    assert daemon.infer("kept") == 7.0
    assert daemon.model("unloaded")["state"] == "stopped"
    assert daemon.control("rollback", name="kept")["version"] == 1
    assert daemon.infer("kept") == 4.0


def test_sigterm_answers_requests_in_flight_and_ends_in_time(make_daemon):
    daemon = make_daemon().start()
    daemon.add("busy", options={"run_ms": 400})
    with daemon.raw() as raw:
        raw.send(infer_frame("busy"))
        until(lambda: daemon.worker("busy").get("connections"))
        time.sleep(0.1)  # into the run
        began_s = time.monotonic()
        daemon.stop()
        print(f"stopped in {time.monotonic() - began_s:.2f} s with a run of 0.4 s in flight")
        assert raw.value() == ("1", 7.0, 1)
        assert raw.is_closed()
    assert not (daemon.run_dir / "models" / "busy.sock").exists()


def test_sigterm_while_models_load_does_not_wait_for_them(make_daemon):
    daemon = make_daemon().start()
    daemon.install(bundle(daemon.bundles, "lazy", options={"load_ms": 8000}), activate=False)
    with pytest.raises(DeadlineError), daemon_control(daemon, 0.5) as control:
        control.call("activate", {"name": "lazy", "version": 1})
    began_s = time.monotonic()
    daemon.stop()
    assert time.monotonic() - began_s < 4


def test_sigterm_during_a_start_with_a_slow_model_ends_at_once(make_daemon):
    daemon = make_daemon().start()
    daemon.add("lazy", options={"load_ms": 2500})
    daemon.stop()
    daemon.start(wait=False)
    until(lambda: daemon.control_or_none())
    began_s = time.monotonic()
    daemon.stop()
    assert time.monotonic() - began_s < 2


# --- beside a large install -----------------------------------------------------------------------


class Installing:
    """A bundle that takes a second to copy, being installed in a thread."""

    def __init__(self, daemon) -> None:
        path = large_onnx_bundle(daemon.bundles, "vast", 192 << 20)
        self._daemon = daemon
        self.failure: EdgeError | None = None
        self._thread = threading.Thread(target=self._install, args=(path,))
        self._thread.start()
        until(self.copying)

    def copying(self) -> bool:
        """Whether a blob is on its way into the store."""
        return any((self._daemon.state_dir / "blobs").glob(".tmp-*"))

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _install(self, path) -> None:
        try:
            self._daemon.install(path, activate=False)
        except EdgeError as error:
            self.failure = error


def test_another_model_switches_while_a_large_bundle_is_installed(make_daemon):
    daemon = make_daemon().start()
    for version in (1, 2):
        daemon.add("nimble", version, scale=float(version))
    installing = Installing(daemon)
    daemon.control("rollback", name="nimble")
    daemon.control("activate", name="nimble", version=2)
    daemon.control("unload", name="nimble")
    assert installing.copying()
    daemon.control("activate", name="nimble", version=1)
    installing.join()
    assert installing.failure is None and daemon.infer("nimble") == 4.0
    assert daemon.model("vast")["installed"] == [1]


def test_sigterm_during_a_large_install_ends_it_and_leaves_nothing_of_it(make_daemon):
    daemon = make_daemon().start()
    installing = Installing(daemon)
    began_s = time.monotonic()
    daemon.stop()
    print(f"stopped in {time.monotonic() - began_s:.2f} s with a bundle of 192 MiB on its way in")
    installing.join()
    assert installing.failure is not None
    assert (
        list((daemon.state_dir / "blobs").iterdir()) == []
    )  # its thread tidied up, and then ended
    daemon.start()
    assert daemon.control("models")["models"] == []


def daemon_control(daemon, timeout_s):
    from edge_runtime.client.control import ControlClient

    return ControlClient(daemon.control_path, timeout_s=timeout_s)


def test_sigint_stops_it_as_sigterm_does(make_daemon):
    daemon = make_daemon().start()
    daemon.add("one")
    os.kill(daemon.pid, signal.SIGINT)
    assert daemon.process.wait(10) == 0
    daemon.gone()


def test_a_client_waits_out_a_restart_of_the_daemon(make_daemon):
    daemon = make_daemon().start()
    daemon.add("through")
    answers: list[float] = []
    done = threading.Event()

    def work() -> None:
        with daemon.client() as client:
            while not done.is_set():
                answers.append(float(client.infer("through", {"x": filled(3)})["y"][0, 0]))

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: len(answers) > 10)
    daemon.stop()
    daemon.start()
    count = len(answers)
    until(lambda: len(answers) > count + 10)
    done.set()
    thread.join()
    assert set(answers) == {7.0}


# --- what it costs --------------------------------------------------------------------------------


HEAVY = ("numpy", "onnxruntime", "libopenblas")
# Mapped by the first install of a large bundle (digests.LARGE_BYTES), and by nothing before it.
CRYPTOGRAPHY = ("libcrypto", "libssl", "_hashlib", "_ssl")


def mapped(daemon, words):
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    return [word for word in words if word in maps]


def test_an_idle_daemon_is_small_and_has_no_numpy_and_no_backend(make_daemon):
    daemon = make_daemon().start()
    rss = daemon.rss_bytes()
    print(f"idle daemon: {rss / 2**20:.1f} MiB resident")
    assert rss <= 26 * 1024 * 1024
    assert mapped(daemon, HEAVY + CRYPTOGRAPHY) == []
    daemon.add("one")
    daemon.install(onnx_bundle(daemon.bundles, "two"))
    assert daemon.infer("one") == 7.0
    print(f"after two installs and an answer: {daemon.rss_bytes() / 2**20:.1f} MiB")
    assert daemon.rss_bytes() <= 30 * 1024 * 1024
    assert mapped(daemon, HEAVY + CRYPTOGRAPHY) == []
    daemon.stop()
    daemon.start()
    until(lambda: daemon.ready("one") and daemon.ready("two"))
    print(f"started again with two models: {daemon.rss_bytes() / 2**20:.1f} MiB")
    assert daemon.rss_bytes() <= 28 * 1024 * 1024
    assert mapped(daemon, HEAVY + CRYPTOGRAPHY) == []


def test_start_to_first_answer_and_a_second_model_of_the_same_backend(make_daemon):
    daemon = make_daemon().start()
    daemon.install(onnx_bundle(daemon.bundles, "first"))
    daemon.install(onnx_bundle(daemon.bundles, "second", scale=3.0), activate=False)
    daemon.stop()
    began_s = time.monotonic()
    daemon.start(wait=False)
    with daemon.client(timeout_s=20) as client:
        until(client.live, "a socket")
        client.infer("first", {"x": filled(1)})
        start_s = time.monotonic() - began_s
        began_s = time.monotonic()
        daemon.control("activate", name="second", version=1)
        client.infer("second", {"x": filled(1)})
        second_s = time.monotonic() - began_s
    private = daemon.worker("second")["private_bytes"]
    print(
        f"start to first answer {start_s * 1e3:.0f} ms, second model {second_s * 1e3:.0f} ms,"
        f" its private memory {private / 1e6:.1f} MB"
    )
    assert second_s < start_s  # no second import of the library
    assert len(daemon.control("ps")["templates"]) == 1
    assert private <= 8 * 1024 * 1024


def test_an_idle_daemon_with_two_models_hardly_uses_the_processor(daemon):
    daemon.add("idle-a")
    daemon.add("idle-b")

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    pids = [daemon.pid, daemon.worker("idle-a")["pid"], daemon.worker("idle-b")["pid"]]
    before = [ticks(pid) for pid in pids]
    time.sleep(1.0)  # the measurement itself
    used = [ticks(pid) - old for pid, old in zip(pids, before, strict=True)]
    print(f"ticks of 10 ms in 1 s: daemon {used[0]}, workers {used[1:]}")
    assert sum(used) <= 10


def test_ps_models_and_why_tell_the_same_story(daemon):
    daemon.add("story", 3)
    daemon.infer("story")
    worker, model = daemon.worker("story"), daemon.model("story")
    why = daemon.control("why", name="story")
    assert worker["version"] == model["active"]["version"] == 3
    assert model["installed"] == [3] and model["state"] == why["state"] == "ready"
    assert "version 3" in why["summary"]
    names = [one["event"] for one in why["history"]]
    assert names[:1] == ["bundle_installed"] and "model_activated" in names
    template = next(t for t in daemon.control("ps")["templates"] if t["backend"] == "reference")
    assert template["state"] == "ready" and template["private_bytes"] > 0
    assert np.isfinite(worker["uptime_s"])


def test_a_daemon_run_by_the_context_manager_leaves_nothing(tmp_path):
    with running() as daemon:
        root = daemon.root
    assert not root.exists()


def test_an_error_of_a_command_has_its_code(daemon):
    with pytest.raises(EdgeError) as caught:
        daemon.control("activate", name="nobody", version=1)
    assert caught.value.code == "not_found"


# Another user, who may read what the interpreter of these tests lies in, and nothing else.
SETPRIV = "--reuid=65534 --regid=65534 --clear-groups --bounding-set=-all,+dac_read_search"
CAPABILITIES = "--inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_a_daemon_of_an_ordinary_user_serves_the_same_way(make_daemon):
    daemon = make_daemon()
    for path in (daemon.root, daemon.bundles):
        os.chown(path, 65534, 65534)
    daemon.start(prefix=["setpriv", *SETPRIV.split(), *CAPABILITIES.split()])
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    assert "Uid:\t65534" in status and "CapEff:\t0000000000000004" in status
    daemon.add("plain", 1, scale=1.0, golden_off=0.0)
    daemon.add("plain", 2)
    assert daemon.infer("plain") == 7.0
    sandbox = daemon.worker("plain")["sandbox"]
    assert not [measure for measure in sandbox if measure.startswith("no ")], sandbox
    assert daemon.worker("plain")["private_bytes"] > 0
    os.kill(daemon.worker("plain")["pid"], signal.SIGKILL)
    assert daemon.infer("plain") == 7.0
    # Many connections with memory in one hand-over: what may be in flight is limited for him.
    clients = [daemon.client() for _ in range(60)]
    x = np.full((5000, WIDTH), 3, np.float32)
    for version in (1, 2):
        for client in clients:
            client.infer("plain", {"x": x})
        daemon.control("activate", name="plain", version=version)
    for client in clients:
        assert (client.infer("plain", {"x": x})["y"] == 7.0).all()
        client.close()
    assert daemon.control("unload", name="plain")["freed_bytes"] > 0
