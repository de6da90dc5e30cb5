"""Bad input on the live sockets: each is refused or closed, and nobody else notices."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_runtime.client.control import ControlClient
from edge_runtime.errors import (
    BundleError,
    ConflictError,
    EdgeError,
    MalformedError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TooLargeError,
)
from edge_runtime.wire import frames, messages
from edge_runtime.wire.frames import Kind
from tests.daemon.world import (
    Daemon,
    affine,
    bundle,
    infer_frame,
    packed_document,
    running,
    until,
)

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    config = {
        "limits": {
            "frame_body_bytes_max": 64 * KIB,
            "connection_idle_header_s": 0.3,
            "control_connections_max": 4,
            "bundle_bytes_max": 4 * MIB,
        },
    }
    with running(config) as started:
        started.add("good")
        started.add("other", scale=3.0)
        yield started


@pytest.fixture(scope="module")
def growing() -> Iterator[Daemon]:
    """Where tests install models of their own, which stay."""
    with running() as started:
        yield started


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the same worker serves, and nothing waits or leaks."""
    if "daemon" not in request.fixturenames:
        yield
        return
    daemon = request.getfixturevalue("daemon")
    worker = daemon.worker("good")["pid"]
    until(lambda: daemon.worker("good")["connections"] == 0)
    before = daemon.fds(), daemon.fds(worker)
    yield
    assert daemon.infer("good") == 7.0
    assert daemon.worker("good")["pid"] == worker
    until(lambda: daemon.worker("good")["connections"] == 0)
    until(
        lambda: (daemon.fds(), daemon.fds(worker)) <= before,
        f"descriptors as before, {before}",
    )


# --- frames that are wrong ------------------------------------------------------------------------

GOOD = infer_frame("good")
HEADER = json.loads(GOOD[32 : 32 + struct.unpack_from("<I", GOOD, 8)[0]])


def with_header(header: Any, body: bytes = bytes(64), kind: int = Kind.INFER) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return frames.encode_prefix(kind, len(data), len(body), 1) + data + body


def changed(**changes: Any) -> dict[str, Any]:
    return {**HEADER, **changes}


def tensor(**changes: Any) -> dict[str, Any]:
    return changed(inputs=[{**HEADER["inputs"][0], **changes}])


WRONG_REQUESTS = {
    "not JSON": with_header(b"{x: 1}"),
    "no header": with_header(b""),
    "a list": with_header([]),
    "null": with_header(None),
    "deep": with_header(b"[" * 30_000),
    "no model": with_header({"inputs": []}),
    "model is a number": with_header(changed(model_name=7)),
    "model is empty": with_header(changed(model_name="")),
    "model is huge": with_header(changed(model_name="x" * 5000)),
    "not UTF-8": with_header(b'{"model_name":"\xff\xfe"}'),
    "an unknown model": with_header(changed(model_name="nobody")),
    "a path for a model": with_header(changed(model_name="../good")),
    "no inputs": with_header(changed(inputs=[])),
    "inputs twice": with_header(changed(inputs=HEADER["inputs"] * 2)),
    "another name": with_header(tensor(name="z")),
    "another datatype": with_header(tensor(datatype="INT32")),
    "no datatype": with_header(tensor(datatype="FP128")),
    "another rank": with_header(tensor(shape=[16])),
    "another width": with_header(tensor(shape=[1, 17])),
    "a negative shape": with_header(tensor(shape=[-1, 16])),
    "an endless shape": with_header(tensor(shape=[1 << 39, 16])),
    "a fractional shape": with_header(tensor(shape=[1.5, 16])),
    "rows that do not come": with_header(tensor(shape=[2, 16])),
    "size and shape differ": with_header(
        tensor(parameters={"binary_data_size": 60}), body=bytes(60)
    ),
    "more body than the header says": with_header(HEADER, body=bytes(128)),
    "less body than the header says": with_header(HEADER, body=bytes(32)),
    "no body": with_header(HEADER, body=b""),
    "an unknown output": with_header(changed(outputs=[{"name": "nothing"}])),
    "an output twice": with_header(changed(outputs=[{"name": "y"}] * 2)),
    "a region that is not there": with_header(
        tensor(parameters={"shared_memory_region": 3}), body=b""
    ),
    "a version that is not there": with_header(changed(model_version="9")),
    "a control command": with_header({"command": "ps"}, body=b"", kind=Kind.CONTROL),
    "an event": with_header({}, body=b"", kind=Kind.EVENT),
    "an answer": with_header({}, body=b"", kind=Kind.INFER | frames.RESPONSE),
}


