"""The serving worker and its candidate in this process: what is shown, passed on, taken back."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edge_runtime.clock import monotonic_ns
from edge_runtime.errors import RequestError
from edge_runtime.serving import channel, page, routing, splitting, trial
from edge_runtime.wire import messages, regions
from tests.serving.rig import (
    NAME,
    WIDTH,
    Answer,
    Client,
    NumpyModel,
    Rig,
    close_all,
    infer,
    memfd,
    open_descriptors,
    region_add,
    tensor,
)

RING_BYTES = 1 << 20
SEED = 7


class Beside:
    """Version 1 serves, version 2 is tried; every socket and page is real."""

    def __init__(self, candidate: NumpyModel, stable: NumpyModel | None = None, **options: Any):
        self.ring_bytes = options.pop("ring_bytes", RING_BYTES)
        self.stable = Rig(stable, **options)
        self.candidate = Rig(candidate, version=2)
        self.candidate.drain()
        self.candidate.told()
        fds = [page.create(), page.create()]
        self.words, self.seen = [page.words(fd) for fd in fds]
        ring = regions.create_region(self.ring_bytes)
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        near, far = socket.socketpair()
        channel.send(self.candidate.control, channel.Shadow(self.ring_bytes), [ring, bell, fds[1]])
        self.candidate.adopt(channel.Adopt(own=False), [far.fileno()])
        channel.send(
            self.stable.control,
            channel.Accompany(2, SEED, self.ring_bytes, 0.0, 0.0),
            [ring, bell, near.fileno(), fds[0]],
        )
        self.stable.settle()
        close_all([ring, bell, *fds])
        near.close()
        far.close()

    def share(self, shadow: float = 0.0, split: float = 0.0) -> None:
        self.stable.tell(channel.Shares(shadow, split))

    def settle(self) -> None:
        """Both have done what they can."""
        for _ in range(3):
            self.candidate.settle()
            self.stable.settle()

    def answers(self, client: Client) -> list[Answer]:
        found = client.answers()
        self.settle()
        return found + client.answers()

    def ask(self, client: Client, data: bytes, fds: Any = ()) -> Answer:
        client.send(data, fds)
        (answer,) = self.answers(client)
        return answer

    def compare(self) -> dict[str, Any]:
        """Everything in the ring has been looked at; the report."""
        for _ in range(500):
            self.candidate.settle()
            found = self.report()["shadow"]
            if not found["waiting"]:
                return found
        raise AssertionError(found)

    def report(self) -> dict[str, Any]:
        return trial.report(self.words, self.seen, ["y"])

    def kill_candidate(self) -> None:
        for owner in self.candidate.connections():
            self.candidate.worker._peers.close(owner)

    def close(self) -> None:
        for rig in (self.stable, self.candidate):
            rig.tell(channel.Alone())
            rig.tell(channel.Unshadow())
        self.kill_candidate()
        self.stable.settle()
        assert self.stable.worker._company.splitter is None
        self.stable.close()
        self.candidate.close()


@pytest.fixture
def beside() -> Iterator[Callable[..., Beside]]:
    """Makes pairs; at the end every slot is free and every descriptor closed."""
    made: list[Beside] = []
    before = len(open_descriptors())

    def make(*arguments: Any, **options: Any) -> Beside:
        made.append(Beside(*arguments, **options))
        return made[-1]

    yield make
    while made:
        made.pop().close()
    gc.collect()
    assert len(open_descriptors()) == before, open_descriptors()


def scaled(scale: float, offset: float = 1.0) -> NumpyModel:
    return NumpyModel(lambda inputs: {"y": inputs["x"] * np.float32(scale) + np.float32(offset)})


def version(answer: Answer) -> str:
    assert not answer.code, answer.header
    return messages.decode_infer_response(answer.header).model_version


# --- shadow ---------------------------------------------------------------------------------------


def test_an_agreeing_candidate_is_compared_with_every_answer(beside):
    both = beside(scaled(2.0))
    both.share(shadow=1.0)
    client = both.stable.client()
    for value in range(50):
        assert (client.ask(infer(float(value))).array() == 2 * value + 1).all()
    found = both.compare()
    assert (found["seen"], found["compared"], found["dropped"]) == (50, 50, 0)
    assert found["disagreed"] == found["errors"] == 0
    assert found["outputs"]["y"]["max_abs"] == 0
    assert found["outputs"]["y"]["cosine_min"] == pytest.approx(1)
    assert found["stable_run"]["count"] == found["candidate_run"]["count"] == 50


def test_a_disagreeing_candidate_is_found_out_in_numbers(beside):
    both = beside(scaled(-2.0, -1.0))
    both.share(shadow=1.0)
    client = both.stable.client()
    values = np.array([[1, 2, 3, 4]], np.float32)
    client.ask(infer(values))
    client.ask(infer(values * 10))
    found = both.compare()
    output = found["outputs"]["y"]
    assert found["disagreed"] == 2 and found["disagreement"] == 1.0
    assert output["top1_agreement"] == 0.0
    assert output["max_abs"] == 2 * (2 * 40 + 1)
    assert output["cosine_min"] == output["cosine_mean"] == pytest.approx(-1)
    assert output["outside_tolerance"] == 2


def test_a_share_shows_that_much_and_the_same_every_time(beside):
    counts = []
    for _ in range(2):
        both = beside(scaled(2.0))
        both.share(shadow=0.25)
        client = both.stable.client()
        for value in range(200):
            client.ask(infer(float(value)))
        counts.append(both.compare()["compared"])
    wanted = sum(routing.mix(n, SEED) < routing.limit_of(0.25) for n in range(1, 201))
    assert counts == [wanted, wanted] and 30 < wanted < 70


def test_nothing_is_shown_without_a_share_and_after_the_end(beside):
    both = beside(scaled(2.0))
    client = both.stable.client()
    client.ask(infer(1.0))
    assert both.compare()["sampled"] == 0
    both.share(shadow=1.0)
    client.ask(infer(1.0))
    both.stable.tell(channel.Alone())
    client.ask(infer(1.0))
    assert both.compare()["sampled"] == 1


def test_what_a_client_does_with_its_memory_after_the_answer_is_not_seen(beside):
    """The answer and the inputs are those of the run, also where they lay in shared memory."""
    both = beside(scaled(2.0))
    both.share(shadow=1.0)
    client = both.stable.client()
    fd = memfd(4096, fill=np.full((1, WIDTH), 3, np.float32))
    client.ask(region_add(0, 4096), [fd])
    x = tensor(
        "x", np.zeros((1, WIDTH), np.float32), shared_memory_region=0, shared_memory_byte_size=16
    )
    place = messages.TensorParameters(shared_memory_region=0, shared_memory_offset=2048)
    request = messages.InferRequest(NAME, (x,), "", (messages.RequestedOutput("y", place),))
    frame = messages.encode_frame(1, messages.encode_header(request), request_id=1)
    assert not client.ask(frame).code
    os.pwrite(fd, bytes(4096), 0)  # the client goes on
    os.close(fd)
    found = both.compare()
    assert (found["compared"], found["disagreed"], found["errors"]) == (1, 0, 0)
    assert found["outputs"]["y"]["max_abs"] == 0


def test_an_output_in_the_place_of_an_input_is_not_shown(beside):
    both = beside(scaled(2.0))
    both.share(shadow=1.0)
    client = both.stable.client()
    fd = memfd(4096, fill=np.full((1, WIDTH), 3, np.float32))
    client.ask(region_add(0, 4096), [fd])
    os.close(fd)
    x = tensor(
        "x", np.zeros((1, WIDTH), np.float32), shared_memory_region=0, shared_memory_byte_size=16
    )
    place = messages.TensorParameters(shared_memory_region=0)
    request = messages.InferRequest(NAME, (x,), "", (messages.RequestedOutput("y", place),))
    client.ask(messages.encode_frame(1, messages.encode_header(request), request_id=1))
    assert both.compare()["skipped"] == 1


def test_a_full_ring_drops_and_counts_and_the_client_notices_nothing(beside):
    both = beside(scaled(2.0), ring_bytes=4096)
    both.share(shadow=1.0)
    client = both.stable.client()
    for value in range(100):
        client.ask(infer(float(value)))
    found = both.report()["shadow"]
    assert found["dropped_full"] > 80 and found["compared"] == 0
    assert found["sampled"] == 100
    assert both.compare()["compared"] == 100 - found["dropped_full"]


def test_what_is_too_large_for_the_ring_is_dropped_and_counted(beside):
    both = beside(scaled(2.0), ring_bytes=4096)
    both.share(shadow=1.0)
    client = both.stable.client()
    client.ask(infer(np.zeros((200, WIDTH), np.float32)))
    assert both.report()["shadow"]["dropped_large"] == 1


def test_errors_of_the_candidate_are_counted_and_quoted(beside):
    def broken(inputs):
        if inputs["x"][0, 0] > 2:
            raise RequestError("three is too many")
        return {"y": inputs["x"] * np.float32(2) + np.float32(1)}

    both = beside(NumpyModel(broken))
    both.share(shadow=1.0)
    client = both.stable.client()
    for value in (1.0, 2.0, 3.0):
        assert not client.ask(infer(value)).code
    found = both.compare()
    assert (found["compared"], found["errors"]) == (2, 1)
    assert found["last_error"] == "three is too many"


def test_a_candidate_that_does_not_understand_the_request_says_so(beside):
    stable = NumpyModel()
    both = beside(scaled(2.0), stable)
    both.candidate.worker._company._shadow._planner._inputs.clear()  # it has other inputs
    both.share(shadow=1.0)
    both.stable.client().ask(infer(1.0))
    found = both.compare()
    assert found["errors"] == 1 and "unknown input" in found["last_error"]


def test_the_candidate_answers_its_clients_before_it_compares(beside):
    both = beside(scaled(2.0))
    client = both.candidate.client()
    both.share(shadow=1.0)
    shown = both.stable.client()
    for value in range(5):
        shown.ask(infer(100.0 + value))
    client.send(b"".join(infer(float(i), i, version="2") for i in range(5)))
    assert len(client.answers()) == 5
    both.compare()
    assert both.candidate.model.ran[:5] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(both.candidate.model.ran) == 10


def test_junk_in_the_ring_ends_the_comparison_not_the_candidate(beside):
    both = beside(scaled(2.0))
    both.share(shadow=1.0)
    client = both.stable.client()
    writer = both.stable.worker._company.mirror._writer
    client.ask(infer(1.0))
    writer._data[0:8] = b"\xff" * 8
    both.candidate.settle()
    assert both.candidate.worker._company._shadow is None
    assert version(both.candidate.client().ask(infer(1.0, version="2"))) == "2"


# --- split ----------------------------------------------------------------------------------------


def test_a_split_is_by_request_id_and_says_who_answered(beside):
    both = beside(scaled(-1.0))
    both.share(split=0.5)
    client = both.stable.client()
    limit = routing.limit_of(0.5)
    for number in range(1, 60):
        answer = both.ask(client, infer(float(number), number))
        candidate = routing.mix(number, SEED) < limit
        assert version(answer) == ("2" if candidate else "1")
        assert answer.request_id == number
        assert (answer.array() == (1 - number if candidate else 2 * number + 1)).all()
    found = both.report()["split"]
    assert found["chosen"] == found["answered"] > 15
    assert found["round_trip"]["count"] == found["answered"]


def test_a_routing_key_always_meets_the_same_version(beside):
    both = beside(scaled(-1.0))
    both.share(split=0.5)
    client = both.stable.client()
    by_key = {}
    for number in range(1, 80):
        key = f"camera-{number % 8}"
        values = np.ones((1, WIDTH), np.float32)
        request = messages.InferRequest(
            NAME, (tensor("x", values),), parameters=messages.RequestParameters(routing_key=key)
        )
        frame = messages.encode_frame(
            1, messages.encode_header(request), values.tobytes(), request_id=number
        )
        by_key.setdefault(key, set()).add(version(both.ask(client, frame)))
    assert all(len(versions) == 1 for versions in by_key.values())
    assert set.union(*by_key.values()) == {"1", "2"}


@pytest.mark.parametrize("wanted", ["1", "stable"])
def test_who_names_the_version_gets_it(beside, wanted):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    assert version(both.ask(client, infer(1.0, version=wanted))) == "1"
    assert version(both.ask(client, infer(1.0))) == "2"


def test_pipelined_requests_are_each_answered_once(beside):
    both = beside(scaled(-1.0))
    both.share(split=0.5)
    client = both.stable.client()
    client.send(b"".join(infer(float(n), n) for n in range(1, 31)))
    answers = both.answers(client)
    assert sorted(answer.request_id for answer in answers) == list(range(1, 31))
    assert {version(answer) for answer in answers} == {"1", "2"}


@pytest.mark.parametrize("rows", [600, 5000, 20_000])
def test_large_tensors_reach_the_candidate_in_shared_memory(beside, rows):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    rng = np.random.default_rng(rows)
    for _ in range(3):
        x = rng.normal(size=(rows, WIDTH)).astype(np.float32)
        answer = None
        client.send(infer(x))
        found = []
        for _ in range(200):
            found += both.answers(client)
            if found:
                break
        (answer,) = found
        assert version(answer) == "2"
        assert (answer.array() == -x + 1).all()
    (link,) = both.candidate.connections()
    assert len(link.regions) == (rows * WIDTH * 4 > splitting.INLINE_BYTES_MAX)


def test_outputs_go_where_the_client_wants_them(beside):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    fd = memfd(4096, fill=np.full((1, WIDTH), 3, np.float32))
    both.ask(client, region_add(0, 4096), [fd])
    x = tensor(
        "x", np.zeros((1, WIDTH), np.float32), shared_memory_region=0, shared_memory_byte_size=16
    )
    place = messages.TensorParameters(shared_memory_region=0, shared_memory_offset=2048)
    request = messages.InferRequest(NAME, (x,), "", (messages.RequestedOutput("y", place),))
    frame = messages.encode_frame(1, messages.encode_header(request), request_id=1)
    answer = both.ask(client, frame)
    response = messages.decode_infer_response(answer.header)
    assert response.model_version == "2" and answer.body == b""
    assert response.outputs[0].parameters.shared_memory_offset == 2048
    assert (np.frombuffer(os.pread(fd, 16, 2048), np.float32) == -2).all()
    os.close(fd)


def test_what_a_dead_candidate_had_is_answered_here(beside):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    client.send(b"".join(infer(float(n), n) for n in range(1, 11)))
    both.stable.settle()
    assert len(both.stable.worker._company.splitter.waiting) == 10
    both.kill_candidate()
    answers = client.answers()
    assert {version(answer) for answer in answers} == {"1"} and len(answers) == 10
    assert both.report()["split"]["lost"] == 10
    assert version(client.ask(infer(1.0))) == "1"


def test_a_request_that_the_candidate_refuses_is_answered_here(beside):
    def broken(_):
        raise RequestError("no")

    both = beside(NumpyModel(broken))
    both.share(split=1.0)
    client = both.stable.client()
    assert version(both.ask(client, infer(1.0))) == "1"
    assert both.report()["split"]["refused"] == 1


def test_a_slow_candidate_loses_its_requests_within_half_of_their_time(beside):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    began_ns = monotonic_ns()
    deadline_ns = began_ns + 1_000_000_000
    client.send(infer(1.0, 1, deadline_ns=deadline_ns))
    both.stable.settle()
    company = both.stable.worker._company
    assert 0 < company.wait_s(1.0) <= 0.5
    while company.splitter.waiting:
        company.turn(True)
    assert monotonic_ns() < deadline_ns - 100_000_000
    (answer,) = client.answers()
    assert version(answer) == "1"
    # It is behind: nothing more for it, until it has answered.
    assert version(client.ask(infer(1.0, 2))) == "1"
    assert both.report()["split"]["too_slow"] == both.report()["split"]["held"] == 1
    both.settle()
    assert version(both.ask(client, infer(1.0, 3))) == "2"
    assert both.answers(client) == []  # the late answer went nowhere


def test_a_client_that_leaves_costs_nothing(beside):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    client.send(infer(1.0, 1))
    both.stable.settle()
    client.close()
    both.stable.settle()
    both.settle()
    assert both.stable.worker._slots.used_bytes == 0


def test_connections_are_handed_over_when_their_requests_are_back(beside):
    both = beside(scaled(-1.0))
    both.share(split=1.0)
    client = both.stable.client()
    client.send(infer(1.0, 1))
    both.stable.settle()
    both.stable.tell(channel.Alone())
    assert both.stable.drain() == []  # it is still at the candidate
    both.candidate.settle()
    both.stable.settle()
    returned = both.stable.returned()
    assert len(returned) == 1
    for _, fds in returned:
        close_all(fds)
    (answer,) = client.answers()
    assert version(answer) == "2"


# --- labels ---------------------------------------------------------------------------------------


def test_labels_follow_what_a_worker_is(build_rig):
    rig = build_rig(version=3)
    client = rig.client()
    for name in ("", "3", "stable"):
        assert version(client.ask(infer(1.0, version=name))) == "3"
    rig.tell(channel.Drain("candidate"))
    (back,) = rig.returned()
    rig.adopt(channel.Adopt(own=False), back[1][:1])
    close_all(back[1])
    for name in ("3", "candidate"):
        assert version(client.ask(infer(1.0, version=name))) == "3"
    rig.tell(channel.Promote())
    for name in ("", "stable", "3"):
        assert version(client.ask(infer(1.0, version=name))) == "3"
    client.send(infer(1.0, version="candidate"))  # seen before, but it is none any more
    rig.settle()
    (back,) = rig.returned()
    close_all(back[1])


@pytest.fixture
def build_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
