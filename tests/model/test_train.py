"""Biases, whole modules and single tokens that train beside LoRA."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minipeft as mp
from minipeft.layers.trained import TrainedBias, TrainedTokens
from minipeft.model.train import train_biases, train_modules, train_tokens


class Tagger(nn.Module):
    """An embedding, layers of several kinds, and a head that may share the embedding's weight."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.up = nn.Embedding(11, 8), nn.Linear(8, 12)
        self.norm, self.down = nn.LayerNorm(12), nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return self.head(self.down(self.norm(self.up(self.embed(ids)))))


IDS = torch.tensor([[1, 4, 9], [0, 9, 9]])


def randomise(model):
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter))


BIASED = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)), "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm of two axes": (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), (2, 3, 7)),
    "conv unbatched": (lambda: nn.Conv1d(3, 4, 2), (3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, groups=1), (2, 3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5)),
    "instance norm unbatched": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 5)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "NF4": (lambda: mp.NF4Linear.from_linear(nn.Linear(64, 4)), (3, 64)),
    "LoRA": (lambda: mp.LoRALinear(nn.Linear(5, 4), 2), (3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BIASED)
def test_a_trained_bias_is_a_bias_of_that_value(kind):
    make, shape = BIASED[kind]
    base, x = make().eval(), torch.randn(shape)
    layer = TrainedBias(base)
    plain = base(x)
    assert torch.equal(layer(x), plain)  # delta starts at zero
    with torch.no_grad():
        layer.bias_delta.normal_()
    module = layer.merged()
    torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=1e-5)  # float32, order of sums
    assert not torch.equal(layer(x), plain)
    layer(x).sum().backward()
    ones = torch.ones_like(plain).sum() / layer.bias_delta.numel()
    torch.testing.assert_close(layer.bias_delta.grad, torch.full_like(layer.bias_delta, ones))
    layer.merge()
    # a bias that is added is the same number: not a bit differs
    torch.testing.assert_close(layer.eval()(x), module(x), rtol=0, atol=0)
    layer.unmerge()
    layer.enabled = False
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("mode", ["lora_only", "all"])
def test_bias_modes_choose_what_pefts_do(mode):
    model = Tagger()
    mp.inject_lora(model, ["up", "down"], 2)
    names = train_biases(model, mode)
    assert names == (["up"] if mode == "lora_only" else ["up", "norm", "head"])
    with pytest.raises(ValueError, match="train already"):
        train_biases(model, mode)
    before = model(IDS)
    randomise(model)
    # any difference that allclose's own tolerances see
    assert not torch.allclose(model(IDS), before)
    with mp.disable_adapters(model):
        assert torch.equal(model(IDS), before)
    expected = model(IDS)
    mp.remove(model, merge=True)
    assert type(model.norm) is nn.LayerNorm and type(model.up) is nn.Linear
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)  # float32


def test_biases_inside_attention_are_named():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    names = train_biases(model, "all")
    assert set(names.left_out) == {"self_attn", "self_attn.out_proj"}
    assert "linear1" in names and "norm1" in names


def test_a_trained_module_is_a_copy_and_the_original_stays():
    model = Tagger()
    original, before = model.head, copy.deepcopy(model.head.state_dict())
    mp.inject_lora(model, ["up"], 2)
    assert train_modules(model, ["head"]) == ["head"]
    plain = model(IDS)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"up.lora_a", "up.lora_b", "head.copy.weight", "head.copy.bias"}
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=0.1)
    model(IDS).square().sum().backward()
    assert mp.check_gradients(model) == 4
    optimizer.step()
    # the same
    assert not torch.allclose(model(IDS), plain)
    with mp.disable_adapters(model):
        assert torch.equal(model(IDS), plain)
    assert all(torch.equal(original.state_dict()[n], v) for n, v in before.items())
    expected = model(IDS)
    model.eval()
    mp.merge(model)
    # float32: the product is rounded into the weight, measured 1e-7
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    mp.unmerge(model)
    again = copy.deepcopy(model)
    assert torch.equal(again(IDS), pickle.loads(pickle.dumps(model))(IDS))
    mp.remove(again, merge=True)
    # the same
    torch.testing.assert_close(again(IDS), expected, rtol=1e-5, atol=1e-5)
    mp.remove(model)
    assert model.head is original and torch.equal(model(IDS), plain)


def test_tied_modules_stay_tied_in_their_copies_and_one_alone_warns():
    model = Tagger(tied=True)
    train_modules(model, ["embed", "head"])
    assert model.embed.copy.weight is model.head.copy.weight
    with pytest.warns(UserWarning, match="tied embeddings"):
        train_modules(Tagger(tied=True), ["head"])


