"""Adapters trained by row in transformers models: checkpointing, prefixes, processes, compiled."""

import gc
import json
import socket

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import minipeft as mp
from benchmarks.models import enable_checkpointing
from minipeft.adapters.names import named
from minipeft.adapters.state import named_tensors

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))
ROWS = ["fr", "default", None, "fr"]
NAMES = ("default", "fr")
# float64: the same sums over matrices of other heights, in another order
EXACT = 1e-11


def llama(**changes):
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, attn_implementation="sdpa", **changes,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def randomize(model):
    for parameter in mp.adapter_parameters(model):
        with torch.no_grad():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().train()


def two_lora(dropout=0.0):
    model = llama()
    mp.inject_lora(model, ["q_proj", "v_proj", "embed_tokens", "down_proj"], 4, dropout=dropout)
    mp.inject_lora(model, ["q_proj", "up_proj"], 2, name="fr", dora=True, dropout=dropout)
    return randomize(model)


def two_prefixes():
    model = llama()
    mp.inject_lora(model, ["q_proj", "down_proj"], 4, name="fr")
    mp.attach_prefix(model, 5)
    mp.attach_prefix(model, 3, hidden=8, name="deep")
    return randomize(model)


def loss_of(model, ids):
    """The mean over the tokens of each text, summed over texts."""
    logits = model(input_ids=ids).logits[:, :-1]
    costs = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
    return costs.mean(1).sum()


def gradients(model, *losses):
    """By adapter and the parameter's name in the plain model."""
    model.zero_grad()
    for loss in losses:
        loss().backward()
    return {
        (name, key): p.grad for name in named(model)
        for key, p in named_tensors("test", model, name)[0].items() if p.grad is not None
    }  # fmt: skip


def found_alone(make, rows):
    """Each text by itself, with its adapters on; another model, of the same values."""
    model = make()

    def one(ids, row):
        def loss():
            if row is None:
                with mp.disable_adapters(model):
                    return loss_of(model, ids) + 0 * next(mp.adapter_parameters(model)).sum()
            mp.use_adapters(model, row)
            return loss_of(model, ids)

        return loss

    every = [one(IDS[i : i + 1], row) for i, row in enumerate(rows)]
    return gradients(model, *every)


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[k] - g).abs().max() / g.abs().max().clamp(min=1e-12))
               for k, g in expected.items())  # fmt: skip


def in_one_pass(make, rows, prepare=lambda model: None):
    model = make()
    prepare(model)
    mp.use_adapters(model, rows=rows)
    return gradients(model, lambda: loss_of(model, IDS))


def test_each_text_trains_its_own_adapter():
    assert worst(in_one_pass(two_lora, ROWS), found_alone(two_lora, ROWS)) <= EXACT


def test_each_text_trains_its_own_prefix_or_lora():
    rows = ["deep", "default", "fr", ["default", "fr"]]
    expected = found_alone(two_prefixes, rows)
    assert {name for name, _ in expected} == {"deep", "default", "fr"}
    # prefixes are made in float32, and other prefixes' columns are masked out of the softmax
    assert worst(in_one_pass(two_prefixes, rows), expected) <= 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [two_lora, two_prefixes])
def test_checkpointing(make, reentrant):
    rows = ROWS if make is two_lora else ["deep", "default", "fr", ["default", "fr"]]

    def checkpointed(model):
        enable_checkpointing(model, reentrant=reentrant)
        model.enable_input_require_grads()

    found = in_one_pass(make, rows, checkpointed)
    assert worst(found, in_one_pass(make, rows)) <= EXACT


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(reentrant):
    def make():
        return two_lora(dropout=0.3)

    def checkpointed(model):
        enable_checkpointing(model, reentrant=reentrant)
        model.enable_input_require_grads()

    expected = in_one_pass(make, ROWS)
    assert worst(in_one_pass(make, ROWS, checkpointed), expected) <= EXACT
    assert worst(expected, in_one_pass(two_lora, ROWS)) > 0.01


@pytest.mark.parametrize("reentrant", [True, False])
def test_rows_changed_between_forward_and_backward_are_refused(reentrant):
    model = two_lora()
    enable_checkpointing(model, reentrant=reentrant)
    model.enable_input_require_grads()

    def too_early():
        mp.use_adapters(model, rows=ROWS)
        loss = loss_of(model, IDS)
        mp.use_adapters(model, rows=ROWS[::-1])
        with pytest.raises(RuntimeError, match="rows were changed after a forward"):
            loss.backward()

    too_early()
    gc.collect()  # the traceback holds that loss
    for rows in (ROWS, ROWS[::-1]):  # after backward
        mp.use_adapters(model, rows=rows)
        loss_of(model, IDS).backward()


class Checkpointed(nn.Module):
    """Two layers, each with `fr` and `default`; a whole forward is computed again."""

    def __init__(self, reentrant, **options):
        super().__init__()
        self.body, self.reentrant = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), reentrant
        for name in ("default", "fr"):
            mp.inject_lora(self.body, ["0", "1"], 2, name=name, **options)
        randomize(self.body)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


