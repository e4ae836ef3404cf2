import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman.guards.untrusted import DEPTH, DIGITS, UntrustedError, first_fault, parse_json, parse_suspect

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.booleans())
def test_what_others_write_well_is_what_python_reads(value, escaped):
    text = json.dumps(value, ensure_ascii=escaped)
    assert parse_json(text, "here") == json.loads(text)


FAULTS = {
    "deep": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply", ""),
    "deep and cut": ('[{"a": ' * 100_000, "nested too deeply", ""),
    "deeper than agreed": ('{"a": ' + "[" * DEPTH + "]" * DEPTH + "}", "nested too deeply", "a"),
    "half a pair": ('{"a": [1, {"b": "x \\ud83d y"}]}', "lone surrogate", "a[1].b"),
    "the other half": ('{"a": "\\uDE00"}', "lone surrogate", "a"),
    "half a pair in a key": ('{"a": {"\\ud83d": 1}}', "lone surrogate", "a.\ufffd"),
    "huge": ('{"a": {"n": ' + "9" * 5000 + "}}", "huge integer", "a.n"),
    "huge and negative": ("[-" + "9" * 5000 + "]", "huge integer", "[0]"),
    "twice": ('{"p": "a", "c": "good", "c": "bad"}', "repeated key", "c"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_has_a_name_and_a_place(name):
    text, reason, field = FAULTS[name]
    began = time.process_time()
    with pytest.raises(UntrustedError, match=r"^reply 3") as caught:
        parse_json(text, "reply 3")
    assert (caught.value.fault.reason, caught.value.fault.field) == (reason, field)
    assert time.process_time() - began < 1


def test_what_is_within_the_limits_passes():
    text = '{"a": ' + "[" * (DEPTH - 1) + "]" * (DEPTH - 1) + ', "b": "\\ud83d\\ude00", "n": ' + "9" * DIGITS + "}"
    assert parse_json(text, "here")["b"] == "\U0001f600"


def test_the_line_of_what_is_nested_too_deeply():
    with pytest.raises(UntrustedError, match="here, line 3: nested too deeply"):
        parse_json('[\n"' + "[" * 10_000 + '\\"",\n' + "[" * 100_000, "here")


def test_broken_text_is_a_decode_error():
    for text in ('{"a": ', "", "[1] [2]", "nope"):
        with pytest.raises(json.JSONDecodeError):
            parse_json(text, "here")


def test_a_fault_stays_in_its_own_part():
    parsed = parse_suspect('[{"a": 1}, {"a": "\\ud800"}]', "here")
    assert parsed.suspect
    assert [first_fault(part) is None for part in parsed.value] == [True, False]