def test_modules_that_cannot_be_copied():
    model = Tagger()
    with pytest.raises(ValueError, match="no module"):
        train_modules(model, ["nothing"])
    with pytest.raises(ValueError, match="no parameters"):
        train_modules(nn.Sequential(nn.ReLU()), ["0"])
    quantised = nn.Sequential(nn.Linear(64, 64))
    mp.quantize_model(quantised)
    with pytest.raises(ValueError, match="codes"):
        train_modules(quantised, ["0"])
    mp.inject_lora(model, ["head"], 2)
    with pytest.raises(ValueError, match="adapter"):
        train_modules(model, ["head"])


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_rows_of_the_table_and_of_a_tied_head(tied):
    model = Tagger(tied)
    base, plain = model.embed.weight, model(IDS)
    names = train_tokens(model, [4, 9])
    assert names == (["embed", "head"] if tied else ["embed"])
    with mp.disable_adapters(model):
        assert torch.equal(model(IDS), plain)
    # the rows' logits have a product of their own: float32, sums of 8, measured 2e-7
    torch.testing.assert_close(model(IDS), plain, rtol=1e-6, atol=1e-6)
    if tied:
        others = [token for token in range(plain.shape[-1]) if token not in (4, 9)]
        assert torch.equal(model(IDS)[..., others], plain[..., others])
    randomise(model)
    rows = model.embed.token_rows
    table = base.detach().clone()
    table[[4, 9]] = rows.detach()
    x = F.embedding(IDS, table)
    expected = model.down(model.norm(model.up(x)))
    expected = F.linear(expected, table) if tied else model.head(expected)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)  # float32
    model(IDS).square().sum().backward()
    assert rows.grad.abs().sum(1).gt(0).all() and base.grad is None
    assert torch.equal(model.embed.weight, table)
    if tied:
        assert torch.equal(model.head.weight, table)
    model.eval()
    mp.merge(model)
    # float32: the product is rounded into the weight, measured 0
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    mp.unmerge(model)
    again = copy.deepcopy(model)
    if tied:
        assert again.head.tokens is again.embed
    assert torch.equal(again(IDS), model(IDS))
    mp.remove(model)
    assert torch.equal(model(IDS), plain)


def test_token_rows_of_a_table_that_scales_its_output():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    layer = TrainedTokens(Scaled(10, 4), [3])
    assert torch.equal(layer(torch.tensor([3, 4])), layer.base(torch.tensor([3, 4])))


@pytest.mark.parametrize("ids", [[], [1, 1], [-1], [11], [True], [1.0]])
def test_impossible_tokens(ids):
    model = Tagger()
    with pytest.raises((ValueError, TypeError), match=r"token|violates"):
        train_tokens(model, ids)
    assert type(model.embed) is nn.Embedding


def test_extras_of_one_adapter_among_several():
    model = Tagger()
    mp.inject_lora(model, ["up"], 2)
    mp.inject_lora(model, ["up", "down"], 2, name="fr")
    train_biases(model, "lora_only", name="fr")
    train_tokens(model, [1], name="fr")
    keys = set(mp.adapter_state_dict(model, name="fr"))
    assert {"embed.token_rows", "down.lora_a", "up.bias_delta"} <= keys
    assert set(mp.adapter_state_dict(model, name="default")) == {"up.lora_a", "up.lora_b"}


def test_what_cannot_be_scaled_leaves_all_strengths():
    model = Tagger()
    mp.inject_lora(model, ["up"], 2)
    train_tokens(model, [1])
    with pytest.raises(ValueError, match="cannot be scaled"):
        mp.scale_adapters(model, 0.5)
    assert model.up.scale == 1.0


def test_check_gradients_names_what_got_none_and_why():
    model = Tagger()
    mp.inject_lora(model, ["up", "down"], 2)
    with pytest.raises(ValueError, match=r"none of 4 .* after loss.backward"):
        mp.check_gradients(model)
    model.up.enabled = False
    model(IDS).sum().backward()
    assert mp.check_gradients(model) == 2  # what is off need not learn
    model.down.enabled = False
    with pytest.raises(ValueError, match="every adapter that trains is off"):
        mp.check_gradients(model)
    model.up.enabled = model.down.enabled = True
    with pytest.raises(ValueError, match=r"2 of 4 .* up.lora_a, up.lora_b .*not called"):
        mp.check_gradients(model)
    model.zero_grad()
    model(IDS).sum().backward()
    assert mp.check_gradients(model) == 4
    model.up.lora_a.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or Inf .*up.lora_a"):
        mp.check_gradients(model)
    for parameter in mp.adapter_parameters(model):
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no adapter parameter is trainable"):
        mp.check_gradients(model)


