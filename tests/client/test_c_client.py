"""The C client: builds with `cc` alone, does what it should, also under sanitizers."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.wire import messages
from tests.client.server import Server

SOURCES = Path(__file__).parents[2] / "examples" / "c"
X = np.arange(48, dtype=np.float32).reshape(3, 16)
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler (cc)")


def build(directory: Path, flags: list[str]) -> Path | None:
    program = directory / "classify"
    files = [str(SOURCES / "classify.c"), str(SOURCES / "edge_client.c")]
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = ["cc", *warnings, *flags, "-o", str(program), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode and flags == SANITIZERS and "cannot find" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def classify(request, tmp_path_factory) -> Path:
    flags = SANITIZERS if request.param == "sanitized" else ["-O2"]
    program = build(tmp_path_factory.mktemp("c"), flags)
    if program is None:
        pytest.skip("the compiler has no sanitizer libraries")
    return program


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "x.f32"
    path.write_bytes(X.tobytes())
    return path


def run(program: Path, path: str, image: Path, *more: str, model: str = "affine", shape="3,16"):
    command = [str(program), path, model, "x", "FP32", shape, str(image), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
    assert done.returncode >= 0, f"died of signal {-done.returncode}"
    return done


ANSWER = "y FP32 48 values\n47 95\n46 93\n45 91\n"


@pytest.mark.parametrize("more", [[], ["--region"]])
def test_the_three_largest_values_are_printed(classify, endpoint, image, more):
    done = run(classify, endpoint, image, *more)
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER, "")


def test_with_regions_no_tensor_travels_in_a_frame(classify, server, image):
    run(classify, server.path, image, "--region")
    assert [seen["body_size"] for seen in server.faults.seen] == [0, 0]
    place = server.faults.seen[1]["request"].outputs[0].parameters
    assert place.shared_memory_region == 0 and place.shared_memory_byte_size == 1 << 20


def test_a_routing_key_travels_with_each_request(classify, server, image):
    run(classify, server.path, image)
    done = run(classify, server.path, image, "--region", "--key", "camera-7")
    assert done.stdout == ANSWER
    keys = [seen["request"].parameters.routing_key for seen in server.faults.seen]
    assert keys == ["", "camera-7", "camera-7"]
    assert run(classify, server.path, image, "--key", "k" * 256).returncode == 0
    done = run(classify, server.path, image, "--key", "k" * 257)
    assert done.returncode == 1 and "257 characters" in done.stderr
    done = run(classify, server.path, image, "--key", 'a"b')
    assert done.returncode == 1 and "cannot be sent" in done.stderr


def test_a_refusal_names_code_and_reason(classify, endpoint, image):
    done = run(classify, endpoint, image, model="no-such")
    assert done.returncode == 1 and done.stderr.startswith("not_found: no model 'no-such'")
    done = run(classify, endpoint, image, shape="4,16")
    assert done.returncode == 1 and done.stderr.startswith("invalid_request: ")


def test_a_name_that_would_need_escapes_is_not_sent(classify, endpoint, image):
    done = run(classify, endpoint, image, model='a"b')
    assert done.returncode == 1 and "cannot be sent" in done.stderr


def test_nobody_listening_is_said(classify, tmp_path, image):
    done = run(classify, str(tmp_path / "none.sock"), image)
    assert done.returncode == 6 and "No such file" in done.stderr


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("close_before_answer", "closed the connection"),
        ("close_inside_answer", "closed the connection"),
        ("nonsense_bytes", "not a frame"),
        ("nonsense_header", "wrong output"),
        ("overloaded", "overloaded: queue full"),
    ],
)
def test_a_server_that_fails_is_told_apart(classify, server, image, fault, says):
    setattr(server.faults, fault, 1)
    done = run(classify, server.path, image)
    assert done.returncode == 1 and says in done.stderr, done.stderr


def test_answers_in_pieces_and_strays_are_handled(classify, server, image):
    server.faults.trickle = True
    server.faults.stray_frames = 1
    assert run(classify, server.path, image).stdout == ANSWER


def mutations(count: int) -> list[bytes]:
    rng = random.Random(20)
    tensor = messages.TensorHeader("y", "FP32", (3, 16), messages.TensorParameters(192))
    header = messages.encode_header(messages.InferResponse("affine", "7", (tensor,))).rstrip()
    found = []
    for _ in range(count):
        data = bytearray(header)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 20)]
            elif kind == 2:
                data[at:at] = rng.choice([b'"', b"\\", b"\\u00", b"[[[[", b"{", b"9" * 30, b"-1"])
            else:
                data[at:at] = data[at : at + 30]
            data = data or bytearray(b"{")
        found.append(bytes(data))
    return [*found, b"", b"[" * 3000, b'{"outputs":' + b'[{"a":' * 500, b'{"outputs":[{}]}']


def test_mutated_answers_never_break_the_client(tmp_path_factory, tmp_path, image):
    program = build(tmp_path_factory.mktemp("c"), SANITIZERS)
    if program is None:
        pytest.skip("the compiler has no sanitizer libraries")
    server = Server(tmp_path / "s")
    try:
        for header in mutations(60):
            server.faults.answer_header = header
            assert run(program, server.path, image).returncode in (0, 1)
    finally:
        server.close()
