"""The packaged service in a real booted systemd: what the units promise, seen from outside.

One boot (machine.py) runs every step (inside/scenario.py); each test looks at what one step saw.
The unit files are those of packaging/, installed by its script; only WatchdogSec and RestartSec are
cut down, to wait less.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.root

Report = dict[str, Any]
DOUBLED = [0.0, 2.0, 4.0, 6.0]  # the model's answer to 0, 1, 2, 3
DYNAMIC_USERS = range(61184, 65520)  # systemd's range for DynamicUser=


def step(report: Report, name: str) -> Report:
    seen = dict(report[name])
    assert "failed" not in seen, seen["failed"]
    return seen


def test_after_boot_only_the_sockets_are_there(report: Report) -> None:
    seen = step(report, "boot")
    assert seen["service"] == "inactive"
    assert {name: mode for name, (mode, _, _) in seen["sockets"].items()} == {
        "control.sock": "srw-------",
        "infer.sock": "srw-rw----",
    }


def test_verify_is_silent_where_the_service_is_installed(report: Report) -> None:
    assert step(report, "boot")["verify"] == ""


def test_the_first_connection_starts_the_daemon(report: Report) -> None:
    seen = step(report, "activation")
    assert seen["answer"] is True
    assert (seen["ActiveState"], seen["SubState"], seen["Type"]) == ("active", "running", "notify")
    assert seen["NRestarts"] == "0"


def test_the_daemon_runs_as_a_dynamic_user(report: Report) -> None:
    assert step(report, "activation")["uid"] in DYNAMIC_USERS


def test_the_daemon_says_what_it_does(report: Report) -> None:
    assert step(report, "activation")["StatusText"]


def test_only_the_group_reaches_the_models_sockets(report: Report) -> None:
    assert step(report, "activation")["sockets"]["models"][0] == "drwxr-x---"


def test_an_installed_model_answers_an_application(report: Report) -> None:
    seen = step(report, "install")
    assert seen["answer"] == DOUBLED, seen["reply"]
    assert seen["own socket"] == DOUBLED


def test_the_worker_is_locked_in_beyond_the_service(report: Report) -> None:
    assert "landlock (ABI" in (ps := step(report, "install")["ps"]) and "seccomp (" in ps, ps


@pytest.mark.parametrize("who", ["stranger", "stranger, own socket", "application, control"])
def test_the_wrong_user_is_not_let_in(report: Report, who: str) -> None:
    assert "PermissionDeniedError" in str(step(report, "access")[who])


def test_a_restart_keeps_the_sockets_and_brings_the_model_back(report: Report) -> None:
    seen = step(report, "restart")
    assert seen["answer"] == DOUBLED and seen["same sockets"] is True
    assert (seen["Result"], seen["ActiveState"]) == ("success", "active")


def test_a_healthy_daemon_feeds_its_watchdog(report: Report) -> None:
    assert step(report, "restart")["WatchdogUSec"] == "2s"
    assert step(report, "healthy")["same process"] is True


@pytest.mark.parametrize(("name", "result"), [("stuck", "watchdog"), ("killed", "signal")])
def test_a_dead_or_stuck_daemon_comes_back_and_answers(
    report: Report, name: str, result: str
) -> None:
    seen = step(report, name)
    assert seen["result"] == [result]
    assert seen["answer"] == DOUBLED
    assert seen["survivors"] == []


def test_a_stuck_daemon_is_noticed_within_its_time(report: Report) -> None:
    # At least half of the 2 s have passed since the last report; SIGABRT, not SIGKILL, ends it.
    assert 0.8 < step(report, "stuck")["noticed_s"] < 2.0 + 3.0


FORBIDDEN = [
    "write /etc",
    "write /usr",
    "write /opt/edge-runtime",
    "write /var/lib",
    "write /run",
    "write /run/edge-runtime",
    "write /dev/shm",
    "write /root",
    "write /sys",
    "list /root",
    "list /home",
    "read /etc/shadow",
    "open an internet socket",
    "open a netlink socket",
    "signal init",
    "make memory executable",
    "be root",
    "change its root",
]


@pytest.mark.parametrize("attempt", FORBIDDEN)
def test_the_service_cannot(report: Report, attempt: str) -> None:
    assert step(report, "probe")[attempt] in ("EACCES", "EPERM", "EROFS", "EAFNOSUPPORT")


def test_the_service_can_do_all_else_that_was_tried(report: Report) -> None:
    seen = step(report, "probe")
    assert seen.pop("output") == "" and seen.pop("visible processes of others") == 0
    allowed = {attempt: outcome for attempt, outcome in seen.items() if attempt not in FORBIDDEN}
    assert len(allowed) > 8 and set(allowed.values()) == {"ok"}, allowed


def test_a_configuration_for_root_alone_is_read(report: Report) -> None:
    assert '"debug"' in step(report, "configuration")["shown"]


def test_a_mistake_in_the_configuration_is_in_the_journal(report: Report) -> None:
    assert any("levle" in text for text in step(report, "configuration")["messages"])


def test_the_service_recovers_by_itself_once_the_mistake_is_gone(report: Report) -> None:
    assert step(report, "configuration")["answer"] == DOUBLED


def test_a_stop_is_clean_and_leaves_only_the_sockets(report: Report) -> None:
    seen = step(report, "stop")
    assert (seen["Result"], seen["ActiveState"], seen["survivors"]) == ("success", "inactive", [])
    assert sorted(seen["sockets"]) == ["control.sock", "infer.sock"]
    assert seen["stop_s"] < 5.0  # of TimeoutStopSec=20


def test_the_next_connection_after_a_stop_starts_it_again(report: Report) -> None:
    assert step(report, "stop")["answer of the next connection"] == DOUBLED


def test_stopping_the_sockets_stops_all(report: Report) -> None:
    seen = step(report, "sockets_stopped")
    assert (seen["ActiveState"], seen["Result"], seen["left"]) == ("inactive", "success", [])


def entries(report: Report) -> list[dict[str, str]]:
    """The daemon's own events, as journald stored them."""
    return [each for each in step(report, "events")["entries"] if "EDGE_EVENT" in each]


def test_events_are_in_the_journal_with_their_fields(report: Report) -> None:
    found = entries(report)
    assert found
    for each in found:
        assert each["_SYSTEMD_UNIT"] == "edge-runtime.service"
        assert each["_TRANSPORT"] == "journal"  # the native protocol, not lines of stderr
        assert int(each["PRIORITY"]) in range(3, 8) and each["MESSAGE"]
        assert int(each["EDGE_MONOTONIC_NS"]) > 0


def test_events_of_the_model_name_it(report: Report) -> None:
    assert "tiny" in {each.get("EDGE_MODEL") for each in entries(report)}, json.dumps(
        sorted({each["EDGE_EVENT"] for each in entries(report)})
    )


def test_a_large_event_of_any_user_reaches_the_journal_whole(report: Report) -> None:
    assert step(report, "large_event") == {
        "dropped": 0,
        "message_size": 1_000_000,
        "EDGE_NOTE": "a\nb",
        "PRIORITY": "3",
        "_UID": "4141",
    }
