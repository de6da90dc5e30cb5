"""The configuration: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import config, documents
from edge_runtime.errors import EdgeError, NotFoundError, UsageError


def load_text(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return config.load(path)


def refusal(tmp_path: Path, text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, text)
    assert str(tmp_path / "config.yaml") in caught.value.where
    return caught.value


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "workers:\n", "models:\nlimits:\n", "{}", "models: {}"]
)
def test_a_file_that_says_nothing_gives_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_text(tmp_path, text) == config.Config()


def test_no_file_gives_the_defaults() -> None:
    assert config.load(None) == config.Config() == config.parse(None, "nowhere")


def test_a_model_takes_what_it_does_not_say_from_workers(tmp_path: Path) -> None:
    loaded = load_text(
        tmp_path,
        """
workers: {nice: 5, restart: {window_s: 9}, access: {groups: [apps]}}
models:
  camera: {nice: 1, restart: {deaths_max: 2}}
  plain:
  own: {access: {users: [1000]}}
""",
    )
    camera = loaded.worker("camera")
    assert (camera.nice, camera.restart.window_s, camera.restart.deaths_max) == (1, 9.0, 2)
    assert loaded.worker("plain") == loaded.worker("not-named") == loaded.workers
    assert loaded.worker("own").access == config.AccessRule(users=(1000,))
    assert camera.access == config.AccessRule(groups=("apps",))


def test_a_written_rule_admits_only_whom_it_names(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "access: {infer: {groups: [cameras]}}")
    assert config.Config().access.infer.anyone
    assert not loaded.access.infer.anyone
    assert not loaded.access.control.anyone


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("65536", 65536), ("64 KiB", 65536), ("64KiB", 65536), ("2 MiB", 2 << 20), ("'4096'", 4096)],
)
def test_byte_sizes_may_be_written_with_their_unit(
    tmp_path: Path, text: str, size_bytes: int
) -> None:
    loaded = load_text(tmp_path, f"limits: {{region_bytes_max: {text}}}")
    assert loaded.limits.region_bytes_max == size_bytes


@pytest.mark.parametrize("text", ["64 MB", "1 TiB", "x", "1.5 MiB", "-1", "''", "9" * 40])
def test_a_byte_size_with_another_unit_is_refused(tmp_path: Path, text: str) -> None:
    refused = refusal(tmp_path, f"limits: {{region_bytes_max: {text}}}")
    assert refused.where.endswith(": limits.region_bytes_max")
    assert "bytes" in refused.expected


@pytest.mark.parametrize(
    ("text", "path", "nearest"),
    [
        ("wokers: {}", "wokers", "workers"),
        ("workers: {niec: 3}", "workers.niec", "nice"),
        ("models: {fashion-mnist: {niec: 3}}", "models.fashion-mnist.niec", "nice"),
        ("models: {a: {restart: {deaths_mx: 1}}}", "models.a.restart.deaths_mx", "deaths_max"),
        ("workers: {access: {usrs: []}}", "workers.access.usrs", "users"),
        ("log: {levels: info}", "log.levels", "level"),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest_match(
    tmp_path: Path, text: str, path: str, nearest: str
) -> None:
    refused = refusal(tmp_path, text)
    assert refused.where == f"{tmp_path / 'config.yaml'}: {path}"
    assert refused.remedy == f"did you mean '{nearest}'?"


def test_an_unknown_key_like_no_other_lists_what_there_is(tmp_path: Path) -> None:
    assert "probe_timeout_s" in refusal(tmp_path, "watchdog: {zzzzzz: 3}").expected


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("workers: {nice: 40}", "workers.nice", "an integer from 0 to 19"),
        ("workers: {nice: -1}", "workers.nice", "an integer from 0 to 19"),
        ("workers: {nice: x}", "workers.nice", "an integer from 0 to 19"),
        ("workers: {nice: true}", "workers.nice", "an integer from 0 to 19"),
        ("workers: {runners: foo}", "workers.runners", '"auto" or an integer from 0 to 64'),
        ("workers: {runners: -1}", "workers.runners", '"auto" or an integer from 0 to 64'),
        ("workers: {sandbox: 1}", "workers.sandbox", "true or false"),
        ("workers: {restart: }", "workers.restart", "a mapping of keys to values"),
        ("workers: {cpuset: 3}", "workers.cpuset", 'cores such as "0-1,3"'),
        ("models: {a: {cpuset: 3-1}}", "models.a.cpuset", "upwards"),
        ("models: {a: {nice: 99}}", "models.a.nice", "an integer from 0 to 19"),
        ("models: {a: 3}", "models.a", "a mapping"),
        ("models: {UPPER: {}}", "models.UPPER", "a model's name"),
        ("models: [a]", "models", "a mapping"),
        ("log: {level: loud}", "log.level", "debug, info, warning, error"),
        ("access: {infer_mode: 0666}", "access.infer_mode", "in quotes"),
        ("access: {infer: {users: [1, [x]]}}", "access.infer.users[1]", "an integer or text"),
        ("watchdog: {probe_timeout_s: .nan}", "watchdog.probe_timeout_s", "from 0.1 to 60 (s)"),
        ("watchdog: {probe_timeout_s: .inf}", "watchdog.probe_timeout_s", "from 0.1 to 60 (s)"),
        ("services: [1]", "services[0]", "text"),
        ("services: ['a:B']", "services", "no services"),
        ("workers: {restart: {backoff_initial_s: 31}}", "workers.restart.backoff_initial_s", "30"),
    ],
)
def test_a_wrong_value_names_its_path_and_what_was_expected(
    tmp_path: Path, text: str, path: str, expected: str
) -> None:
    refused = refusal(tmp_path, text)
    assert refused.where == f"{tmp_path / 'config.yaml'}: {path}"
    assert expected in refused.expected


@pytest.mark.parametrize("text", ["log: {}\nlog: {}", "workers: {nice: 1, nice: 2}"])
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    refused = refusal(tmp_path, text)
    assert "given twice" in refused.message
    assert " line " in refused.where


def test_a_rule_for_anyone_that_also_names_someone_is_refused(tmp_path: Path) -> None:
    refused = refusal(tmp_path, "models: {a: {access: {anyone: true, users: [camera]}}}")
    assert refused.where.endswith("models.a.access")


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "[" * 3000,
        "x: 2020-13-45",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "? [a]\n: b",
        "a: !!python/object/apply:os.getpid []",
        "\x00",
        "a: &a [*a]",
        "&a workers: *a",
        "workers: &a {restart: *a}",
        "1: 2",
        "limits: {1: 2}",
        "[1]",
        "just text",
        "a: *nothing",
        "<<: 3",
    ],
)
def test_what_is_no_configuration_is_refused_and_nothing_else(tmp_path: Path, text: str) -> None:
    refused = refusal(tmp_path, text)
    assert len(str(refused)) < 1000


@settings(deadline=None)  # the machine may be busy with other tests
@given(st.text(alphabet=st.sampled_from("abn:{}[]&*!<?-|>'\"\n\t #019.~%@,"), max_size=60))
def test_any_text_is_a_configuration_or_a_clear_refusal(text: str) -> None:
    try:
        config.parse(documents.parse(text.encode(), "fuzz"), "fuzz")
    except EdgeError as error:
        assert error.where.startswith("fuzz")


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["models", "workers", "nice", "restart", "access", "users", "byte_budget"]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)  # the machine may be busy with other tests
@given(_values)
def test_any_document_is_a_configuration_or_a_clear_refusal(document: object) -> None:
    try:
        config.parse(document, "fuzz")  # type: ignore[arg-type]
    except EdgeError as error:
        assert error.where.startswith("fuzz")


def test_a_missing_file_is_not_found_and_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        config.load(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        config.load(tmp_path)


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    refused = refusal(tmp_path, "#" * (config.FILE_BYTES_MAX + 1))
    assert "too large" in refused.message


def test_every_option_has_a_reason_and_every_number_a_unit() -> None:
    for row in config.describe(config.Config()):
        assert row.reason, row.path
        is_number = isinstance(row.value, int | float) and not isinstance(row.value, bool)
        assert row.unit or not is_number or row.path == "workers.nice", row.path


def test_every_default_is_within_its_own_bounds() -> None:
    """msgspec does not check defaults: write them all out and read them back."""
    import msgspec

    assert config.parse(msgspec.to_builtins(config.Config()), "defaults") == config.Config()


def test_describe_shows_of_a_model_only_what_differs_from_workers(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "workers: {nice: 5}\nmodels: {a: {nice: 7, cpuset: ''}}")
    changed = {row.path: (row.value, row.default) for row in config.describe(loaded)}
    assert changed["workers.nice"] == (5, 0)
    assert changed["models.a.nice"] == (7, 5)
    assert "models.a.cpuset" not in changed


def test_importing_config_costs_neither_numpy_nor_yaml() -> None:
    code = (
        "import sys, edge_runtime.config; print([m for m in ('numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_documented_options_are_those_of_the_code() -> None:
    from . import table

    assert table.documented() == table.table(), "run `python -m tests.config.table`"


def test_the_example_in_the_document_is_a_right_configuration(tmp_path: Path) -> None:
    from . import table

    example = table.DOCS.read_text().partition("```yaml\n")[2].partition("```")[0]
    loaded = load_text(tmp_path, example)
    assert loaded.worker("fashion-mnist").cpuset == "0-2"
    assert loaded.worker("fashion-mnist").memory_bytes_max == 256 << 20
    assert not loaded.access.infer.anyone
