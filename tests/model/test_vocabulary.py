"""New rows behind a frozen table and its head: old bits, gradients, numbers, merging, refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.layers.trained import TrainedModule
from minipeft.layers.vocabulary import LongerHead, LongerTable

transformers = pytest.importorskip("transformers")
N, K = 50, 3
OLD = torch.tensor([[1, 7, 49, 3], [0, 22, 5, 5]])
NEW = torch.tensor([[1, 50, 49, 52], [51, 22, 5, 50]])
# float32, logits up to 1 through two layers in another order of sums; measured 2e-7
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}
TIED, FOUR_BIT = (
    pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"]),
    (pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "NF4"])),
)


def llama(tied=False, four_bit=False, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=N, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    if four_bit:
        table = mp.layers.NF4Embedding.from_embedding(model.model.embed_tokens)
        head = mp.NF4Linear.from_linear(model.lm_head)
        if tied:  # one set of codes
            head._parameters.update(table._parameters)
        model.model.embed_tokens, model.lm_head = table, head
    return model


def trained(model):
    """The model, with other numbers in all that trains."""
    with torch.no_grad():
        for parameter in mp.adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@TIED
@FOUR_BIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_old_logits_keep_every_bit(tied, four_bit, dtype):
    model = llama(tied, four_bit, dtype)
    before = logits(model, OLD)
    assert mp.extend_vocabulary(model, K) == ["model.embed_tokens", "lm_head"]
    after = logits(model, OLD)
    assert after.dtype == dtype and after.shape == (2, 4, N + K)
    assert torch.equal(after[..., :N], before)
    assert torch.equal(logits(trained(model), OLD)[..., :N], before)  # only the new rows trained
    assert all(p.dtype == torch.float32 for p in mp.adapter_parameters(model))
    new = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert new == {"new_rows"}
    assert mp.count_parameters(model).trainable == K * 64 * (1 if tied else 2)


@TIED
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_are_those_of_one_long_table_in_float64(tied, whole):
    model = llama(tied, dtype=torch.float64).train()
    mp.extend_vocabulary(model, K, whole_table=whole)
    trained(model)
    plain = llama(tied, dtype=torch.float64).train()
    long, short = nn.Embedding(N + K, 64), nn.Linear(64, N + K, bias=False)
    long.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    short.weight = long.weight if tied else nn.Parameter(model.lm_head.weight.detach())
    plain.model.embed_tokens, plain.lm_head, plain.config.vocab_size = long, short, N + K
    ours, theirs = model(NEW, labels=NEW).loss, plain(NEW, labels=NEW).loss
    ours.backward()
    theirs.backward()
    # float64, sums of 64 products: errors of 1e-15 times some hundred
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    pairs = [(model.model.embed_tokens, long)] + ([] if tied else [(model.lm_head, short)])
    for layer, table in pairs:
        torch.testing.assert_close(layer.new_rows.grad, table.weight.grad[N:], rtol=0, atol=1e-12)
        if whole:
            own = layer.base.copy.weight.grad
            torch.testing.assert_close(own, table.weight.grad[:N], rtol=0, atol=1e-12)


@TIED
@FOUR_BIT
@pytest.mark.parametrize("lora", ["before", "after"])
def test_loss_generation_copies_and_merging_with_lora(tied, four_bit, lora):
    model = llama(tied, four_bit)
    before = logits(model, OLD)
    if lora == "before":
        mp.inject_lora(model, ["q_proj", "down_proj"], 2)
    mp.extend_vocabulary(model, K, init="normal")
    if lora == "after":
        mp.inject_lora(model, ["q_proj", "down_proj"], 2)
    assert (model.config.vocab_size, model.vocab_size, model.model.vocab_size) == (N + K,) * 3
    model.train()(NEW, labels=NEW).loss.backward()
    parameters = list(mp.adapter_parameters(model))
    assert len(parameters) == 2 * 2 * 2 + (1 if tied else 2) and mp.check_gradients(model)
    trained(model).eval()
    expected = logits(model, NEW)
    text = model.generate(NEW, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 7)
    with mp.disable_adapters(model):
        off = logits(model, OLD)
        assert torch.equal(off[..., :N], before) and bool((off.softmax(-1)[..., N:] == 0).all())
        with pytest.raises(IndexError):
            model(NEW)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), NEW), expected)
    without = copy.deepcopy(model)
    mp.remove(without)
    assert torch.equal(logits(without, OLD), before)
    assert (without.config.vocab_size, without.vocab_size, model.config.vocab_size) == (N, N, N + K)
    mp.merge(model)
    torch.testing.assert_close(logits(model, NEW), expected, **ROUNDING)
    mp.unmerge(model)
    mp.remove(model, merge=True)
    torch.testing.assert_close(logits(model, NEW), expected, **ROUNDING)
    table, head = model.model.embed_tokens, model.lm_head
    assert type(table) is nn.Embedding and type(head) is nn.Linear
    assert (table.num_embeddings, head.out_features, model.config.vocab_size) == (N + K,) * 3
    assert (table.weight is head.weight) == tied
    mp.extend_vocabulary(model, 2)  # and once more
    assert logits(model, NEW).shape[-1] == N + K + 2


@TIED
def test_requantizing_keeps_four_bits_with_all_rows(tied):
    model = trained_rows = llama(tied, four_bit=True)
    mp.extend_vocabulary(model, K)
    trained(trained_rows)
    expected = logits(model, NEW)
    with pytest.warns(UserWarning, match="NF4 again"):
        mp.remove(model, merge=True, requantize=True)
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, mp.layers.NF4Embedding) and isinstance(head, mp.NF4Linear)
    assert (table.num_embeddings, head.out_features) == (N + K, N + K)
    # 4 bits in the new rows: 15 % of the largest logit is far above what was measured, 4 %
    assert (logits(model, NEW) - expected).abs().max() < 0.15 * expected.abs().max()


@TIED
def test_the_whole_table_trains_on_request_and_only_dense(tied):
    model = llama(tied)
    before = logits(model, OLD)
    mp.extend_vocabulary(model, K, whole_table=True)
    assert torch.equal(logits(model, OLD)[..., :N], before)
    trained(model)
    expected = logits(model, NEW)
    assert not torch.equal(logits(model, OLD)[..., :N], before)
    mp.remove(model, merge=True)
    torch.testing.assert_close(logits(model, NEW), expected, **ROUNDING)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with pytest.raises(ValueError, match="4-bit codes, which cannot train"):
        mp.extend_vocabulary(llama(tied, four_bit=True), K, whole_table=True)


@TIED
def test_where_the_rows_start(tied):
    table, head = llama().model.embed_tokens.weight.detach(), llama().lm_head.weight.detach()
    model = llama(tied)
    mp.extend_vocabulary(model, K)
    rows = model.model.embed_tokens.new_rows
    # a mean of 50 numbers of float32
    torch.testing.assert_close(rows, table.mean(0).expand(K, -1), rtol=0, atol=1e-7)
    if not tied:
        mean = head.mean(0).expand(K, -1)
        torch.testing.assert_close(model.lm_head.new_rows, mean, rtol=0, atol=1e-7)
    model = llama(tied)
    mp.extend_vocabulary(model, 4000, init="normal")
    rows = model.model.embed_tokens.new_rows
    # 4,000 draws: four standard errors, 4 / sqrt(4000) and 4 / sqrt(8000) of a deviation
    spread = table.std(0, correction=0)
    assert ((rows.mean(0) - table.mean(0)).abs() < 0.064 * spread).all()
    assert ((rows.std(0) / spread - 1).abs() < 0.064).all()
    given = torch.randn(K, 64)
    model = llama(tied)
    mp.extend_vocabulary(model, K, init=given)
    assert torch.equal(model.model.embed_tokens.new_rows, given)
    assert torch.equal(model.lm_head.rows(), given)
    if not tied:
        model = llama()
        mp.extend_vocabulary(model, K, init=(given, -given))
        assert torch.equal(model.lm_head.new_rows, -given)


class Plain(nn.Module):
    """A language model of plain torch, with a bias in its head and a number of its own."""

    def __init__(self, head=N, tied=False):
        super().__init__()
        self.n_vocab = N
        self.embed, self.mix = nn.Embedding(N, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, head, bias=not tied)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mix(self.embed(ids)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_names_its_modules(tied):
    torch.manual_seed(0)
    model = Plain(tied=tied)
    before = model(OLD)
    names = mp.extend_vocabulary(model, K, table=["embed"], head=["out"])
    assert names == ["embed", "out"] and model.n_vocab == N + K
    assert torch.equal(model(OLD)[..., :N], before)
    trained(model)
    expected = model(NEW)
    if not tied:  # the new logits have the mean of the biases
        bias = model.out.bias
        torch.testing.assert_close(bias[N:], bias[:N].mean().expand(K), rtol=0, atol=1e-7)
    mp.remove(model, merge=True)
    torch.testing.assert_close(model(NEW), expected, **ROUNDING)
    assert model.n_vocab == N + K and model.out.out_features == N + K


def test_a_model_without_a_head_and_a_table_that_scales():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * 3.0

    model = nn.Sequential(Scaled(N, 8), nn.Linear(8, 8))
    mp.extend_vocabulary(model, K, table=["0"], head=(), init=torch.ones(K, 8))
    assert torch.equal(model[0](torch.tensor([51])), torch.full((1, 8), 3.0))
    mp.remove(model, merge=True)
    assert torch.equal(model[0](torch.tensor([51])), torch.full((1, 8), 3.0))
    assert type(model[0]) is Scaled and model[0].num_embeddings == N + K


def shared_table():
    model = llama()
    model.other = nn.Embedding(N, 64)
    model.other.weight = model.model.embed_tokens.weight
    return model


def longer():
    model = llama()
    mp.extend_vocabulary(model, 1)
    return model


def lora_on_the_table():
    model = llama(True)
    mp.inject_lora(model, ["embed_tokens"], 2)
    return model


def merged():
    model = llama()
    mp.inject_lora(model, ["q_proj"], 2)
    mp.merge(model)
    return model


class Headless(Plain):
    def get_output_embeddings(self):
        return self.out


WRONG = {
    "no rows": (llama, {"rows": 0}, "rows=0.*only grows"),
    "a smaller vocabulary": (llama, {"rows": -4}, "rows=-4.*only grows"),
    "no number": (llama, {"rows": True}, "rows=True"),
    "no table": (Headless, {}, "no input embedding, only the head out; pass table="),
    "neither": (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "no input embedding; pass table="),
    "a head of another size": (
        lambda: Plain(head=N + 1), {"table": ["embed"], "head": ["out"]},
        "embed has 50 rows and the head out 51 outputs",
    ),
    "a head that is not named": (Plain, {"table": ["embed"]}, r"pass head=\['out'\], or head=\(\)"),
    "no embedding": (Plain, {"table": ["mix"], "head": ()}, "mix is a Linear, no embedding"),
    "two tables": (shared_table, {"table": r".*(embed_tokens|other)"}, "expected one module"),
    "a shared table": (shared_table, {}, "other shares its weight"),
    "longer already": (longer, {}, "1 new rows already"),
    "merged": (merged, {}, "is merged"),
    "another init": (llama, {"init": "zeros"}, "init='zeros'.*'mean', 'normal'"),
    "rows of another number": (llama, {"init": torch.ones(2, 64)}, r"\(2, 64\); expected \(3, dim"),
    "rows of another width": (llama, {"init": torch.ones(3, 8)}, r"expected \(rows, 64\)"),
    "rows of NaN": (llama, {"init": torch.full((3, 64), torch.nan)}, "no finite floats"),
    "two starts, one weight": (
        lambda: llama(True), {"init": (torch.ones(3, 64), torch.ones(3, 64))}, "are tied"
    ),
    "adapters under a whole table": (lora_on_the_table, {"whole_table": True}, "adapter already"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_leaves_the_model_as_it_was(case):
    make, settings, message = WRONG[case]
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    with pytest.raises(ValueError, match=message):
        mp.extend_vocabulary(model, **{"rows": K, **settings})
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert getattr(getattr(model, "config", None), "vocab_size", None) == size


def test_no_adapter_lies_over_new_rows():
    model = llama()
    mp.extend_vocabulary(model, K)
    for add in (
        lambda: mp.inject_lora(model, ["lm_head"], 2, name="other"),
        lambda: mp.inject_lora(model, ["embed_tokens"], 2, name="other"),
        lambda: mp.train_tokens(model, [3]),
    ):
        with pytest.raises(ValueError, match="lie over all other adapters"):
            add()
        assert type(model.lm_head) is LongerHead and type(model.model.embed_tokens) is LongerTable
    mp.inject_lora(model, ["q_proj"], 2, name="rows")
    with pytest.raises(ValueError, match="number of logits"):
        mp.use_adapters(model, rows=["default", "rows"])


def test_lora_below_new_rows_is_merged_with_them():
    model = llama()
    mp.inject_lora(model, ["embed_tokens", "lm_head"], 2)
    mp.extend_vocabulary(model, K)
    trained(model)
    expected = logits(model, NEW)
    mp.remove(model, merge=True)
    torch.testing.assert_close(logits(model, NEW), expected, **ROUNDING)
    model = trained(lora_on_the_table())  # the head does not follow the table
    mp.extend_vocabulary(model, K)
    with pytest.raises(ValueError, match="untie them first"):
        mp.remove(model, merge=True)
    mp.remove(model)
    mp.inject_lora(model, ["embed_tokens"], 2)
    mp.tie_heads(model)
    mp.extend_vocabulary(model, K)
    trained(model)
    expected = logits(model, NEW)
    mp.remove(model, merge=True)
    torch.testing.assert_close(logits(model, NEW), expected, **ROUNDING)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("first", ["rows", "prefix"])
def test_a_prefix_stands_beside_new_rows(first):
    model = llama()
    plain = logits(model, OLD)
    add = {
        "rows": lambda: mp.extend_vocabulary(model, K),
        "prefix": lambda: mp.attach_prefix(model, 4, name="prefix"),
    }
    for what in (first, *(set(add) - {first})):
        add[what]()
    trained(model)
    assert (model.config.vocab_size, model.vocab_size) == (N + K, N + K)
    text = model.generate(NEW, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert logits(model, NEW).shape[-1] == N + K and text.shape == (2, 6)
    mp.remove(model, name="default")  # the rows alone: the model has its own configuration by now
    assert (model.config.vocab_size, model.vocab_size) == (N, N)
    mp.remove(model)
    assert torch.equal(logits(model, OLD), plain)


def test_the_states_of_adapter_and_base():
    model, base = llama(), llama().state_dict()
    mp.extend_vocabulary(model, K)
    state = mp.adapter_state_dict(model)
    assert set(state) == {"model.embed_tokens.new_rows", "lm_head.new_rows"}
    assert mp.base_state_dict(model).keys() == base.keys()
    other = llama()
    mp.extend_vocabulary(other, K, init="normal")
    mp.load_adapter_state_dict(other, state)
    assert torch.equal(logits(other, NEW), logits(model, NEW))


def test_whole_tables_are_copies_below_the_new_rows():
    model = llama(True)
    mp.extend_vocabulary(model, K, whole_table=True)
    table, head = model.model.embed_tokens, model.lm_head
    assert type(table.base) is TrainedModule and table.base.copy.weight is head.base.copy.weight
    assert head.rows() is table.new_rows


@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_are_off_leave_no_nan_in_guidance(tied, dtype):
    """Differences of log-probabilities: those of the new logits are 0."""
    model, settings = llama(tied, dtype=dtype), {"max_new_tokens": 4, "guidance_scale": 1.5}
    settings |= {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(OLD, **settings)
    mp.extend_vocabulary(model, K)
    with mp.disable_adapters(model):
        assert torch.equal(model.generate(OLD, **settings), expected)
        found = logits(model, OLD).log_softmax(-1)
        assert not (found.exp() * (found - found)).isnan().any()


def test_a_second_table_of_as_many_rows_is_refused():
    """Gemma 3n has a table of its layers' inputs, into which new ids would reach too."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=N, vocab_size_per_layer_input=N, hidden_size=16, hidden_size_per_layer_input=8,
        intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_kv_shared_layers=0, layer_types=["full_attention"] * 2,
        altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    model = transformers.Gemma3nForCausalLM(config).eval()
    before = logits(model, OLD)
    with pytest.raises(ValueError, match="second table of 50 rows"):
        mp.extend_vocabulary(model, K)
    assert torch.equal(logits(model, OLD), before)
    assert (config.vocab_size, config.vocab_size_per_layer_input) == (N, N)


@pytest.mark.slow
def test_compiled_rows_and_logits_are_the_same_on_and_off(plain_python):
    out = plain_python(
        "import torch\n"
        "from torch import nn\n"
        "import minipeft as mp\n"
        "for tied in (False, True):\n"
        "    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=not tied))\n"
        "    if tied:\n"
        "        model[1].weight = model[0].weight\n"
        "    mp.extend_vocabulary(model, 3, table=['0'], head=['1'], init='normal')\n"
        "    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)\n"
        "    ids = torch.tensor([[1, 12, 9, 10]])\n"
        # float32, numbers around 1: a few ulps for another order of sums
        "    print((compiled(ids) - model(ids)).abs().max().item() <= 1e-6)\n"
        "    compiled(ids).square().sum().backward()\n"
        "    print(bool(model[0].new_rows.grad.abs().sum() > 0))\n"
        "    with mp.disable_adapters(model):\n"
        "        old = torch.tensor([[1, 9]])\n"
        "        made = compiled(old)\n"
        "        print(torch.equal(made[..., :10], model(old)[..., :10]))\n"
        "        print(bool((made.softmax(-1)[..., 10:] == 0).all()))\n"
    )
    assert out.split() == ["True"] * 8
