"""A file of ours gives back what it was saved from: the same numbers, and the same training."""

import copy
import json

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import LoRALinear
from minipeft.io.files import encoded, read_all
from minipeft.layers import LoRAConv, LoRAFusedLinear
from minipeft.layers.fused import per_head
from minipeft.layers.mixture import LoRAExperts

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.qkv, self.up = nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)

    def forward(self, ids):
        x = self.up(self.qkv(self.emb(ids)))
        return self.conv(x.transpose(1, 2))


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


IDS = torch.tensor([[1, 3, 5, 2], [4, 4, 0, 6]])
SLICES = {"q": 4, "k": 4, "v": 4}


def fused(rank, alpha=None, *, slices=SLICES, dtype=torch.float32, **settings):
    def change(model):
        mp.inject(
            model, ["qkv"],
            lambda base: LoRAFusedLinear(base, rank, alpha, slices=slices, dtype=dtype, **settings),
        )  # fmt: skip

    return change


def lora(target, **settings):
    return lambda model: mp.inject_lora(model, target, **settings)


def started(target, **settings):
    """LoRA of any kind of layer that starts elsewhere than at zero."""

    def init(layer):
        with torch.no_grad():
            layer.lora_a.normal_(std=0.2)
            layer.lora_b.normal_(std=0.2)
        layer.subtract_start()

    return lora(target, init=init, **settings)


def partly_frozen(model):
    mp.inject_lora(model, ["qkv", "up"], rank=2)
    model.qkv.lora_a.requires_grad_(False)


def grouped(across):
    def change(model):
        mp.inject(model, ["conv"], lambda base: LoRAConv(base, 2, across_groups=across))
        if across:  # a start within the groups, from which training may leave
            with torch.no_grad():
                model.conv.lora_a[0, 4:], model.conv.lora_a[1, :4] = 0, 0

    return change


def mixed_scalings(model):
    mp.inject_lora(model, ["qkv"], rank=3, alpha=5, rank_stabilized=True)
    mp.inject(model, ["up"], lambda base: LoRALinear(base, 3, 7))


CASES = {
    "slices of one scaling": fused(2, {"q": 6, "k": 6, "v": 6}),
    "slices of other ranks and scalings": fused({"q": 2, "v": 3}, {"q": 7, "v": 11}),
    "slices here and there": fused(2, 0.3, slices=per_head(2, 2), rank_stabilized=True),
    "slices in bfloat16": fused(2, {"q": 3, "k": 7, "v": 6}, dtype=torch.bfloat16),
    "slices with dropout": fused(2, dropout=0.5),
    "PiSSA": lora(["qkv", "up"], rank=3, alpha=5, init=mp.starts.pissa()),
    "OLoRA, rank-stabilised": lora(
        ["qkv"], rank=3, alpha=5, init=mp.starts.olora(), rank_stabilized=True
    ),
    "PiSSA, DoRA": lora(["qkv"], rank=3, init=mp.starts.pissa(), dora=True),
    "start of an embedding": started(["emb"], rank=3, alpha=7),
    "start of a convolution in groups": started(["conv"], rank=4, alpha=7),
    "start beside a plain layer": lambda m: (
        lora(["qkv"], rank=3, init=mp.starts.pissa())(m),
        mp.inject(m, ["up"], lambda b: LoRALinear(b, 2)),
    ),
    "parameters that do not train": partly_frozen,
    "a convolution within its groups": grouped(across=False),
    "a convolution across its groups": grouped(across=True),
    "one layer rank-stabilised": mixed_scalings,
    "float64": lora(["qkv", "up"], rank=3, alpha=0.1, dtype=torch.float64),
    "bfloat16": lora(["qkv", "up"], rank=3, dtype=torch.bfloat16),
    "an alpha that is no whole number": lora(["qkv"], rank=7, alpha=0.1),
    "DoRA with dropout": lora(["qkv"], rank=3, dropout=0.25, dora=True),
    "modules whole": lambda m: (mp.inject_lora(m, ["qkv"], rank=3), mp.train_modules(m, ["up"])),
}  # fmt: skip


def step(model, optimizer):
    torch.manual_seed(7)  # dropout
    optimizer.zero_grad()
    model(IDS).square().sum().backward()
    optimizer.step()


