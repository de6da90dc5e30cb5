"""Finding the command, global options, failures and exit codes; mostly in real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import cli, errors

from .conftest import Done, FakeDaemon, run_process

Edge = Callable[..., Done]
DOCS = Path(__file__).parents[2] / "docs" / "cli.md"

MISTAKES = [
    ((), "no command"),
    (("modles",), "did you mean 'models'?"),
    (("zzz",), "one of serve, install"),
    (("--jsn", "models"), "unrecognized"),
    (("models", "--run-dri", "x"), "unrecognized"),
    (("models", "--run", "x"), "unrecognized"),
    (("--run-dir",), "expected one argument"),
    (("models", "--timeout", "0"), "number of seconds"),
    (("models", "--timeout", "nan"), "number of seconds"),
    (("--timeout", "x", "models"), "number of seconds"),
    (("models", "extra"), "unrecognized"),
    (("activate", "fashion"), "NAME@VERSION"),
    (("activate", "fashion@x"), "NAME@VERSION"),
    (("activate", "@1"), "NAME@VERSION"),
    (("rollback",), "required: NAME"),
    (("config",), "required: show|check"),
    (("config", "shwo"), "invalid choice"),
    (("infer",), "required: NAME"),
    (("infer", "m", "--top", "0"), "at least 1"),
    (("infer", "m", "--repeat", "-1"), "at least 1"),
    (("infer", "m", "--npy", "a", "--image", "b"), "exclude each other"),
    (("infer", "m@x", "--image", "b"), "NAME@VERSION"),
    (("install",), "required: BUNDLE"),
    (("models", "\udcff"), "unrecognized"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_a_mistake_on_the_command_line_is_explained_with_exit_code_2(
    edge: Edge, words: tuple[str, ...], says: str
) -> None:
    done = edge(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("edge-runtime: error: ")
    assert says in done.err


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_with_json_the_same_mistake_is_an_error_document(
    edge: Edge, words: tuple[str, ...], says: str
) -> None:
    done = edge("--json", *words)
    assert done.code == 2
    assert done.err == ""
    error = json.loads(done.out)["error"]
    assert error["code"] == "invalid_config"
    assert says in " ".join(str(value) for value in error.values())


@settings(deadline=None)  # the machine may be busy with other tests
@given(
    st.lists(st.sampled_from([*cli.COMMANDS, "--json", "--timeout", "1", "--", "-x", "a@1", ""]))
)
def test_any_words_split_into_what_they_were(words: list[str]) -> None:
    before, name, after = cli.split(words)
    assert [*before, *([name] if name is not None else []), *after] == words
    assert name is None or not name.startswith("-")


def test_global_options_work_before_and_after_the_command(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["models"] = {"models": []}
    spellings: tuple[tuple[object, ...], ...] = (
        ("--json", "models"),
        ("models", "--json"),
        ("--run-dir", daemon.run_dir, "--timeout", 3, "models", "--json"),
        ("models", "--timeout=3", f"--run-dir={daemon.run_dir}", "--json"),
    )
    for words in spellings:
        done = edge(*words)
        assert (done.code, json.loads(done.out)) == (0, {"models": []}), words


def test_what_is_said_after_the_command_wins(edge: Edge, daemon: FakeDaemon) -> None:
    daemon.replies["models"] = {"models": []}
    assert edge("--run-dir", "/nowhere", "models", "--run-dir", daemon.run_dir).code == 0
    assert edge("--run-dir", daemon.run_dir, "models", "--run-dir", "/nowhere").code == 6


def test_without_a_daemon_a_command_is_unavailable_and_says_what_to_do(
    edge: Edge, run_dir: Path
) -> None:
    for command in ("models", "ps", "gc"):
        done = edge("--run-dir", run_dir, command)
        assert done.code == 6
        assert str(run_dir / "control.sock") in done.err


@pytest.mark.parametrize("code", sorted(errors.BY_CODE))
def test_the_daemons_error_keeps_its_code_and_becomes_its_exit_code(
    edge: Edge, daemon: FakeDaemon, code: str
) -> None:
    kind = errors.BY_CODE[code]
    daemon.replies["gc"] = kind("it broke", where="there", expected="better", remedy="mend it")
    done = edge("gc")
    assert done.code == kind.exit_code
    assert all(part in done.err for part in ("it broke", "there", "better", "mend it"))
    as_json = json.loads(edge("gc", "--json").out)["error"]
    assert (as_json["code"], as_json["message"]) == (kind.code, "it broke")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_and_a_help(edge: Edge, name: str) -> None:
    if importlib.util.find_spec(cli.COMMANDS[name].module) is None:
        pytest.skip(f"{cli.COMMANDS[name].module} is not there yet")
    done = edge(name, "--help")
    assert done.code == 0
    assert f"edge-runtime {name}" in done.out


def test_help_lists_every_command(edge: Edge) -> None:
    for flag in ("--help", "-h"):
        done = edge(flag)
        assert done.code == 0
        assert all(f"  {name} " in done.out for name in cli.COMMANDS)


def test_the_version_is_the_packages(edge: Edge) -> None:
    import edge_runtime

    assert edge("--version").out == f"edge-runtime {edge_runtime.__version__}\n"
    assert edge_runtime.__version__ in edge("version").out
    assert json.loads(edge("version", "--json").out)["version"] == edge_runtime.__version__


def test_an_unexpected_exception_is_one_line_and_a_request_to_report_it(
    edge: Edge, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.replies["models"] = {"models": 3}  # not what a daemon says
    done = edge("models")
    assert done.code == 1
    assert "Traceback" not in done.err and "please report" in done.err
    monkeypatch.setenv("EDGE_RUNTIME_DEBUG", "1")
    with pytest.raises(TypeError):
        edge("models")


def test_a_missing_library_names_the_extra_that_brings_it(daemon: FakeDaemon) -> None:
    """In a process in which numpy cannot be imported."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from edge_runtime.cli import main; sys.exit(main(['infer', 'm', '--npy', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'edge-runtime[numpy]'" in done.stderr