@pytest.mark.parametrize("later", [False, True], ids=["first frame", "later frame"])
@pytest.mark.parametrize("what", WRONG_REQUESTS)
def test_a_wrong_request_is_an_error_answer_and_the_connection_goes_on(daemon, what, later):
    with daemon.raw() as raw:
        if later:
            raw.send(GOOD)
            raw.value()
        raw.send(WRONG_REQUESTS[what])
        error = raw.error()
        assert isinstance(error, RequestError | NotFoundError), error
        assert error.code in ("invalid_request", "not_found") and error.message
        raw.send(GOOD)
        assert raw.value() == ("1", 7.0, 1)


MALFORMED = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(64),
    "zeros": bytes(64),
    "another version": GOOD[:4] + b"\x02" + GOOD[5:],
    "an unknown kind": GOOD[:5] + b"\x66" + GOOD[6:],
    "unknown flags": GOOD[:7] + b"\x01" + GOOD[8:],
    "a header over its limit": frames.encode_prefix(Kind.INFER, 64 * KIB + 1, 0),
    "a header of 4 GiB": frames.encode_prefix(Kind.INFER, (1 << 32) - 1, 0),
}


@pytest.mark.parametrize("later", [False, True], ids=["first frame", "later frame"])
@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_frame_is_told_and_closed(daemon, what, later):
    with daemon.raw() as raw:
        if later:
            raw.send(GOOD)
            raw.value()
        raw.send(MALFORMED[what])
        assert isinstance(raw.error(), MalformedError | TooLargeError)
        assert raw.is_closed()


@pytest.mark.parametrize("later", [False, True], ids=["first frame", "later frame"])
@pytest.mark.parametrize("model", ["good", "nobody"])
def test_a_body_over_the_limit_is_skipped_and_the_connection_stays_usable(daemon, later, model):
    with daemon.raw() as raw:
        if later:
            raw.send(GOOD)
            raw.value()
        for rows in (1025, 5000):
            raw.send(infer_frame(model, rows=rows) + GOOD)
            error = raw.error()
            assert isinstance(error, TooLargeError if model == "good" else NotFoundError)
            assert raw.value() == ("1", 7.0, 1)
        raw.send(infer_frame("good", rows=1024))  # exactly the limit
        assert raw.value()[1] == 7.0


@pytest.mark.parametrize("later", [False, True], ids=["first frame", "later frame"])
def test_garbage_never_hurts_router_or_worker(daemon, record_property, later):
    rng = random.Random(4711 + later)
    worker = daemon.worker("good")["pid"]
    memory = None
    rounds = 2000
    for turn in range(rounds):
        data = mutated(rng)
        with daemon.raw() as raw:
            if later:
                raw.send(GOOD)
                raw.value()
            drain(raw.sock, data)
        if turn == 100:
            memory = daemon.rss_bytes(), daemon.rss_bytes(worker)
    assert memory is not None
    grown = daemon.rss_bytes() - memory[0], daemon.rss_bytes(worker) - memory[1]
    print(f"{rounds} rounds of garbage: daemon grew {grown[0]} bytes, worker {grown[1]}")
    record_property("points", ("rounds of garbage on a live socket", rounds))
    assert max(grown) < 2 * MIB