def trained(change):
    model = plain().train()
    change(model)
    optimizer = torch.optim.SGD([p for p in mp.adapter_parameters(model) if p.requires_grad], 0.01)
    for _ in range(2):
        step(model, optimizer)
    return model


def described(model):
    return {
        name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_a_file_as_it_would_have_without_one(case, tmp_path):
    """All values are equal to the bit, so the same steps of training are too."""
    model, again = trained(CASES[case]), plain().train()
    mp.save_peft(model, tmp_path)
    mp.load_peft(again, tmp_path)
    assert described(again) == described(model)
    kinds = [[type(m) for m in net.modules()] for net in (model, again)]
    assert kinds[0] == kinds[1]
    for (name, mine), found in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, found), name
    assert torch.equal(again.eval()(IDS), model.eval()(IDS))
    optimizers = [
        torch.optim.AdamW([p for p in mp.adapter_parameters(net) if p.requires_grad], 0.01)
        for net in (model, again)
    ]
    for _ in range(3):
        for net, optimizer in zip((model, again), optimizers, strict=True):
            step(net.train(), optimizer)
    for (name, mine), found in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, found), name
    mp.save_peft(again, tmp_path / "again")
    mp.save_peft(model, tmp_path / "model")
    files = [tmp_path / folder for folder in ("again", "model")]
    assert (files[0] / CONFIG).read_bytes() == (files[1] / CONFIG).read_bytes()
    read = [read_all(folder / WEIGHTS) for folder in files]
    assert read[0][1] == read[1][1]  # the checksums of all tensors among it


def test_training_stays_inside_the_slices(tmp_path):
    model, again = trained(fused({"q": 2, "v": 2})), plain().train()
    mp.save_peft(model, tmp_path)
    mp.load_peft(again, tmp_path)
    optimizer = torch.optim.SGD(list(mp.adapter_parameters(again)), 0.1)
    for _ in range(3):
        step(again, optimizer)
    delta = again.qkv.delta()
    assert bool(delta[:4].any()) and bool(delta[8:].any()) and not bool(delta[4:8].any())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["slices of other ranks and scalings", "PiSSA",
                                  "slices of one scaling"])  # fmt: skip
def test_peft_reads_a_plain_lora_in_the_same_file(case, tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(CASES[case]).eval()
    mp.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain().eval(), tmp_path)
    assert theirs.base_model.model.qkv.lora_A["default"].weight.dtype == torch.float32
    # sums of other orders in float32
    torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_experts_keep_their_start_and_their_mode(tmp_path):
    transformers = pytest.importorskip("transformers")

    def mixtral():
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=20, num_local_experts=3, num_experts_per_tok=2,
        )  # fmt: skip
        model = transformers.MixtralForCausalLM(config).eval()
        model.set_experts_implementation("eager")
        return model

    model, again = mixtral(), mixtral()
    started(["q_proj", "gate_up_proj", "down_proj"], rank=2, alpha=3, dropout=0.5)(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            nn.init.normal_(parameter)
    mp.save_peft(model, tmp_path)
    mp.load_peft(again, tmp_path)
    assert sum(isinstance(m, LoRAExperts) for m in again.modules()) == 2
    assert described(again) == described(model)
    for mine, found in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, found)
    assert not any(m.training for m in again.modules())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_adapter_that_was_frozen_as_a_whole_loads_trainable(tmp_path):
    model = trained(CASES["bfloat16"]).requires_grad_(False)
    mp.save_peft(model, tmp_path)
    again = plain()
    mp.load_peft(again, tmp_path)
    assert all(p.requires_grad for p in mp.adapter_parameters(again))


def layers(change):
    def apply(metadata):
        found = json.loads(metadata["minipeft_training"])
        change(found["layers"])
        metadata["minipeft_training"] = json.dumps(found)

    return apply


def slices(change):
    return layers(lambda found: change(found["qkv"]["slices"]))


