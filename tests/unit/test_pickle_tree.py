import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdagrow.formats.pickle_tree import Global, Made, PickleRefusedError, parse
from tests.growths import RANDOM

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)


@RANDOM
@given(value=PLAIN, protocol=st.sampled_from([3, 4, 5]))
def test_plain_data_is_what_pickle_makes_of_it(value: Any, protocol: int) -> None:
    assert repr(parse(pickle.dumps(value, protocol), ())) == repr(value)  # in which True is not 1, and 1.0 neither


def test_what_it_would_call_stays_a_word() -> None:
    found = parse(pickle.dumps(complex(1, 2)), {("builtins", "complex")})
    assert isinstance(found, Made)
    assert (found.function, found.args, found.state) == (Global("builtins", "complex"), (1.0, 2.0), None)
    with pytest.raises(PickleRefusedError, match=r"asks for 'builtins\.complex', which no such file needs"):
        parse(pickle.dumps(complex(1, 2)), ())


@pytest.mark.parametrize(
    "raw",
    [
        b"", b".", b"\x80\x04", b"\x80\x04N", b"NN.", b"(N.", b"K.", b"\x8c\x05abc.", b"h\x00.", b"t.", b"\x86.",
        b"}K\x01NK\x01Ns.", b"}(K\x01NK\x01Nu.", b"}(K\x01u.", b"}]Ns.", b"}N)s.", b"Na.", b"Nb.", b"NR.", b"N)R.",
        b"X\xff\xff\xff\x7fabc.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"I1\n.", b"P1\n.", b"\x82\x01.", b"0.",
        b"\x8f(N\x90.", b"K\x01K\x02\x93.", b"c\xff\n\n.",
    ],
)  # fmt: skip
def test_damaged_pickles_are_refused(raw: bytes) -> None:
    with pytest.raises(PickleRefusedError, match=r"^is damaged or holds more than plain data$"):
        parse(raw, ())


def test_a_large_memo_index_takes_no_memory() -> None:
    """The unpickler of older Pythons reserves a memo of that many entries: 34 GB."""
    assert parse(b"Nr\xff\xff\xff\xff.", ()) is None


def test_deep_nesting_neither_recurses_nor_becomes_a_key() -> None:
    deep = b")" + b"\x85" * 1_000_000
    assert isinstance(parse(deep + b".", ()), tuple)
    with pytest.raises(PickleRefusedError):
        parse(b"}" + deep + b"Ns.", ())
