"""4-bit checkpoints of transformers' families, in every direction, equal in every bit."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from tests.checkpoint_families import FAMILIES
from tests.checkpoint_trips import OWN, TRIPS

# one of each kind of name: equal, renamed, prefix moved, joined, computed, tied, Conv1D, buffers
FEW = ["GPT-NeoX", "GPT-2", "Mixtral", "Gemma 3", "ViT", "Marian", "Falcon-H1", "CLIP", "ESM"]
NOT_THEIRS = {  # trips that transformers with bitsandbytes cannot make
    ("Falcon", "bitsandbytes' file in"): "it leaves FalconLinear dense: no tensor is in 4 bits",
    ("Falcon", "ours into bitsandbytes"): "it has no 4-bit layer for FalconLinear",
    ("DINOv2, SwiGLU", "bitsandbytes' file in"): "it runs the codes of two weights together",
}


def check(family, trip, folder):
    if (family, trip) in NOT_THEIRS:
        assert trip not in OWN
        pytest.skip(NOT_THEIRS[family, trip])
    assert TRIPS[trip](family, folder) == 0


@pytest.mark.filterwarnings("ignore")  # transformers' and bitsandbytes' own
@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("family", FEW)
def test_a_checkpoint_comes_back_in_every_bit(tmp_path, family, trip):
    check(family, trip, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FEW)))
def test_a_checkpoint_of_every_family_comes_back_in_every_bit(tmp_path, family, trip):
    check(family, trip, tmp_path)


def test_the_table_has_40_families_of_each_direction():
    assert all(sum((f, trip) not in NOT_THEIRS for f in FAMILIES) >= 40 for trip in TRIPS)
