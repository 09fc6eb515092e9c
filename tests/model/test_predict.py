"""predict_memory against real steps: what tensors hold, and what autograd saves on a CPU."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minipeft as mp
from minipeft.fast.panels import GPU_PANEL_BYTES, PANEL_BYTES
from minipeft.model.predict.attention import FusedAttention
from minipeft.model.predict.devices import Device
from minipeft.model.predict.live import Live
from minipeft.model.predict.prediction import MemoryPrediction
from minipeft.model.predict.step import BACKWARD, FORWARD, GRADIENTS, MODEL, MOMENTS, UPDATE
from tests.processes import run_together

transformers = pytest.importorskip("transformers")

METHODS = ["full", "lora", "dora", "qlora", "qdora", "prefix"]
BATCH, LENGTH, RANK, PREFIX = 2, 65, 4, 5
IDS = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 129


def config(**changed):
    sizes = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 129,
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    return transformers.LlamaConfig(**sizes | changed)


def real_model(method, checkpointing=False, **changed):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config(**changed)).train()
    if checkpointing:
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if method == "full":
        return model
    if method == "prefix":
        mp.attach_prefix(model, PREFIX, position="none")
    elif method.startswith("q"):
        mp.inject_qlora(model, "all-linear", RANK, dora=method == "qdora")
    else:
        mp.inject_lora(model, "all-linear", RANK, dora=method == "dora")
    return model


def predict(model, method, **changed):
    options = {"batch": BATCH, "length": LENGTH, "rank": RANK, "prefix_length": PREFIX}
    return mp.predict_memory(model, method, **options | changed)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def step_of(model, optimizer):
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def size(tensors):
    """Bytes of the storages of these tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@contextmanager
def saved() -> Iterator[list[torch.Tensor]]:
    """The tensors that autograd keeps for backward."""
    found: list[torch.Tensor] = []

    def pack(tensor):
        found.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("method", METHODS)