PAIRS = ["default", "default", "fr", "fr"]


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("switch", ["fewer rows", "one row", "a name", "a name and rows"])
def test_no_switch_between_forward_and_backward_goes_unseen(switch, reentrant, options):
    """Layers are replaced then, or there are none."""
    model = Checkpointed(reentrant, **options).train()
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    switches = {
        "fewer rows": lambda: mp.use_adapters(model, rows=["fr", "default"]),
        "one row": lambda: mp.use_adapters(model, rows=["fr"]),
        "a name": lambda: mp.use_adapters(model, "fr"),
        "a name and rows": lambda: (
            mp.use_adapters(model, "fr"), mp.use_adapters(model, rows=PAIRS[::-1]),
        ),
    }  # fmt: skip

    def too_early():
        mp.use_adapters(model, rows=PAIRS)
        loss = model(x)[:2].square().sum()
        switches[switch]()
        with pytest.raises(RuntimeError, match="rows were changed after a forward"):
            loss.backward()

    too_early()
    gc.collect()  # the traceback holds that loss
    for _ in range(2):  # after it, both train as ever
        model.zero_grad()
        model(x).square().sum().backward()
        mp.use_adapters(model, ["default", "fr"])
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad is not None for p in mp.adapter_parameters(model))
        mp.use_adapters(model, rows=PAIRS)
    mp.use_adapters(model, "fr")
    with torch.no_grad():
        model.eval()(x)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("between", [PAIRS[::-1], ["fr", "default"], "fr"], ids=str)
def test_another_batch_may_be_looked_at_before_backward(between):
    """With other rows or names, in training mode, without gradients, and back."""
    model = Checkpointed(reentrant=False).train()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    mp.use_adapters(model, rows=PAIRS)
    expected = gradients(model, lambda: model(x)[:2].square().sum())
    loss = model(x)[:2].square().sum()
    if isinstance(between, str):
        mp.use_adapters(model, between)
    else:
        mp.use_adapters(model, rows=between)
    with torch.no_grad():
        model(x)
    mp.use_adapters(model, rows=PAIRS)
    found = gradients(model, lambda: loss)
    assert found
    assert worst(found, expected) == 0


def test_without_checkpointing_rows_change_before_backward():
    model = Checkpointed(reentrant=False).train()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    mp.use_adapters(model, rows=PAIRS)
    expected = gradients(model, lambda: model.body(x).square().sum())
    loss = model.body(x).square().sum()
    mp.use_adapters(model, "fr")
    assert worst(gradients(model, lambda: loss), expected) == 0


def test_two_forwards_before_one_backward():
    def twice(model, rows, others):
        mp.use_adapters(model, rows=rows)
        first = loss_of(model, IDS)
        mp.use_adapters(model, rows=others)
        return first + loss_of(model, IDS)

    model = two_lora()
    found = gradients(model, lambda: twice(model, ROWS, ROWS[::-1]))
    first, second = in_one_pass(two_lora, ROWS), in_one_pass(two_lora, ROWS[::-1])
    assert worst(found, {key: first[key] + second[key] for key in first}) <= EXACT
    enable_checkpointing(model, reentrant=False)
    again = gradients(model, lambda: twice(model, ROWS, ROWS))
    assert worst(again, {key: 2 * gradient for key, gradient in first.items()}) <= EXACT
    with pytest.raises(RuntimeError, match="rows were changed after a forward"):
        twice(model, ROWS, ROWS[::-1]).backward()


def test_a_forward_without_a_backward_is_forgotten():
    """Another batch that was only looked at, with other rows, then training goes on."""
    model = two_lora()
    enable_checkpointing(model, reentrant=False)
    mp.use_adapters(model, rows=ROWS[::-1])
    loss_of(model, IDS)
    mp.use_adapters(model, rows=ROWS)
    found = gradients(model, lambda: loss_of(model, IDS))
    assert worst(found, in_one_pass(two_lora, ROWS)) <= EXACT


