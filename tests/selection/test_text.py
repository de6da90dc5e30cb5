"""The table of `why`: every variant with its numbers and its reason."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_runtime.cli import decision
from edge_runtime.store.decisions import Decision, Left, Tried

INT8 = Tried(
    variant="int8",
    backend="onnxruntime",
    verdict="chosen",
    reason="2 times less run time than fp32",
    backend_version="1.32.0",
    loaded=True,
    goldens=3,
    golden_deviation=0.46,
    run_ms_p50=0.08,
    run_ms_spread=0.001,
    private_bytes=7 << 20,
    placement=[{"device": "CPU"}],
)
FP32 = msgspec.structs.replace(INT8, variant="fp32", verdict="fit", reason="2 times the run time")
WRONG = Tried("u16", "openvino", "wrong", "1e3 x its tolerance away from golden 0")
MADE = Decision(
    "m",
    1,
    {},
    "latency",
    ("int8", "fp32"),
    (FP32, WRONG, INT8),
    reference="fp32",
    margin=0.1,
    rounds=11,
    took_s=1.5,
    decided_wall_s=1000.0,
)


def lines(made: Decision | None, serving: str = "int8") -> list[str]:
    reply: dict[str, Any] = {
        "decision": msgspec.to_builtins(made) if made else None,
        "model": {"active": {"variant": serving}},
    }
    return "\n".join(decision.text(reply, 1120.0, 200)).splitlines()


def test_best_first_with_every_number_and_the_reason_of_each() -> None:
    head, int8, fp32, wrong, how, *reasons = lines(MADE)
    assert head.split()[:4] == ["VARIANT", "VERDICT", "BACKEND", "DEVICE"]
    words = (
        "int8",
        "chosen",
        "onnxruntime 1.32.0",
        "CPU",
        "0.080 ms",
        "0.001",
        "7",
        "3 kept, 0.46",
    )
    assert all(word in int8 for word in words), int8
    assert fp32.startswith("fp32") and wrong.startswith("u16") and "refused" in wrong
    assert "11 rounds in 1.5 s" in how and "under 10% count as none" in how
    assert reasons[2] == "u16: 1e3 x its tolerance away from golden 0"


def test_a_variant_that_was_left_says_so_and_who_serves_instead_is_marked() -> None:
    made = msgspec.structs.replace(MADE, left=(Left("int8", "killed by SIGSEGV", "signal", 1.0),))
    _, int8, fp32, *_ = lines(made, serving="fp32")
    assert "left" in int8.split() and "serves" in fp32.split()
    assert "int8: killed by SIGSEGV" in lines(made)


def test_where_nothing_was_decided_nothing_is_said() -> None:
    assert lines(None) == []


def test_control_characters_of_a_bundle_do_not_reach_the_terminal() -> None:
    made = msgspec.structs.replace(
        MADE, tried=(msgspec.structs.replace(INT8, reason="\x1b[2Jgone"), FP32)
    )
    assert "\x1b" not in "\n".join(lines(made))