def test_what_tensors_hold_is_exact(method):
    model = real_model(method)
    optimizer = adamw(model)
    loss_of(model).backward()
    gradients = size([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    moments = size([t for own in optimizer.state.values() for t in own.values()])
    codes = [p for n, p in model.named_parameters() if n.endswith(".packed")]
    scales = [p for n, p in model.named_parameters() if ".absmax_" in n]
    adapters = [] if method == "full" else list(mp.adapter_parameters(model))
    everything = size([*model.parameters(), *model.buffers()])

    found = predict(config(), method)
    assert found.codes == size(codes)
    assert found.scales == size(scales)
    assert found.adapters == size(adapters)
    assert found.dense == everything - size([*codes, *scales, *adapters])
    assert found.gradients == gradients
    assert found.moments == moments
    assert found.held == everything + moments


@pytest.mark.parametrize("method", METHODS)
def test_kept_activations_are_what_autograd_saves_on_a_cpu(method):
    model = real_model(method)
    with saved() as tensors:
        loss = loss_of(model)
    own = {t.untyped_storage().data_ptr() for t in (IDS, *model.parameters(), *model.buffers())}
    kept = size([t for t in tensors if t.untyped_storage().data_ptr() not in own])
    found = predict(config(), method)
    # beside them: the loss, and what is not saved but alive, which is nothing here
    assert found.activations + found.logits_and_loss == kept + loss.nbytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_the_peak_is_that_of_a_real_step(method, checkpointing):
    """The profiler sees each allocation; operators have buffers inside that meta cannot show."""
    model = real_model(method, checkpointing)
    optimizer = adamw(model)
    for _ in range(2):
        step_of(model, optimizer)
    gc.collect()
    held = size([*model.parameters(), *model.buffers()])
    held += size([t for own in optimizer.state.values() for t in own.values()])
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step_of(model, optimizer)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    found = predict(config(), method, checkpointing=checkpointing)
    assert found.peak - found.kernels == pytest.approx(held + peak, rel=0.05)  # the bound


def test_checkpointing_keeps_less():
    plain, again = (predict(config(), "lora", checkpointing=on) for on in (False, True))
    # one state for each block and what is outside blocks; a block alone keeps more than ten
    assert again.activations < plain.activations / 3
    assert again.peak < plain.peak
    assert again.held == plain.held


@pytest.mark.slow
def test_a_real_model_is_predicted_as_its_config_and_stays_as_it_is():
    model = real_model("full")
    before = {n: (p.data_ptr(), p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    for method in METHODS:
        assert predict(model, method) == predict(config(), method)
    assert [type(m) for m in model.modules()] == kinds
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        place, trains, value = before[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (place, trains)
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_a_model_that_is_ready_is_predicted_as_it_is():
    model = real_model("qlora")
    assert predict(model, "as_it_is").peak == predict(config(), "qlora").peak
    assert all(p.grad is None for p in model.parameters())


PADDED = torch.ones_like(IDS)
PADDED[1, :7] = 0  # the second text is shorter


def kept_with_a_mask(model):
    """What autograd saves where a mask hides tokens."""
    with saved() as tensors:
        loss = model(input_ids=IDS, labels=IDS, attention_mask=PADDED, use_cache=False).loss
    given = (IDS, PADDED, *model.parameters(), *model.buffers())
    own = {t.untyped_storage().data_ptr() for t in given}
    return size([t for t in tensors if t.untyped_storage().data_ptr() not in own]) + loss.nbytes


def with_mask(model):
    ids, mask = IDS.to("meta"), PADDED.to("meta")
    return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss


def test_a_mask_that_hides_tokens_is_predicted():
    model = real_model("lora")
    measured = kept_with_a_mask(model)
    found = predict(config(), "lora", padded=True)
    assert found.activations + found.logits_and_loss == measured
    ready = mp.predict_memory(model, "as_it_is", forward=with_mask, padded=True)
    assert ready.activations + ready.logits_and_loss == measured
    # each of three layers keeps the mask as numbers
    plain = predict(config(), "lora")
    assert found.activations - plain.activations >= 3 * BATCH * LENGTH * LENGTH * 4
    hides_nothing = mp.predict_memory(model, "as_it_is", forward=with_mask)
    assert hides_nothing.activations == plain.activations


def test_a_model_with_a_prefix_is_predicted_and_stays_as_it_is():
    model = real_model("prefix")
    before, name = loss_of(model), model.config._attn_implementation
    measured = kept_with_a_mask(model)
    assert predict(model, "as_it_is") == replace(predict(config(), "prefix"), method="as_it_is")
    found = mp.predict_memory(model, "as_it_is", forward=with_mask, padded=True)
    assert found.activations + found.logits_and_loss == measured
    # a prefix has a mask in any case; of a model without values it is not known that it numbers
    # the tokens of each text on its own: cosines and sines of 16 numbers for each further text
    found = predict(config(), "prefix", padded=True)
    angles = (BATCH - 1) * LENGTH * 2 * 16 * 4
    assert found.activations + found.logits_and_loss + angles == measured
    with pytest.raises(RuntimeError, match="not on meta"):
        mp.predict_memory(model, "as_it_is", forward=fails)
    assert model.config._attn_implementation == name
    assert torch.equal(loss_of(model), before)


def fails(model):
    raise RuntimeError("not on meta")


def test_a_forward_makes_its_own_inputs():
    for beside in ({"batch": 1}, {"length": 2}, {"batch": 0, "length": 1}, {"chunked_loss": True}):
        with pytest.raises(ValueError, match=f"leave out {', '.join(beside)}, "):
            mp.predict_memory(config(), "lora", forward=loss_of, **beside)
    for missing in ({}, {"batch": 1}):
        with pytest.raises(ValueError, match="=None; expected a whole number"):
            mp.predict_memory(config(), "lora", **missing)

    def forward(m):
        ids = IDS.to("meta")
        return m(input_ids=ids, labels=ids, use_cache=False).loss

    found = mp.predict_memory(config(), "lora", rank=RANK, forward=forward)
    assert found.peak == predict(config(), "lora").peak
    assert "lora: a forward of its own" in str(found)


def test_one_memory_counts_once():
    """An expanded buffer is as small as it was; views of one storage are that storage."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("wide", torch.ones(64).expand(1000, 64))
            flat = torch.zeros(2 * 64)
            self.register_buffer("first", flat[:64])
            self.register_buffer("second", flat[64:])
            self.view = nn.Parameter(self.linear.weight.detach().view(-1)[:64], False)

        def forward(self, x):
            y = self.linear(x) * self.wide + self.first - self.second
            return (y * self.view).square().expand(3, 1000, 64).mean()

    model = Net()
    found = mp.predict_memory(
        model, "as_it_is", forward=lambda m: m(torch.empty(1000, 64, device="meta"))
    )
    assert found.dense == size([*model.parameters(), *model.buffers()])
    assert found.dense == 4 * (64 * 64 + 64 + 64 + 2 * 64)
    x = torch.zeros(1000, 64)
    with saved() as tensors:
        loss = model(x)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = size([t for t in tensors if t.untyped_storage().data_ptr() not in own])
    assert found.activations == kept + loss.nbytes


def test_a_module_of_ones_own_needs_a_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
            self.out = nn.Linear(64, 8)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.out(x)

    with pytest.raises(ValueError, match="pass forward="):
        predict(Net(), "lora")
    found = mp.predict_memory(
        Net(), "full", forward=lambda m: m(torch.empty(7, 64, device="meta")).square().mean()
    )
    weights = (3 * (64 * 64 + 64) + 64 * 8 + 8) * 4
    assert (found.dense, found.gradients) == (weights, weights)
    assert found.moments == 2 * weights + 4 * 8  # and a step count for each parameter
    # kept: the input, which this forward makes, three results of tanh, the last one for square(),
    # and the loss
    assert found.activations == (4 * 7 * 64 + 7 * 8 + 1) * 4


@pytest.mark.parametrize(("optimizer", "moments"), [("sgd", 0), ("adamw", 2)])
def test_optimisers_by_name_and_by_function(optimizer, moments):
    found = predict(config(), "lora", optimizer=optimizer)
    steps = 4 * len([n for n, _ in real_model("lora").named_parameters() if "lora_" in n])
    assert found.moments == moments * found.adapters + (steps if moments else 0)
    with_momentum = predict(
        config(), "lora", optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    )
    assert with_momentum.moments == found.adapters


def test_chunked_loss_takes_less_at_the_head():
    plain, chunked = (
        predict(config(vocab_size=4096), "lora", chunked_loss=on, length=513)
        for on in (False, True)
    )
    assert chunked.logits_and_loss < plain.logits_and_loss
    assert chunked.peak < plain.peak


@pytest.mark.parametrize("devices", [2, 3])
def test_fsdp2_divides_and_gathers_two_blocks(devices):
    one, many = (
        predict(config(), "qlora", **more)
        for more in ({}, {"world_size": devices, "sharding": "fsdp2"})
    )
    model = real_model("qlora")

    def rows(tensor):  # what the first device has: rows, rounded up
        return -(-tensor.shape[0] // devices) * (tensor.nbytes // tensor.shape[0])

    parameters = [p for p in model.parameters() if p.dim()]
    buffers = size(model.buffers())
    assert many.dense + many.codes + many.scales + many.adapters == buffers + sum(
        map(rows, parameters)
    )
    assert many.gradients == sum(rows(p) for p in parameters if p.requires_grad)
    block = size(model.model.layers[0].parameters())
    outside = size(p for n, p in model.named_parameters() if ".layers." not in n)
    assert many.gathered == 2 * block + outside
    assert many.activations == one.activations  # the batch is that of a device


@pytest.mark.slow
def test_fsdp2_needs_what_two_processes_need(tmp_path):
    """Full training: in backward a device holds whole gradients of two blocks."""
    from tests.model import fsdp2_memory  # needs transformers

    out = run_together("tests.model.fsdp2_memory", 2, tmp_path)
    held, growth = map(int, re.search(r"measured (\d+) (\d+)", out).groups())
    sizes = fsdp2_memory.SIZES
    found = mp.predict_memory(
        transformers.LlamaConfig(**sizes), "full", batch=fsdp2_memory.BATCH,
        length=fsdp2_memory.LENGTH, world_size=2, sharding="fsdp2",
    )  # fmt: skip
    # the optimiser counts steps in 4 bytes for each parameter, of which shards are no part
    assert found.held == pytest.approx(held, rel=1e-4)
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    block = 4 * (4 * hidden * hidden + 3 * hidden * wide + 2 * hidden)
    assert found.whole_gradients == 2 * block + 4 * (2 * sizes["vocab_size"] * hidden + hidden)
    # 5 %, as for one device
    assert found.peak == pytest.approx(held + growth, rel=0.05)


def test_fsdp2_cuts_what_the_update_needs():
    """The optimiser's update sees shards alone: nothing is gathered, no gradient is whole."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(4)])
    model.head = nn.Linear(64, 64, bias=False)
    one, two = Device(model, 1, None), Device(model, 2, "fsdp2")
    size = 64 * 64 * 4
    weights = {MODEL: 5 * size}
    states = {GRADIENTS: 5 * size, MOMENTS: 10 * size, UPDATE: size}
    assert one.bytes_of(UPDATE, weights | states) == 21 * size
    assert two.bytes_of(UPDATE, weights | states) == 21 * size / 2
    # forward: own half, two blocks and the head; backward: the gradients of two blocks, the head's
    assert two.bytes_of(FORWARD, weights | {MOMENTS: 10 * size}) == 2.5 * size + 3 * size + 5 * size
    first = weights | {GRADIENTS: size}
    assert two.bytes_of(BACKWARD, first) == 2.5 * size + 3 * size + size
    fourth = weights | {GRADIENTS: 4 * size}
    assert two.bytes_of(BACKWARD, fourth) == 2.5 * size + 3 * size + 3 * size + 0.5 * size


def test_ddp_adds_buckets():
    one, many = (
        predict(config(), "lora", **more) for more in ({}, {"world_size": 4, "sharding": "ddp"})
    )
    assert many.buckets == one.gradients == many.gradients
    assert many.peak == one.peak + many.buckets
    assert many.held == one.held


def test_kernels_count_on_the_device_that_is_asked_for():
    assert predict(config(), "lora").kernels == 0
    # a CPU decodes into one buffer: as much of it is used as the largest layer has, in float32
    assert predict(config(), "qlora").kernels == 64 * 192 * 4
    wide = config(hidden_size=768, intermediate_size=4096, num_hidden_layers=1, vocab_size=16)
    found = predict(wide, "qlora", length=1, batch=1)
    assert PANEL_BYTES - 4096 * 4 < found.kernels <= PANEL_BYTES < 768 * 4096 * 4
    # on a GPU a weight is decoded into a buffer for the moment of the product
    wide = config(hidden_size=512, intermediate_size=2048, vocab_size=16)
    gpu = predict(wide, "qlora", device="cuda", dtype=torch.bfloat16, length=1, batch=1)
    assert gpu.kernels == 0
    assert GPU_PANEL_BYTES > 512 * 2048 * 2
    assert gpu.largest_temporary == 512 * 2048 * 2


@pytest.mark.slow
def test_names_are_llamas_of_the_papers_sizes():
    found = mp.predict_memory("llama-7b", "qlora", batch=1, length=8, checkpointing=True)
    in_codes = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert found.codes == in_codes // 2
    assert found.dense == 2 * (2 * 32000 * 4096 + 65 * 4096) + found.dense % 4096


def test_fits_says_why():
    found = predict(config(), "full")
    gigabytes = found.peak / 1e9
    assert found.fits(gigabytes + 1.001)
    no = found.fits(gigabytes * 0.9, reserved=0)
    assert not no
    assert str(no).startswith("no, because the peak is")
    assert "moments" in no.why
    assert "fits in 24 GB: yes" in str(found)
    with pytest.raises(ValueError, match="more than is reserved"):
        found.fits(1)
    assert isinstance(found, MemoryPrediction)


def kept_by(module, method="full", **options):
    """What autograd saves of a real step of `module` on x, and the prediction; x is saved too."""
    x = torch.randn(2, LENGTH, 64)

    def forward(m, x):
        return (m(x, **{n: t.to(x.device) for n, t in options.items()}) * x).mean()

    with saved() as tensors:
        loss = forward(module, x)
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept = size([t for t in tensors if t.untyped_storage().data_ptr() not in own])
    found = mp.predict_memory(
        module, method, forward=lambda m: forward(m, torch.empty_like(x, device="meta"))
    )
    return kept + loss.nbytes, found.activations


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, need_weights=False, **options)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_within_torchs_own_layers_is_predicted(batch_first, dropout):
    """nn.MultiheadAttention calls attention inside a function of its own."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=dropout, batch_first=batch_first).train()
    measured, predicted = kept_by(layer)
    assert predicted == measured
    measured, predicted = kept_by(SelfAttention(dropout=dropout).train())
    assert predicted == measured


def test_attention_of_torchs_own_layers_with_masks_is_predicted():
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    for masks in ({"attn_mask": causal}, {"attn_mask": causal, "key_padding_mask": hidden}):
        measured, predicted = kept_by(SelfAttention().train(), **masks)
        assert predicted == measured


@pytest.mark.parametrize(
    "case",
    [
        {}, {"dropout_p": 0.5}, {"is_causal": True}, {"scale": 0.5}, {"by_name": True},
        {"axes": 3}, {"axes": 5}, {"mask": (9, 9)}, {"mask": (1, 9)}, {"mask": (1, 9, 9)},
        {"mask": (1, 1, 9, 9)}, {"mask": (9, 9), "kind": torch.bool},
        {"mask": (9, 9), "trains": True}, {"turned": True}, {"key_heads": 1, "enable_gqa": True},
    ],
    ids=str,
)  # fmt: skip
def test_attention_keeps_on_meta_what_it_keeps_on_a_cpu(case):
    """The kernel depends on axes, strides, dropout and the mask (one that trains excludes it)."""
    kept = []
    for device in ("cpu", "meta"):
        options, axes = dict(case), case.get("axes", 4)
        for name in ("axes", "turned", "by_name", "kind", "trains"):
            options.pop(name, None)
        heads = (2, options.pop("key_heads", 2), 2)
        heads = (heads[0], heads[1], heads[1])
        q, k, v = (torch.randn([1] * (axes - 3) + [h, 9, 8], device=device) for h in heads)
        if "turned" in case:
            q = torch.randn(1, 2, 8, 9, device=device).transpose(-1, -2)
        given = [x.requires_grad_() for x in (q, k, v)]
        if shape := options.pop("mask", None):
            mask = torch.ones(shape, device=device, dtype=case.get("kind", torch.float32))
            options["attn_mask"] = mask.requires_grad_("trains" in case)
        named = dict(zip(("query", "key", "value"), given, strict=True))
        with saved() as tensors, FusedAttention("cpu"):
            if "by_name" in case:
                F.scaled_dot_product_attention(**named, **options)
            else:
                F.scaled_dot_product_attention(*given, **options)
        kept.append(sorted((tuple(t.shape), str(t.dtype)) for t in tensors))
    assert kept[0] == kept[1]


def test_attention_on_meta_is_torchs_own_again_afterwards():
    q = torch.zeros(1, 2, 9, 8, device="meta", requires_grad=True)
    with FusedAttention("cpu"):
        assert "Flash" in F.scaled_dot_product_attention(q, q, q).grad_fn.name()
    assert "Flash" not in F.scaled_dot_product_attention(q, q, q).grad_fn.name()
    with pytest.raises(RuntimeError, match="in the middle"), FusedAttention("cpu"):
        raise RuntimeError("in the middle")
    assert "Flash" not in F.scaled_dot_product_attention(q, q, q).grad_fn.name()


def test_live_follows_storages_until_they_are_freed():
    with Live("cpu") as live:
        live.restart()
        a = torch.empty(10)
        b = a[2:]  # the same storage
        assert live.total == 40
        del a
        assert live.total == 40
        c = torch.empty(100)
        assert live.total == 440
        del b, c
        assert live.total == 0
    assert sum(live.peaks["other"].values()) == 440
    assert live.largest_freed == 400


def test_what_cannot_be_predicted_is_refused():
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    refused = [
        ({"model": lazy}, ValueError, "without a shape"),
        ({"model": 3}, TypeError, "expected a module"),
        ({"model": "llama-8b"}, ValueError, "llama-65b"),
        ({"method": "adalora"}, ValueError, "method='adalora'"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"rank": True}, ValueError, "rank=True"),
        ({"optimizer": "lion"}, ValueError, "optimizer='lion'"),
        ({"sharding": "fsdp1", "world_size": 2}, ValueError, "sharding='fsdp1'"),
        ({"sharding": "ddp"}, ValueError, "world_size=1"),
        ({"world_size": 2}, ValueError, "sharding=None"),
        ({"device": "tpu"}, ValueError, "device='tpu'"),
        ({"dtype": torch.int8}, ValueError, "floating-point"),
        ({"target": "nothing_here"}, ValueError, "nothing_here"),
        ({"lora_alpha": 3}, TypeError, "lora_alpha"),
    ]
    for changed, error, words in refused:
        given = {"model": config(), "method": "qlora", "batch": 1, "length": 8} | changed
        with pytest.raises(error, match=words):
            mp.predict_memory(given.pop("model"), given.pop("method"), **given)
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        predict(transformers.LlamaForCausalLM(config()).requires_grad_(False), "as_it_is")
