"""YAML in and out: what is refused, and that writing and reading agree."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import document
from edge_runtime.errors import BundleError

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(
        ["yes", "no", "1e5", "1:30", "0x10", "- a", "a: b", "#", "~", "", "2024-01-01"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=20,
)
DOCUMENTS = st.dictionaries(TEXT, VALUES, max_size=6)


@settings(max_examples=250, deadline=None)
@given(DOCUMENTS)
def test_what_is_written_reads_back_equal(values):
    data = document.dump(values)
    assert document.load(data, "x") == values
    assert document.dump(document.load(data, "x")) == data


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS)
def test_the_pure_python_parser_reads_the_same(values):
    data = document.dump(values)
    fast, document._LOADER = document._LOADER, yaml.SafeLoader
    try:
        assert document.load(data, "x") == values
    finally:
        document._LOADER = fast


def test_json_is_a_part_of_the_language():
    assert document.load(b'{"a": [1, -2.5e3, true, null, "\\u00e9\\n"], "b": {}}', "x") == {
        "a": [1, -2500.0, True, None, "é\n"],
        "b": {},
    }


def test_words_of_yaml_1_1_are_text_and_are_written_in_quotes():
    assert document.load(b"a: no\nb: on\nc: 12:30\nd: 2024-01-01", "x") == {
        "a": "no",
        "b": "on",
        "c": "12:30",
        "d": "2024-01-01",
    }
    assert document.dump({"a": "no"}) == b'a: "no"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: &x 1", "anchor"),
        (b"a: *x", "alias"),
        (b"a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        (b"a:\n  b:\n    - c: 1\n      c: 2", "line 4: a.b[0]: the key 'c' is there twice"),
        (b"- 1", "mapping"),
        (b"", "mapping"),
        (b"just text", "mapping"),
        (b"a: [1, 2", "line"),
        (b"a: .nan", "not a finite number"),
        (b"a: -.inf", "not a finite number"),
        (b"a: 1e999", "too large"),
        (b"a: 18446744073709551616", "does not fit 64 bits"),
        (b"a: -9223372036854775809", "does not fit 64 bits"),
        (b"a: " + b"9" * 10000, "does not fit 64 bits"),
        (b"a: !!python/object/apply:os.system [id]", "tag"),
        (b"a: !!binary aGk=", "tag"),
        (b"1: 2", "1 is used as a key"),
        (b"null: 2", "None is used as a key"),
        (b"? [1]\n: 2", "a list or mapping is used as a key"),
        (b"a: 1\n---\nb: 1", "second document"),
        (b"\xff\xfea", "byte 0 is not UTF-8"),
        (b'a: "\\ud800"', "expected"),
        (b"a: \x00", "control characters"),
        (b"\ta: 1", "line 1"),
        (b"%YAML 3.0\n---\na: 1", "expected"),
        (b"a: " + b"[" * 40 + b"]" * 40, "nested too deeply"),
        (b"a: " + b"{a: " * 40, "nested too deeply"),
        (b"a: [" + b"1," * 200_001 + b"]", "too many values"),
        (b" " * (document.SIZE_BYTES_MAX + 1), "bytes of text"),
    ],
)
def test_what_is_outside_the_subset_is_refused_with_its_place(text, message):
    with pytest.raises(BundleError) as caught:
        document.load(text, "model.yaml")
    assert message in str(caught.value)
    assert caught.value.where.startswith("model.yaml")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * document.SIZE_BYTES_MAX,
        b"{" * document.SIZE_BYTES_MAX,
        b"- " * (document.SIZE_BYTES_MAX // 2),
        b"a: '" + b"x" * (document.SIZE_BYTES_MAX - 10),
        b"? " * (document.SIZE_BYTES_MAX // 2),
        b"a: " + b"[a," * 1_000_000,
        b"!" * document.SIZE_BYTES_MAX,
    ],
)
def test_the_largest_hostile_text_is_refused_quickly(text):
    begin = time.monotonic()
    with pytest.raises(BundleError):
        document.load(text, "x")
    assert time.monotonic() - begin < 5


def test_importing_the_readers_costs_no_numpy():
    code = "import sys; from edge_runtime.bundle import archive, describe, lint\n"
    code += "assert not {'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
