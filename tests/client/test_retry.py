"""When to try again, and what is said when there is no time left."""

from __future__ import annotations

from edge_runtime.client.retry import out_of_time, plain
from edge_runtime.errors import DeadlineError, OverloadedError


def test_an_attempt_that_gets_no_answer_names_what_failed_before_it():
    late = DeadlineError("no answer in time", where="infer.sock m")
    full = OverloadedError("queue full", remedy="slow down")
    assert out_of_time(late, None) is late
    told = out_of_time(late, full)
    assert "queue full" in told.message and told.remedy == "slow down"
    assert told.where == "infer.sock m"


def test_a_plain_error_says_the_same_and_holds_no_frame():
    try:
        raise OverloadedError("queue full", where="m", retry_after_s=0.5)
    except OverloadedError as error:
        copy = plain(error)
    assert copy.document() == OverloadedError("queue full", where="m", retry_after_s=0.5).document()
    assert copy.__traceback__ is None and isinstance(copy, OverloadedError)