def test_check_gradients_knows_reentrant_checkpointing():
    class Checkpointed(nn.Module):
        gradient_checkpointing = True

        def __init__(self, use_reentrant):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
            self.use_reentrant = use_reentrant

        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            return self.outer(run(self.inner, x, use_reentrant=self.use_reentrant))

    for use_reentrant in (False, True):
        model = Checkpointed(use_reentrant)
        mp.inject_lora(model, ["inner", "outer"], 2)
        with warnings.catch_warnings():  # torch's own word for what check_gradients explains
            warnings.simplefilter("ignore")
            model(torch.randn(2, 4)).sum().backward()
        if use_reentrant:
            with pytest.raises(ValueError, match=r"inner.lora_a.*enable_input_require_grads"):
                mp.check_gradients(model)
        else:
            assert mp.check_gradients(model) == 4


@pytest.mark.parametrize("kind", ["bias", "module"])
def test_dora_over_a_trained_bias_computes_what_it_merges_to(kind):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    if kind == "bias":
        mp.inject_lora(model, ["0"], 2)
        train_biases(model)
    else:
        train_modules(model, ["0"])
    mp.inject_lora(model, ["0"], 2, dora=True, name="dora")
    randomise(model)
    expected = model(x)
    model.eval()
    mp.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)  # float32


def test_an_encoder_layer_reads_the_trained_bias_in_eval():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    mp.inject_lora(model, ["linear1", "linear2"], 2)
    train_biases(model)
    randomise(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model.train()(x)
        # float32, other kernels of torch: measured 6e-7
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_module_keeps_one_bias_under_both_names():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    mp.inject_lora(model, ["a"], 2)
    train_biases(model)
    assert model["a"] is model["b"]
    mp.remove(model, merge=True)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"]


def test_heads_follow_the_adapter_that_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.emb(ids)))

    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    before = model(ids)
    mp.inject_lora(model, ["emb"], 2)
    mp.inject_lora(model, ["emb"], 3, name="fr")
    with pytest.raises(ValueError, match="no adapter 'de'"):
        mp.tie_heads(model, name="de")
    mp.tie_heads(model, name="fr")
    assert model.head.embedding.rank == 3
    mp.tie_heads(model)
    assert model.head.embedding.rank == 2 and model.head.base.embedding.rank == 3
    with pytest.raises(ValueError, match="already"):
        mp.tie_heads(model)
    randomise(model)
    for names in ("fr", "default", ["default", "fr"]):
        mp.use_adapters(model, names)
        torch.testing.assert_close(model.head.weight, model.emb.weight)
    mp.remove(model, name="fr")
    mp.remove(model, name="default")
    assert torch.equal(model(ids), before)


def test_buffers_of_a_trained_module_are_saved(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8)})

    def run(model, x):
        return model["norm"](model["up"](x))

    model, x = make(), torch.randn(64, 8) * 5 + 3
    mp.inject_lora(model, ["up"], 2)
    train_modules(model, ["norm"])
    run(model.train(), x)
    model.eval()
    mp.save_peft(model, tmp_path)
    again = make()
    mp.load_peft(again, tmp_path)
    assert torch.equal(run(again.eval(), x), run(model, x))


def test_what_is_merged_or_serves_rows_takes_no_more(tmp_path):
    model = Tagger()
    mp.inject_lora(model, ["up"], 2)
    mp.save_peft(model, tmp_path)
    model.eval()
    mp.merge(model)
    with pytest.raises(ValueError, match="merged"):
        mp.load_peft(model, tmp_path, name="fr")
    mp.unmerge(model)
    mp.use_adapters(model, rows=["default", None])
    for change in (
        lambda: mp.load_peft(model, tmp_path, name="fr"), lambda: train_biases(model, "all")
    ):  # fmt: skip
        with pytest.raises(ValueError, match="rows of a batch"):
            change()


def test_one_of_two_tied_modules_can_be_folded():
    model = Tagger(tied=True)
    with pytest.warns(UserWarning, match="tied embeddings"):
        train_modules(model, ["head"])
    randomise(model)
    expected = model(IDS)
    mp.remove(model, merge=True)
    # float32: the product is rounded into the weight, measured 0
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


def test_tokens_of_a_table_without_values_are_refused():
    with torch.device("meta"):
        model = Tagger()
    with pytest.raises(ValueError, match="meta device"):
        train_tokens(model, [1])


def test_what_cannot_train_as_a_whole_says_which_it_is():
    model = Tagger()
    mp.inject_lora(model, ["up"], 2)
    with pytest.raises(ValueError, match=r"up has an adapter already \(LoRALinear\)"):
        train_modules(model, ["up"])
    model.experts = Tagger()
    model.experts.weight = nn.Parameter(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"experts\.weight is a parameter; name the module"):
        train_modules(model, ["weight"])


def test_no_bias_to_train_names_the_mode():
    model = Tagger()
    mp.inject_lora(model, ["down"], 2)  # it has no bias
    with pytest.raises(ValueError, match=r"mode='lora_only' finds no bias to train; mode='all'"):
        train_biases(model)
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match=r"mode='all' finds no bias to train$"):
        train_biases(bare, "all")
