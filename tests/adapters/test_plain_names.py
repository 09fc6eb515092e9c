"""Names without what torch wraps around modules, and names of files in any spelling."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from minipeft.adapters.plain_names import PlainNames, Spellings, without_outer_wrappers


class Named(nn.Module):
    """A model of one's own with a part that is really called `module`."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


WRAPPED = {
    "plain": lambda m: m,
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "an average": torch.optim.swa_utils.AveragedModel,
    "twice": lambda m: nn.DataParallel(torch.compile(m)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_of_torch_are_in_no_plain_name(kind):
    model = Named()
    model.module[1] = checkpoint_wrapper(torch.compile(model.module[1]))
    outer = WRAPPED[kind](model)
    names = PlainNames(outer)
    found = {names.plain(name) for name, _ in outer.named_parameters() if name != "n_averaged"}
    assert found == {name for name, _ in Named().named_parameters()}


def test_a_wrapper_and_its_content_have_one_name_and_the_outermost_counts():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    found = PlainNames(model).by_plain(dict(model.named_modules()))
    assert found == {"": model, "0": model[0]}


@pytest.mark.parametrize(
    ("own", "spelled", "expected"),
    [
        (["up"], "up", "up"),
        (["up"], "_orig_mod.up", "up"),
        (["up"], "module._orig_mod.up", "up"),
        (["a.up"], "a._checkpoint_wrapped_module.up", "a.up"),
        (["a.up"], "_fsdp_wrapped_module.a._fsdp_wrapped_module.up", "a.up"),
        (["module.up"], "module.up", "module.up"),
        (["module.up", "up"], "module.up", "module.up"),
        (["module.up", "up"], "up", "up"),
        (["module.up"], "up", "module.up"),  # a wrapper that nobody here knows
        (["module.up"], "module.module.up", "module.up"),
        (["module.up", "module.module.up"], "up", None),  # of two, none is better
        (["up"], "down", None),
        ([""], "module", ""),
    ],
)
def test_the_spelling_that_exists_is_found(own, spelled, expected):
    assert Spellings(own).find(spelled) == expected


def test_outer_wrappers_go_where_the_prefix_follows():
    prefix = "base_model.model."
    assert without_outer_wrappers(f"module._orig_mod.{prefix}up", prefix) == f"{prefix}up"
    assert without_outer_wrappers("module.up", prefix) == "module.up"
    assert without_outer_wrappers(f"{prefix}module.up", prefix) == f"{prefix}module.up"