def mutated(rng: random.Random) -> bytes:
    """Frames with something wrong: bits, lengths, splices, nonsense."""
    whole = [GOOD, *WRONG_REQUESTS.values(), *MALFORMED.values(), infer_frame("other", rows=40)]
    data = bytearray(b"".join(rng.choices(whole, k=rng.randint(1, 4))))
    for _ in range(rng.choice((0, 1, 1, 3, 20))):
        place = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place : place + rng.randint(1, 40)]
            case 2:
                data[place:place] = rng.randbytes(rng.randint(1, 40))
            case 3:
                data[place : place + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", bytes(4), b"\x00\x00\x00\x80", b"\x01\x00\x00\x00")
                )
            case _:
                del data[place:]
        if not data:
            data = bytearray(b"E")
    return bytes(data)


def drain(sock: socket.socket, data: bytes) -> None:
    """Send all, half-close, and read until the server closes: it must, within the time limit."""
    sock.settimeout(5)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


# --- clients that are slow, many, or gone ---------------------------------------------------------


@pytest.mark.parametrize("size", [1, 31, 32, 40, len(GOOD) - 65])
def test_a_first_frame_that_does_not_arrive_in_time_closes_the_connection(daemon, size):
    with daemon.raw() as raw:
        began_s = time.monotonic()
        raw.send(GOOD[:size])
        assert raw.is_closed()
        assert 0.2 < time.monotonic() - began_s < 5


def test_a_silent_connection_may_stay(daemon):
    with daemon.raw() as raw:
        time.sleep(0.5)  # longer than connection_idle_header_s: nothing has begun
        raw.send(GOOD)
        assert raw.value()[1] == 7.0


def test_a_client_that_does_not_read_its_answers_holds_up_nobody(daemon):
    worker = daemon.worker("good")["pid"]
    before = daemon.rss_bytes(worker)
    with daemon.raw() as lazy:
        lazy.sock.setblocking(False)
        frame = infer_frame("good", rows=1024)
        sent = 0
        data = b""
        with contextlib.suppress(BlockingIOError):
            while sent < 64 * MIB:
                data = data or frame
                size = lazy.sock.send(data)
                data = data[size:]
                sent += size
        for _ in range(20):
            assert daemon.infer("good") == 7.0
        assert sent < 64 * MIB
        assert daemon.rss_bytes(worker) - before < 64 * MIB
        # And when it reads at last, it gets everything that it sent whole.
        whole = sent // len(frame)
        lazy.sock.settimeout(5)
        for _ in range(whole):
            assert lazy.value()[1] == 7.0


def test_a_client_that_never_reads_refusals_of_the_daemon_is_dropped(daemon):
    live = messages.encode_document(Kind.SERVER_LIVE, {}, request_id=1)
    with daemon.raw() as lazy:
        lazy.sock.settimeout(5)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(2000):
                lazy.sock.sendall(live * 50)


def test_clients_that_vanish_in_the_middle_leave_nothing(daemon):
    rng = random.Random(11)
    for _ in range(150):
        with daemon.raw() as raw:
            data = infer_frame("good", rows=rng.choice((1, 900)))
            raw.send(data[: rng.randint(1, len(data))])
            if rng.random() < 0.3:
                raw.send(GOOD)


def test_a_client_that_vanishes_with_much_unread_during_a_handover_is_dropped(make_daemon):
    daemon = make_daemon({"workers": {"runners": 1}}).start()
    daemon.add("leave", 1, scale=1.0, options={"run_ms": 150})
    daemon.add("leave", 2, scale=2.0, options={"run_ms": 150})
    pids = {daemon.worker("leave", state)["pid"] for state in ("active", "warm")}
    with daemon.raw() as raw:
        raw.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # more than any buffer holds
                raw.sock.send(infer_frame("leave") * 20)
        until(lambda: daemon.worker("leave")["connections"] == 1)
        thread = threading.Thread(
            target=lambda: daemon.control("activate", name="leave", version=1)
        )
        thread.start()
        time.sleep(0.05)  # into the hand-over, which waits for the run
    thread.join()
    assert daemon.infer("leave") == 4.0
    assert {daemon.worker("leave", state)["pid"] for state in ("active", "warm")} == pids