HOSTILE = {
    "no JSON": (lambda m: m.update(minipeft_training="{"), "JSON"),
    "no object": (lambda m: m.update(minipeft_training="[]"), "JSON object"),
    "layers are a list": (lambda m: m.update(minipeft_training='{"layers": []}'), "an object"),
    "a layer is a number": (layers(lambda x: x.update(qkv=3)), "expected some of"),
    "a word more": (layers(lambda x: x["qkv"].update(more=3)), "expected some of"),
    "a module that is not there": (layers(lambda x: x.update(no={"start": True})), "no layer of"),
    "a module without tensors": (layers(lambda x: x.update(up={"start": True})), "no layer of"),
    "start is a number": (layers(lambda x: x.update(qkv={"start": 1})), "start is 1"),
    "an odd start": (layers(lambda x: x.update(qkv={"start": True})), "odd"),
    "a dtype": (layers(lambda x: x["qkv"].update(dtype="int8")), "dtype is 'int8'"),
    "groups of a linear layer": (layers(lambda x: x.update(qkv={"across_groups": True})), "across"),
    "another scaling": (layers(lambda x: x.update(qkv={"scale": [1e9, False]})), "not the config"),
    "a scaling of zero": (layers(lambda x: x.update(qkv={"scale": [0.0, False]})), "alpha=0.0"),
    "a scaling of text": (layers(lambda x: x.update(qkv={"scale": ["a", False]})), "scale is"),
    "frozen is text": (layers(lambda x: x["qkv"].update(frozen="a")), "frozen is"),
    "frozen is nothing": (layers(lambda x: x["qkv"].update(frozen=["w"])), "is no parameter"),
    "frozen is the base": (layers(lambda x: x["qkv"].update(frozen=["base.weight"])), "parameter"),
    "both kinds": (layers(lambda x: x["qkv"].update(start=True)), "no such thing"),
    "a rank too many": (slices(lambda s: s[0].__setitem__(1, 3)), "the slices ask for"),
    "a rank below zero": (slices(lambda s: s[0].__setitem__(1, -1)), "slices is"),
    "a rank beyond memory": (slices(lambda s: s[0].__setitem__(1, 10**12)), "the slices ask for"),
    "ranks that add up": (
        slices(lambda s: [s[0].__setitem__(1, 1), s[2].__setitem__(1, 4)]), "not zero outside",
    ),
    "rows beyond memory": (slices(lambda s: s[0].__setitem__(3, [[0, 10**12]])), "do not cover"),
    "rows twice": (slices(lambda s: s[0].__setitem__(3, [[0, 2], [0, 2]])), "must cover each"),
    "rows that add up": (slices(lambda s: s[0].__setitem__(3, [[0, 9], [0, -5]])), "do not cover"),
    "rows of the others": (
        slices(lambda s: [s[0].__setitem__(3, [[4, 8]]), s[1].__setitem__(3, [[0, 4]])]),
        "not zero outside",
    ),
    "a name twice": (slices(lambda s: s[1].__setitem__(0, "q")), "do not cover"),
    "a name that is none": (slices(lambda s: s[0].__setitem__(0, "a.b")), "expected names"),
    "a scaling below zero": (slices(lambda s: s[0].__setitem__(2, -1.0)), "slices is"),
    "a scaling that is none": (slices(lambda s: s[0].__setitem__(2, float("nan"))), "slices is"),
    "a scaling beyond range": (slices(lambda s: s[0].__setitem__(2, 1e-300)), "NaN or Inf"),
    "a slice cut short": (slices(lambda s: s.__setitem__(0, ["q", 2])), "slices is"),
    "no rank at all": (slices(lambda s: [x.__setitem__(1, 0) for x in s]), "the slices ask for"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_does_not_fit_the_tensors_is_refused(case, tmp_path):
    change, message = HOSTILE[case]
    rank = {"q": 2, "v": 3}
    mp.save_peft(trained(fused(rank, {"q": 7, "v": 11})), tmp_path)
    tensors, metadata = read_all(tmp_path / WEIGHTS)
    own = {k: v for k, v in metadata.items() if k in ("minipeft_config", "minipeft_training")}
    change(own)
    (tmp_path / WEIGHTS).write_bytes(encoded(tensors, own))
    model = plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mp.load_peft(model, tmp_path)
    assert type(model.qkv) is nn.Linear
    assert model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())