def test_a_prefix_that_diverged_is_refused():
    """The keys of all prefixes are shared; a mask does not hide NaN from a softmax."""
    model = two_prefixes()
    rows = ["deep", "default", "fr", None]
    mp.use_adapters(model, rows=rows)
    before = model(input_ids=IDS).logits
    kept = {key: p.clone() for key, p in mp.adapter_state_dict(model, name="default").items()}
    with torch.no_grad():
        next(mp.adapter_parameters(model, name="default"))[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'default' is a prefix that holds NaN or Inf"):
        mp.use_adapters(model, rows=rows[::-1])
    mp.load_adapter_state_dict(model, kept, name="default")
    assert torch.equal(model(input_ids=IDS).logits, before)
    mp.use_adapters(model, rows=["deep", "fr", None, "deep"])


def test_a_balance_loss_over_all_rows_is_refused():
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=97, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    mp.inject_lora(model, ["q_proj"], 2)
    mp.inject_lora(model, ["q_proj"], 2, name="fr")
    with pytest.raises(ValueError, match=r"output_router_logits asks for a balance loss over all"):
        mp.use_adapters(model.train(), rows=["default", "fr"])
    model.config.output_router_logits = False
    mp.use_adapters(model, rows=["default", "fr"])
    model(input_ids=IDS[:2]).logits.sum().backward()


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_data_parallel_training_has_the_gradients_of_the_whole_batch(plain_python):
    """Every adapter in every rank's batch; 4-bit base, prefix too."""
    printed = plain_python(
        """
import json, os
import torch, torch.distributed as dist, torch.multiprocessing as mp_
from torch.nn.parallel import DistributedDataParallel
import minipeft as mp
from minipeft.adapters.state import named_tensors
from tests.gloo import leave
from tests.model.rows.test_training_models import IDS, llama, loss_of, randomize

ROWS = ["fr", "default", "poet"]

def make():
    model = llama()
    mp.quantize_model(model)
    mp.inject_lora(model, "all-linear", 4)
    mp.inject_lora(model, ["q_proj"], 2, name="fr", dora=True)
    mp.attach_prefix(model, 3, name="poet")
    model = randomize(model)
    mp.use_adapters(model, rows=ROWS)
    return model

def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = DistributedDataParallel(make())
    texts = torch.cat([IDS, IDS.flip(1)])[:6]
    for step in range(2):
        loss_of(model, texts[3 * rank:][:3]).backward()
    if rank == 0:
        whole = make()
        for step in range(2):
            for i in (0, 3):
                (loss_of(whole, texts[i:][:3]) / 2).backward()
        worst, count = 0.0, 0
        for name in ("default", "fr", "poet"):
            mine = named_tensors("", model.module, name)[0]
            for key, p in named_tensors("", whole, name)[0].items():
                if p.grad is None: continue
                count += 1
                off = (mine[key].grad - p.grad).abs().max()
                worst = max(worst, float(off / p.grad.abs().max()))
        print(json.dumps([count, worst]), flush=True)
    leave()

if __name__ == "__main__":
    mp_.spawn(work, (os.environ["FREE_PORT"],), nprocs=2)
""",
        FREE_PORT=_free_port(),
    )
    count, difference = json.loads(printed.strip().splitlines()[-1])
    assert count > 30
    assert difference <= 1e-6  # norms of DoRA and prefixes are float32


@pytest.mark.slow
def test_a_compiled_step_has_the_gradients_of_eager_code(plain_python, capsys):
    """Forward without a break; the same rows compile nothing again, others do once."""
    printed = plain_python(
        """
import json
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch._dynamo.backends.registry import lookup_backend
import minipeft as mp

graphs, aot = 0, lookup_backend("aot_eager")

def counting(graph, inputs):
    global graphs
    graphs += 1
    return aot(graph, inputs)

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 7))
    mp.quantize_model(model, head=())
    mp.inject_lora(model, ["0", "1", "3"], 4)
    mp.inject_lora(model, ["1"], 3, name="fr", dora=True)
    mp.inject_lora(model, ["1", "3"], 2, name="de")
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model.train()

model, x, counts, worst = make(), torch.arange(30).view(6, 5), {}, 0.0
compiled = torch.compile(model, backend=counting, fullgraph=True)
ROWS = ["fr", None, "default", "fr", ["default", "de"], "de"]
OTHERS = ["de", "de", "default", None, "fr", "fr"]

def step(what, rows=None):
    global worst
    if rows is not None:
        mp.use_adapters(model, rows=rows)
    before, results = graphs, []
    for f in (compiled, model):
        model.zero_grad()
        y = f(x)
        if y.requires_grad:
            y.square().mean((1, 2)).sum().backward()
        results.append([y] + [p.grad for p in mp.adapter_parameters(model)])
    for ours, expected in zip(*results):
        assert (ours is None) == (expected is None), what
        if expected is not None and expected.abs().max() > 0:
            worst = max(worst, float((ours - expected).abs().max() / expected.abs().max()))
    counts[what] = graphs - before

step("first", ROWS)
step("again")
with torch.no_grad():
    for p in mp.adapter_parameters(model):
        p.add_(0.1)
step("after a step of the optimiser")
step("other rows", OTHERS)
step("the first rows", ROWS)
with mp.disable_adapters(model):
    step("disabled")
step("enabled")
model.eval()
with torch.no_grad():
    served, expected = compiled(x), model(x)
worst = max(worst, float((served - expected).abs().max()))
model.train()
step("training again")
print(json.dumps([counts, worst]))
"""
    )
    counts, difference = json.loads(printed.strip().splitlines()[-1])
    with capsys.disabled():
        print(f"\ngraphs compiled in training by row: {counts}; against eager {difference:.1e}")
    assert difference <= 1e-5  # float32; other kernels
    assert counts.pop("first") == 1
    assert counts.pop("other rows") == 1
    assert counts.pop("disabled") <= 1
    assert set(counts.values()) == {0}
