"""Codes that follow a move of whole blocks decode to the moved dense weights, in every bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft import NF4Linear
from minipeft.io.bitsandbytes.blocks import NotWholeBlocksError, moved
from minipeft.io.bitsandbytes.contents import decoded
from minipeft.io.bitsandbytes.weight import entries, state_of


def pieces(shapes, **settings):
    """Coded weights by name, and what they decode to."""
    made, dense = {}, {}
    for number, shape in enumerate(shapes):
        layer = NF4Linear.from_weight(torch.randn(shape), **settings)
        made[str(number)] = state_of("w", entries("w", layer))
        dense[str(number)] = layer.weight
    return made, dense


MOVES = {
    "stacked": lambda t: {"a": torch.stack(list(t.values()))},
    "one below the other": lambda t: {"a": torch.cat(list(t.values()))},
    "side by side": lambda t: {"a": torch.cat(list(t.values()), dim=-1)},
    "halves changed over": lambda t: {
        "a": torch.cat([t["0"].chunk(2)[1], t["1"].chunk(2)[0]]),
        "b": torch.cat([t["0"].chunk(2)[0], t["1"].chunk(2)[1]]),
    },
    "rows interleaved": lambda t: {"a": torch.stack([t["0"], t["1"]], 1).flatten(0, 1)},
}


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("double_quant", [True, False])
@given(rows=st.sampled_from([2, 4, 6]), row=st.sampled_from([64, 128, 192]), seed=st.integers(0, 9))
def test_moved_codes_decode_to_the_moved_weights(how, double_quant, rows, row, seed):
    torch.manual_seed(seed)
    coded, dense = pieces([(rows, row)] * 2, double_quant=double_quant)
    expected = MOVES[how](dense)
    for name, weight in moved(coded, MOVES[how]).items():
        assert weight[0].shape == tuple(expected[name].shape)
        assert torch.equal(decoded(weight), expected[name])


def test_rows_that_are_no_whole_blocks_move_with_their_weight():
    coded, dense = pieces([(4, 96)] * 3)  # 96: a block and a half
    made = moved(coded, MOVES["stacked"])["a"]
    assert torch.equal(decoded(made), MOVES["stacked"](dense)["a"])


REFUSED = {
    "turned": (lambda t: {"a": t["0"].T}, [(64, 64)]),
    "blocks cut": (lambda t: dict(zip("ab", t["0"].chunk(2, dim=1), strict=True)), [(4, 64)]),
    "a block lost": (lambda t: {"a": t["0"][:2]}, [(4, 64)]),
    "a block twice": (lambda t: {"a": torch.cat([t["0"], t["0"]])}, [(4, 64)]),
    "rows of parts of blocks": (MOVES["side by side"], [(4, 96), (4, 96)]),
    "an end of a part": (MOVES["one below the other"], [(3, 33), (3, 33)]),
    "columns reversed": (lambda t: {"a": t["0"].flip(-1)}, [(2, 128)]),
    "columns interleaved": (
        lambda t: {"a": t["0"].unflatten(-1, (2, -1)).mT.flatten(-2)},
        [(2, 128)],
    ),
    "numbers changed": (lambda t: {"a": t["0"] + 1}, [(2, 128)]),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_takes_blocks_apart_is_refused(how):
    move, shapes = REFUSED[how]
    coded, _ = pieces(shapes)
    with pytest.raises(NotWholeBlocksError):
        moved(coded, move)


def test_weights_of_other_blocks_or_dtypes_are_refused():
    one, _ = pieces([(4, 64)])
    for other in (pieces([(4, 64)], block_size=32)[0], pieces([(4, 64)])[0]):
        settings, state = other["0"]
        if settings.block_size == 64:
            settings = settings._replace(dtype=torch.bfloat16)
        with pytest.raises(NotWholeBlocksError, match="blocks of"):
            moved({"0": one["0"], "1": (settings, state)}, MOVES["stacked"])


def test_a_cut_at_a_fixed_column_shows_in_the_shape():
    """Such a move takes numbers for columns; whoever asks compares the shape with the model's."""
    coded, dense = pieces([(4, 128)])

    def move(t):
        return {"a": t["0"][:, :64], "b": t["0"][:, 64:]}

    assert moved(coded, move)["a"][0].shape != tuple(move(dense)["a"].shape)
