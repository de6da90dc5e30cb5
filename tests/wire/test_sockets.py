"""The socket door: stale paths, modes, credentials, descriptors."""

from __future__ import annotations

import os
import socket
import stat
import threading

import pytest

from edge_runtime.errors import (
    ConflictError,
    DeadlineError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
    UsageError,
)
from edge_runtime.wire import sockets
from tests.wire.receiving import received


def test_a_listener_accepts_and_knows_its_peer(tmp_path):
    with sockets.listen_unix(tmp_path / "s", 0o660) as listener:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
        with sockets.connect_unix(tmp_path / "s", 1.0):
            accepted, _ = listener.accept()
            peer = sockets.peer_credentials(accepted)
            accepted.close()
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.getuid(), os.getgid())
    assert peer.groups == {os.getgid(), *os.getgroups()}


def test_the_mode_does_not_depend_on_the_umask(tmp_path):
    old = os.umask(0o077)
    try:
        with sockets.listen_unix(tmp_path / "s", 0o666):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o666
    finally:
        os.umask(old)


def test_a_stale_socket_is_replaced(tmp_path):
    sockets.listen_unix(tmp_path / "s").close()
    assert (tmp_path / "s").is_socket()
    with sockets.listen_unix(tmp_path / "s"), sockets.connect_unix(tmp_path / "s"):
        pass


def test_a_socket_that_somebody_answers_on_is_left_alone(tmp_path):
    with sockets.listen_unix(tmp_path / "s"):
        with pytest.raises(ConflictError, match="another process answers"):
            sockets.listen_unix(tmp_path / "s")
        with sockets.connect_unix(tmp_path / "s"):
            pass


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_not_a_socket_is_never_removed(tmp_path, kind):
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConflictError, match="not a socket"):
        sockets.listen_unix(path)
    assert os.path.lexists(path)


def test_a_path_that_is_too_long_says_so(tmp_path):
    path = tmp_path / ("x" * 120)
    for attempt in (sockets.listen_unix, sockets.connect_unix):
        with pytest.raises(UsageError, match=r"socket path of .* bytes") as caught:
            attempt(path)
        assert "107" in caught.value.expected


def test_the_longest_path_works(tmp_path):
    path = f"{tmp_path}/".ljust(sockets.PATH_SIZE_MAX, "x")
    with sockets.listen_unix(path), sockets.connect_unix(path):
        pass


def test_a_missing_directory_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        sockets.listen_unix(tmp_path / "no" / "s")


def test_connecting_where_nobody_listens_is_unavailable(tmp_path):
    with pytest.raises(UnavailableError, match="nobody listens"):
        sockets.connect_unix(tmp_path / "s")
    sockets.listen_unix(tmp_path / "s").close()
    with pytest.raises(UnavailableError, match="nobody listens"):
        sockets.connect_unix(tmp_path / "s")


def test_a_full_queue_of_connections_is_a_deadline_not_a_hang(tmp_path):
    with sockets.listen_unix(tmp_path / "s", backlog=0):
        with sockets.connect_unix(tmp_path / "s"):
            with pytest.raises(DeadlineError):
                sockets.connect_unix(tmp_path / "s", timeout_s=0.05)


def test_a_socket_of_another_mode_is_permission_denied(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    with sockets.listen_unix("open", 0o666), sockets.listen_unix("shut", 0o000):
        pid = os.fork()
        if pid == 0:
            try:
                if os.getuid() == 0:  # root may open every socket
                    os.setuid(65534)
                sockets.connect_unix("open").close()
                with pytest.raises(PermissionDeniedError):
                    sockets.connect_unix("shut")
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_blocking_receive_gives_up_after_its_timeout():
    a, b = socket.socketpair()
    with a, b:
        sockets.set_timeout(a, 0.02)
        with pytest.raises(BlockingIOError):
            a.recv(1)


def test_descriptors_arrive_close_on_exec_with_their_bytes():
    a, b = socket.socketpair()
    with a, b:
        fd = os.memfd_create("x")
        a.send(b"before")
        assert sockets.send_with_fds(a, b"with", [fd, fd]) == 4
        a.send(b"after")
        buffer = bytearray(100)
        seen = b""
        fds: list[int] = []
        while len(seen) < len(b"beforewithafter"):
            n, got = received(b, memoryview(buffer))
            seen += buffer[:n]
            fds += got
            if got:
                assert seen == b"beforewith", "a read ends after the bytes that carry descriptors"
        assert seen == b"beforewithafter" and len(fds) == 2
        assert not any(os.get_inheritable(each) for each in fds)
        sockets.close_fds([fd, *fds])


def test_a_large_message_with_a_descriptor_is_sent_whole():
    a, b = socket.socketpair()
    with a, b:
        fd = os.memfd_create("x")
        data = os.urandom(2_000_000)
        sender = threading.Thread(target=sockets.send_all_with_fds, args=(a, data, [fd]))
        sender.start()
        seen = bytearray()
        fds: list[int] = []
        buffer = memoryview(bytearray(1 << 20))
        while len(seen) < len(data):
            n, got = received(b, buffer)
            seen += buffer[:n]
            fds += got
        sender.join()
        assert seen == data and len(fds) == 1
        sockets.close_fds([fd, *fds])
