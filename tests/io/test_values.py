"""Values as JSON beside tensors: what comes back is what was written, in every bit and type."""

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.io.values import pack, unpack

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
KEYS = st.one_of(st.text(max_size=5), st.integers())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=20,
)


def through_json(value):
    tensors = {}
    text = json.dumps(pack(value, "here", tensors), allow_nan=False)
    return unpack(json.loads(text), tensors)


def same(a, b):
    """Equal, and of the same types all the way down; -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@given(value=VALUES)
def test_values_come_back_equal_and_of_the_same_types(value):
    assert same(through_json(value), value)


def test_what_json_has_no_words_for_comes_back():
    found = through_json({"a": math.nan, 3: -math.inf, "c": Counter([2, 2, 5])})
    assert math.isnan(found["a"]) and found[3] == -math.inf
    assert type(found["c"]) is Counter and found["c"] == Counter([2, 2, 5])


def test_tensors_stay_beside_the_json_under_names_of_their_places():
    tensors = {}
    value = {"w": {"step": torch.tensor(3.0), "maps": (torch.arange(3), None)}}
    packed = pack(value, "optimizer", tensors)
    assert sorted(tensors) == ["optimizer/w/maps/0", "optimizer/w/step"]
    left = dict(tensors)
    found = unpack(json.loads(json.dumps(packed)), left)
    assert not left  # each tensor is taken out, so that one that nothing names would stay
    assert found["w"]["step"] is value["w"]["step"]
    assert found["w"]["maps"][0] is value["w"]["maps"][0] and found["w"]["maps"][1] is None


@pytest.mark.parametrize(
    ("value", "where"),
    [({"f": [abs]}, "here/f/0 is a builtin"), ({"s": {1, 2}}, "here/s is a set"),
     ({(1, 2): 3}, "here has a tuple as a key"), (torch.Size([1]), "here is a Size")],
)  # fmt: skip
def test_other_values_are_refused_by_their_place(value, where):
    with pytest.raises(TypeError, match=where):
        pack(value, "here", {})


@pytest.mark.parametrize("value", [
    {1: torch.ones(1), "1": torch.zeros(1)}, {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}},
    {"a": [torch.ones(1)], "a/0": torch.zeros(1)},
], ids=["number and text", "slash", "index"])  # fmt: skip
def test_two_tensors_never_share_a_name(value):
    with pytest.raises(ValueError, match=r"here/.* would be the name of two tensors"):
        pack(value, "here", {})


@pytest.mark.parametrize("found", [
    {"dict": [["a", 1], ["a", 2]]}, {"counter": [[1, 1], [1, 2]]},
    [{"tensor": "t"}, {"tensor": "t"}],
], ids=str)  # fmt: skip
def test_what_comes_twice_is_refused(found):
    with pytest.raises(ValueError, match=r"twice|written here"):
        unpack(found, {"t": torch.ones(1)})


@pytest.mark.parametrize(
    "found",
    [{"dict": [[None, 1]]}, {"dict": [[True, 1]]}, {"dict": ["ab"]}, {"dict": [[1, 2, 3]]},
     {}, {"a": 1, "b": 2}, {"float": "1.0"}, {"tensor": "gone"}, {"dict": [[1]]}, {"dict": 3},
     {"tuple": {"a": 1}}, {"code": "x"}, {"dict": [[[1], 2]]}],
    ids=str,
)  # fmt: skip
def test_json_that_was_not_written_here_is_refused(found):
    with pytest.raises(ValueError, match=r"written here|no pair"):
        unpack(found, {})