def test_connections_are_limited_and_come_free_again(make_daemon):
    daemon = make_daemon({"limits": {"connections_max": 12}}).start()
    daemon.add("good")
    held = [daemon.raw() for _ in range(12)]
    for raw in held[:6]:  # half of them at the worker, half of them at the door
        raw.send(infer_frame("good"))
        raw.value()
    until(lambda: daemon.worker("good")["connections"] == 6)
    with daemon.raw() as refused:
        error = refused.error()
        assert isinstance(error, OverloadedError) and error.retry_after_s
        assert refused.is_closed()
    held[0].send(infer_frame("good"))
    assert held[0].value()[1] == 7.0
    for raw in held[:2] + held[-2:]:
        raw.sock.close()
    assert daemon.infer("good") == 7.0
    for raw in held:
        raw.sock.close()


def test_a_crowd_that_takes_every_connection_does_not_starve_the_watchdog(make_daemon, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        daemon = make_daemon({"limits": {"connections_max": 4}}, environment=environment).start()
        crowd = [daemon.raw() for _ in range(4)]
        with daemon.raw() as refused:
            assert isinstance(refused.error(), OverloadedError)
        systemd.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while systemd.recv(4096):
                pass
        systemd.settimeout(10)
        assert [systemd.recv(4096) for _ in range(2)] == [b"WATCHDOG=1"] * 2
        assert not daemon.events("probe_failed")
        for raw in crowd:
            raw.sock.close()


def test_descriptors_that_no_frame_takes_are_not_kept(make_daemon):
    daemon = make_daemon().start()
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")
    frame = messages.encode_document(Kind.SERVER_LIVE, {}, request_id=1)
    with daemon.raw() as raw, Path(os.devnull).open("rb") as file:
        raw.ask(frame)
        before = len(list(descriptors.iterdir()))
        for _ in range(20):  # eight kept ones would end the connection
            raw.ask(frame, [file.fileno()])
        assert len(list(descriptors.iterdir())) == before


def test_a_daemon_without_descriptors_left_serves_whom_it_has_and_recovers(make_daemon):
    import resource

    daemon = make_daemon()
    daemon.start(enter=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    daemon.add("good")
    with daemon.raw() as early:
        early.send(infer_frame("good"))
        assert early.value()[1] == 7.0
        crowd = []
        for _ in range(80):
            crowd.append(daemon.raw())
        until(lambda: daemon.events("accept_failed"))
        early.send(infer_frame("good"))
        assert early.value()[1] == 7.0
        events = len(daemon.events("accept_failed"))
        time.sleep(0.5)  # it must not spin on the listener meanwhile
        assert len(daemon.events("accept_failed")) - events <= 8
        for raw in crowd:
            raw.sock.close()
    assert daemon.infer("good") == 7.0
    assert daemon.control("models")["models"]


# --- the control socket ---------------------------------------------------------------------------

WRONG_COMMANDS: list[tuple[str, dict[str, Any], type[EdgeError]]] = [
    ("install", {}, RequestError),
    ("install", {"activate": "yes"}, RequestError),
    ("activate", {}, RequestError),
    ("activate", {"name": "good"}, RequestError),
    ("activate", {"name": "good", "version": "1"}, RequestError),
    ("activate", {"name": "good", "version": 1.5}, RequestError),
    ("activate", {"name": "good", "version": 1 << 70}, NotFoundError),
    ("activate", {"name": "good", "version": -1}, NotFoundError),
    ("activate", {"name": "good", "version": 9}, NotFoundError),
    ("activate", {"name": "nobody", "version": 1}, NotFoundError),
    ("activate", {"name": "../good", "version": 1}, EdgeError),
    ("activate", {"name": "a/../../etc", "version": 1}, EdgeError),
    ("activate", {"name": "", "version": 1}, EdgeError),
    ("activate", {"name": "good\0", "version": 1}, EdgeError),
    ("activate", {"name": "good", "version": 1, "more": 2}, RequestError),
    ("rollback", {}, RequestError),
    ("rollback", {"name": "nobody"}, NotFoundError),
    ("rollback", {"name": ["good"]}, RequestError),
    ("rollback", {"name": "good"}, ConflictError),
    ("unload", {}, RequestError),
    ("unload", {"name": "nobody"}, NotFoundError),
    ("unload", {"name": None}, RequestError),
    ("remove", {"name": "good"}, RequestError),
    ("remove", {"name": "good", "version": 9}, NotFoundError),
    ("remove", {"name": "good", "version": 1}, ConflictError),
    ("remove", {"name": "../..", "version": 1}, EdgeError),
    ("gc", {"now": True}, RequestError),
    ("models", {"name": "good"}, RequestError),
    ("ps", {"x": 1}, RequestError),
    ("why", {}, RequestError),
    ("why", {"name": "nobody"}, NotFoundError),
    ("why", {"name": "../good"}, NotFoundError),
    ("config", {"set": {}}, RequestError),
    ("shutdown", {}, NotFoundError),
    ("__init__", {}, NotFoundError),
    ("x" * 200, {}, NotFoundError),
    ("", {}, RequestError),
]


@pytest.mark.parametrize(("command", "arguments", "kind"), WRONG_COMMANDS)
def test_a_wrong_command_is_a_typed_error_and_the_session_goes_on(daemon, command, arguments, kind):
    with ControlClient(daemon.control_path, timeout_s=10) as control:
        with pytest.raises(kind) as caught:
            control.call(command, arguments)
        assert caught.value.code != "internal" and caught.value.message
        assert control.call("models")["models"]


def test_control_connections_are_limited_and_come_free_again(daemon):
    held = [daemon.raw(daemon.control_path) for _ in range(4)]
    with pytest.raises(OverloadedError):
        daemon.control("models")
    held.pop().sock.close()
    until(lambda: daemon.control_or_none())
    for raw in held:
        raw.sock.close()
    until(lambda: daemon.control_or_none())


def test_garbage_never_hurts_the_control_socket(daemon, record_property):
    rng = random.Random(815)
    ask = messages.encode_document(Kind.CONTROL, {"command": "models"}, request_id=1)
    for _ in range(150):
        data = bytearray(ask * rng.randint(1, 3))
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with daemon.raw(daemon.control_path) as raw:
            drain(raw.sock, bytes(data[: rng.randint(1, len(data))]))
    record_property("points", ("rounds of garbage on the control socket", 150))
    assert daemon.control("models")


def test_a_command_over_the_limit_is_too_large_and_the_session_goes_on(daemon):
    ask = messages.encode_document(Kind.CONTROL, {"command": "models"}, request_id=2)
    prefix = frames.encode_prefix(Kind.CONTROL, 32, 2 * MIB, 1)
    with daemon.raw(daemon.control_path) as raw:
        raw.send(prefix + b" " * 32 + bytes(2 * MIB) + ask)
        assert isinstance(raw.error(), TooLargeError)
        assert raw.frame().prefix.kind == Kind.CONTROL | frames.RESPONSE


def test_a_client_that_leaves_during_a_command_does_not_stop_it(growing):
    path = bundle(growing.bundles, "orphan", options={"load_ms": 200})
    ask = messages.encode_document(
        Kind.CONTROL, {"command": "install", "activate": True}, request_id=1
    )
    with path.open("rb") as file, growing.raw(growing.control_path) as raw:
        raw.send(ask, [file.fileno()])
    until(lambda: growing.events("model_activated", model="orphan"))
    assert growing.infer("orphan") == 7.0


def test_answers_to_commands_sent_together_come_in_order(daemon):
    data = b"".join(
        messages.encode_document(Kind.CONTROL, {"command": command}, request_id=number)
        for number, command in enumerate(("models", "nothing", "ps", "models"), 1)
    )
    with daemon.raw(daemon.control_path) as raw:
        raw.send(data)
        assert [raw.frame().prefix.request_id for _ in range(4)] == [1, 2, 3, 4]


# --- bundles that are wrong -----------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def flip_artifact(data: bytearray) -> None:
    place = data.rindex(b'"offset": 1.0')
    data[place + 10] = ord("9")


def other_manifest(directory: Path, **changes: Any) -> Path:
    """A bundle whose manifest says something else, in an archive that fits it otherwise."""
    source = bundle(directory, "liar")
    with tarfile.open(source) as archive:
        members = [(m, archive.extractfile(m).read()) for m in archive.getmembers()]
    manifest = yaml.safe_load(members[0][1])
    for path, value in changes.items():
        place = manifest
        *steps, last = path.split("__")
        for step in steps:
            place = place[int(step) if step.isdigit() else step]
        place[last] = value
    return tar(
        directory,
        [("model.yaml", json.dumps(manifest).encode())]
        + [(member.name, data) for member, data in members[1:]],
    )


def tar(directory: Path, members: list[tuple[str, bytes]], **info: Any) -> Path:
    path = directory / f"tar-{len(list(directory.iterdir()))}.bundle"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            for key, value in info.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return path


def _external(directory: Path) -> Path:
    """An ONNX file that wants its weights from /etc/passwd."""
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[16])
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "../../../../etc/passwd"
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [1, 16])],
        [info("y", TensorProto.FLOAT, [1, 16])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return with_artifact(directory, model.SerializeToString(), "onnxruntime", "m.onnx")


def with_artifact(directory: Path, data: bytes, backend: str, filename: str) -> Path:
    sha = hashlib.sha256(data).hexdigest()
    spec = {"datatype": "FP32", "shape": [1, 16]}
    manifest = {
        "schema": 1,
        "name": "liar",
        "version": 1,
        "inputs": [{"name": "x", **spec}],
        "outputs": [{"name": "y", **spec}],
        "variants": [
            {
                "name": "v",
                "backend": backend,
                "artifact": {"sha256": sha, "size": len(data), "filename": filename},
            }
        ],
    }
    return tar(directory, [("model.yaml", json.dumps(manifest).encode()), (f"blobs/{sha}", data)])


HOSTILE_BUNDLES: dict[str, Callable[[Path], Path]] = {
    "an altered artifact": lambda d: rewrite(bundle(d, "liar", scale=11.0), flip_artifact),
    "cut off": lambda d: rewrite(
        bundle(d, "liar"), lambda data: data.__delitem__(slice(700, None))
    ),
    "cut in the artifact": lambda d: rewrite(
        bundle(d, "liar"), lambda data: data.__delitem__(slice(len(data) // 2, None))
    ),
    "bytes at the end": lambda d: rewrite(bundle(d, "liar"), lambda data: data.extend(bytes(512))),
    "empty": lambda d: rewrite(bundle(d, "liar"), bytearray.clear),
    "not an archive": lambda d: rewrite(
        bundle(d, "liar"), lambda data: data.__setitem__(slice(None), b"MZ" * 4000)
    ),
    "larger than allowed": lambda d: packed_document(
        d, "liar", 1, json.dumps(affine()).encode().ljust(5 * MIB)
    ),
    "a size of 8 EiB": lambda d: other_manifest(d, variants__0__artifact__size=1 << 63),
    "a size of 1 TiB": lambda d: other_manifest(d, variants__0__artifact__size=1 << 40),
    "a negative size": lambda d: other_manifest(d, variants__0__artifact__size=-1),
    "a hash that is a path": lambda d: other_manifest(
        d, variants__0__artifact__sha256="../" * 21 + "x"
    ),
    "a name that is a path": lambda d: other_manifest(d, name="../../etc"),
    "a version beyond": lambda d: other_manifest(d, version=1 << 40),
    "no variants": lambda d: other_manifest(d, variants=[]),
    "another schema": lambda d: other_manifest(d, schema=99),
    "an unknown backend": lambda d: other_manifest(d, variants__0__backend="pickle"),
    "inputs that are not the artifact's": lambda d: other_manifest(d, inputs__0__name="z"),
    "a link in the archive": lambda d: tar(
        d, [("model.yaml", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd"
    ),
    "a way out of the archive": lambda d: tar(d, [("../../model.yaml", b"schema: 1")]),
    "a bomb of aliases": lambda d: tar(
        d,
        [
            (
                "model.yaml",
                b"a: &a [x,x,x,x,x,x,x,x,x]\n"
                + b"".join(
                    b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9))
                    for n in range(ord("b"), ord("k"))
                ),
            )
        ],
    ),
    "a pickle": lambda d: with_artifact(d, b"\x80\x04cos\nsystem\n.", "onnxruntime", "m.onnx"),
    "external data": _external,
}


@pytest.mark.parametrize("what", HOSTILE_BUNDLES)
def test_a_hostile_bundle_is_refused_with_a_reason_and_leaves_nothing(daemon, tmp_path, what):
    path = HOSTILE_BUNDLES[what](tmp_path)
    before = kept(daemon)
    for activate in (False, True):
        with pytest.raises(BundleError) as caught:
            daemon.install(path, activate=activate)
        assert caught.value.message and caught.value.code in ("invalid_bundle", "too_large")
        assert kept(daemon) == before
    assert "liar" not in [one["name"] for one in daemon.control("models")["models"]]


def kept(daemon: Daemon) -> list[str]:
    return sorted(str(path) for path in daemon.state_dir.rglob("*") if path.is_file())


@pytest.mark.parametrize("what", ["a directory", "a pipe", "a socket", "write only", "two files"])
def test_a_descriptor_that_is_no_file_is_refused(daemon, tmp_path, what):
    path = bundle(tmp_path, "liar")
    fds = {
        "a directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "a pipe": lambda: list(os.pipe())[:1],
        "a socket": lambda: [socket.socketpair()[0].detach()],
        "write only": lambda: [os.open(path, os.O_WRONLY)],
        "two files": lambda: [os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)],
    }[what]()
    with pytest.raises(EdgeError) as caught:
        daemon.control("install", fds, filename="x")
    assert caught.value.code != "internal"
    for fd in fds:
        os.close(fd)


def test_the_same_version_with_other_content_is_a_conflict_and_again_with_the_same_is_not(growing):
    growing.add("same", 1)
    with pytest.raises(ConflictError):
        growing.add("same", 1, scale=9.0)
    assert growing.add("same", 1)["new"] is False
    assert growing.infer("same") == 7.0


def test_a_file_that_changes_while_it_is_installed_is_refused(growing, tmp_path):
    path = packed_document(tmp_path, "racing", 1, json.dumps(affine()).encode().ljust(3 * MIB))
    stop = threading.Event()

    def scribble() -> None:
        with path.open("r+b") as file:
            while not stop.is_set():
                for byte in (b"9", b" "):
                    file.seek(path.stat().st_size // 2)
                    file.write(byte)
                    file.flush()

    thread = threading.Thread(target=scribble)
    thread.start()
    outcomes = set()
    try:
        for _ in range(10):
            try:
                outcomes.add(growing.install(path)["activated"])
                assert growing.infer("racing") == 7.0
                break
            except EdgeError as error:
                outcomes.add(error.code)
    finally:
        stop.set()
        thread.join()
    assert outcomes <= {True, "invalid_bundle"}