# --- processes ----------------------------------------------------------------------------------


def test_exit_codes_reach_the_shell(daemon: FakeDaemon) -> None:
    daemon.replies["models"] = {"models": []}
    daemon.replies["gc"] = errors.StorageError("the disk is full")
    for words, code in ((("models",), 0), (("gc",), 9), (("nope",), 2), (("rollback", "x"), 3)):
        done = run_process(*words)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_the_command_quietly(daemon: FakeDaemon) -> None:
    daemon.replies["why"] = {
        "name": "m",
        "state": "ready",
        "history": [{"wall_s": 1.0, "message": "x" * 100}] * 5000,
    }
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run_process("why", "m", stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (cli.EXIT_BROKEN_PIPE, "")


def test_a_terminal_without_utf8_gets_escapes_and_no_exception() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run_process("modl\u00e9s", env=environment)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "did you mean 'models'" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_a_storage_error(daemon: FakeDaemon) -> None:
    daemon.replies["models"] = {"models": []}
    with Path("/dev/full").open("w") as full:
        done = run_process("models", stdout=full)
    assert done.returncode == 9
    assert "output cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_control_c_gives_130_and_no_traceback(run_dir: Path) -> None:
    from edge_runtime.wire import sockets

    with sockets.listen_unix(run_dir / "control.sock") as listener:
        listener.setblocking(True)
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_runtime", "--run-dir", run_dir, "models"],
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = listener.accept()  # it asks, and waits for an answer that does not come
        with connection:
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
    assert process.returncode == cli.EXIT_INTERRUPTED
    assert "Traceback" not in err


def test_commands_that_need_no_numpy_do_not_import_it(daemon: FakeDaemon) -> None:
    daemon.replies["models"] = {"models": []}
    daemon.models["m"] = _ready_model()
    for words in (["models"], ["ready", "m"], ["version"], ["config", "show", "--defaults"]):
        code = (
            "import sys; from edge_runtime.cli import main\n"
            f"code = main({words!r})\n"
            "print(code, 'numpy' in sys.modules, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == "0 False", words


def _ready_model() -> Any:
    from .conftest import classifier

    return classifier([1, 1, 2, 2])


def test_the_version_starts_in_little_more_than_python_itself() -> None:
    """Best of several, against a bare interpreter in the same minute; ~2 ms of our own."""

    def best_s(*command: str) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    bare_s = best_s("-c", "pass")
    assert best_s("-m", "edge_runtime", "--version") - bare_s < 0.06


# --- documents ----------------------------------------------------------------------------------


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \|([^|]*)\|", DOCS.read_text(), re.MULTILINE)
    documented = {int(code): set(re.findall(r"`(\w+)`", names)) for code, names in rows}
    expected: dict[int, set[str]] = {0: set(), 130: set(), 141: set()}
    for kind in errors.BY_CODE.values():
        expected.setdefault(kind.exit_code, set()).add(kind.code)
    assert documented == expected


def test_every_command_is_documented() -> None:
    text = DOCS.read_text()
    for name in cli.COMMANDS:
        assert f"`{name}" in text or f"edge-runtime {name}" in text, name
