"""merged_prefix_attention: against a softmax over all keys in float64, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from minipeft.fast.prefix import merge_is_faster, merged_prefix_attention, why_not_merge

NAMES = ("y", "dq", "dk", "dv", "dprefix_k", "dprefix_v")


def reference(q, k, v, prefix_k, prefix_v, *, is_causal, scale=None):
    """One softmax over prefix and tokens, head by head, in float64."""
    q, k, v, prefix_k, prefix_v = (x.double() for x in (q, k, v, prefix_k, prefix_v))
    (batch, heads, t, d), (groups, s), p = q.shape, k.shape[1:3], prefix_k.shape[-2]
    seen = torch.ones(t, p + s, dtype=torch.bool)
    if is_causal:
        for i in range(t):
            seen[i, p + s - t + i + 1 :] = False
    rows = []
    for b in range(batch):
        own_k, own_v = (x[b % len(x)] if x.dim() == 4 else x for x in (prefix_k, prefix_v))
        for h in range(heads):
            g = h // (heads // groups)
            keys, values = torch.cat([own_k[g], k[b, g]]), torch.cat([own_v[g], v[b, g]])
            scores = q[b, h] @ keys.T * (scale or 1 / math.sqrt(d))
            rows.append(torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ values)
    return torch.stack(rows).view(batch, heads, t, d)


def inputs(b, h, g, t, s, p, d, *, lead=(), dtype=torch.float32, prefix_dtype=None):
    """q, k, v, prefix_k, prefix_v of normal numbers, all of which want gradients."""
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d), (*lead, g, p, d), (*lead, g, p, d)]
    tensors = [torch.randn(*shape).to(dtype) for shape in shapes]
    if prefix_dtype is not None:
        tensors[3:] = [x.to(prefix_dtype) for x in tensors[3:]]
    return [x.requires_grad_() for x in tensors]


def result_and_gradients(function, tensors, dy, **keywords):
    y = function(*tensors, **keywords)
    return y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))


def against_reference(tensors, dy=None, **keywords):
    """(name, found, expected) of the result and the five gradients."""
    dy = torch.randn_like(tensors[0]) if dy is None else dy
    found = result_and_gradients(merged_prefix_attention, tensors, dy, **keywords)
    expected = result_and_gradients(reference, tensors, dy, **keywords)
    return zip(NAMES, found, expected, strict=True)


@given(
    t=st.sampled_from([1, 7, 63, 65]), more=st.integers(0, 3), p=st.sampled_from([0, 1, 7, 65]),
    groups=st.sampled_from([1, 2]), repeats=st.sampled_from([1, 3]), is_causal=st.booleans(),
    lead=st.sampled_from([(), (1,), (2,)]), scale=st.sampled_from([None, 0.7]),
    d=st.sampled_from([1, 6, 65]),
)  # fmt: skip
def test_result_and_gradients_equal_one_softmax_over_all_keys(
    t, more, p, groups, repeats, is_causal, lead, scale, d
):
    s = t if is_causal and t > 1 else t + more
    tensors = inputs(2, groups * repeats, groups, t, s, p, d, lead=lead, dtype=torch.float64)
    for name, found, expected in against_reference(tensors, is_causal=is_causal, scale=scale):
        # sums of at most 400 products of numbers up to about 100: 1e-16 * 400 * 100
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=4e-12, msg=name)


@pytest.mark.parametrize(
    ("is_causal", "t", "s"), [(True, 65, 65), (False, 7, 63), (True, 600, 600)]
)
@pytest.mark.parametrize("repeats", [1, 2])
def test_in_float32(is_causal, t, s, repeats):
    # 600: more than one of the kernel's blocks of 512 keys, so that whole blocks are skipped
    tensors = inputs(2, 2 * repeats, 2, t, s, 7, 16)
    for name, found, expected in against_reference(tensors, is_causal=is_causal):
        # gradients of the keys are sums over 600 queries: 600 * 6e-8 of numbers near 1
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=4e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix_dtype", [None, torch.float32])
@pytest.mark.parametrize("is_causal", [True, False])
def test_in_small_dtypes(dtype, prefix_dtype, is_causal):
    tensors = inputs(2, 4, 2, 65, 65, 7, 16, dtype=dtype)
    if prefix_dtype is not None:
        tensors[3:] = [x.detach().to(prefix_dtype).requires_grad_() for x in tensors[3:]]
    for name, found, expected in against_reference(tensors, is_causal=is_causal):
        assert found.dtype == (prefix_dtype or dtype if "prefix" in name else dtype)
        # four roundings of half an epsilon: probabilities, their gradients, the result, the sums
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error <= 2 * torch.finfo(dtype).eps, name


def test_gradients_of_a_float32_prefix_are_not_rounded_to_the_tokens_dtype():
    tensors = inputs(3, 2, 2, 7, 7, 5, 8, dtype=torch.bfloat16, prefix_dtype=torch.float32)
    y = merged_prefix_attention(*tensors, is_causal=True)
    for gradient in torch.autograd.grad(y.float().sum(), tensors[3:]):
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_a_float32_prefix_counts_as_rounded_to_the_tokens_dtype():
    tensors = inputs(1, 2, 2, 7, 7, 5, 8, dtype=torch.bfloat16, prefix_dtype=torch.float32)
    with torch.no_grad():
        rounded = [*tensors[:3], *(x + x * 2**-10 for x in (y.bfloat16() for y in tensors[3:]))]
        assert rounded[3].dtype == torch.bfloat16
        tensors[3:] = [x.float() for x in rounded[3:]]
        found = merged_prefix_attention(*tensors, is_causal=True)
        assert torch.equal(found, merged_prefix_attention(*rounded, is_causal=True))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_gradcheck(is_causal, lead):
    tensors = inputs(2, 4, 2, 3, 3, 2, 3, lead=lead, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: merged_prefix_attention(*x, is_causal=is_causal), tensors
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_scores_of_60_do_not_overflow(is_causal):
    tensors = inputs(1, 2, 2, 63, 63, 7, 8)
    with torch.no_grad():  # largest |score| 60 among the tokens, and among the prefix
        q, k, _, prefix_k, _ = tensors
        for keys, queries in ((k, q), (prefix_k, q)):
            keys *= 60 * math.sqrt(8) / (queries @ keys.mT).abs().max()
    for name, found, expected in against_reference(tensors, is_causal=is_causal):
        assert found.isfinite().all()
        # a score is right to 60 * 8 * 6e-8 = 3e-5, hence a probability; gradients multiply by
        # keys of up to 40, and 63 of them are summed, of which few have any weight
        torch.testing.assert_close(
            found, expected.to(found.dtype), rtol=1e-3, atol=3e-5 * 40, msg=name
        )


def decided(size):
    """Tensors with prefix scores of `size` for every query; those of the tokens are small."""
    tensors = inputs(2, 2, 2, 7, 7, 3, 4)
    with torch.no_grad():
        tensors[0].abs_().add_(0.5)
        tensors[3].abs_().add_(0.5).mul_(size)
    return tensors


def test_a_prefix_that_vanishes_leaves_attention_over_the_tokens_bit_for_bit():
    tensors = decided(-1e4)
    y, *gradients = result_and_gradients(
        merged_prefix_attention, tensors, torch.ones(2, 2, 7, 4), is_causal=True
    )
    alone = scaled_dot_product_attention(*tensors[:3], is_causal=True)
    assert torch.equal(y, alone)
    for found, expected in zip(
        gradients[:3], torch.autograd.grad(alone.sum(), tensors[:3]), strict=True
    ):
        assert torch.equal(found, expected)
    assert not any(bool(x.any()) for x in gradients[3:])


def test_a_prefix_that_dominates_is_all_there_is():
    tensors = decided(1e4)
    y, _, dk, dv, *_ = result_and_gradients(
        merged_prefix_attention, tensors, torch.ones(2, 2, 7, 4), is_causal=True
    )
    prefix = [x.expand(2, -1, -1, -1) for x in tensors[3:]]
    assert torch.equal(y, scaled_dot_product_attention(tensors[0], *prefix))
    assert not dk.any() and not dv.any()


@pytest.mark.parametrize("is_causal", [True, False])
def test_without_a_prefix_it_is_plain_attention_bit_for_bit(is_causal):
    tensors = inputs(2, 2, 2, 7, 7, 0, 8)
    dy = torch.randn(2, 2, 7, 8)
    y, *gradients = result_and_gradients(merged_prefix_attention, tensors, dy, is_causal=is_causal)
    plain = scaled_dot_product_attention(*tensors[:3], is_causal=is_causal)
    assert torch.equal(y, plain)
    for found, expected in zip(
        gradients[:3], torch.autograd.grad(plain, tensors[:3], dy), strict=True
    ):
        assert torch.equal(found, expected)
    assert [tuple(x.shape) for x in gradients[3:]] == [(2, 0, 8)] * 2


def every_other(x, axis):
    """Equal to x, as a view that steps over every other number of an axis."""
    wide = x.detach().repeat_interleave(2, axis)
    return wide[(slice(None),) * axis + (slice(None, None, 2),)]


@pytest.mark.parametrize("layout", [
    lambda x: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2),
    lambda x: x.detach().transpose(-2, -3).contiguous().transpose(-2, -3),
    lambda x: every_other(x, x.dim() - 1),
    lambda x: every_other(x, x.dim() - 2),
    lambda x: x.detach()[..., :1, :].expand_as(x),
    lambda x: x.detach()[..., :1].expand_as(x),
], ids=["columns", "heads inside", "2nd number", "2nd row", "one row", "one number"])  # fmt: skip
@pytest.mark.parametrize("repeats", [1, 2])
def test_any_strides_will_do(layout, repeats):
    tensors = [layout(x).requires_grad_() for x in inputs(2, 2 * repeats, 2, 7, 7, 5, 8)]
    dense = [
        x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in tensors
    ]
    dy = layout(torch.randn(2, 2 * repeats, 7, 8))
    found = result_and_gradients(merged_prefix_attention, tensors, dy, is_causal=True)
    expected = result_and_gradients(merged_prefix_attention, dense, dy.contiguous(), is_causal=True)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert torch.equal(a, b), name


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that run."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), function.name()]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trained", "backwards"), [([0, 1, 2, 3, 4], 2), ([3, 4], 1), ([1], 1)])
def test_backward_runs_over_the_parts_that_need_it(trained, backwards):
    tensors = [
        x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs(1, 2, 2, 7, 7, 3, 8))
    ]
    with Calls() as calls:
        merged_prefix_attention(*tensors, is_causal=True).sum().backward()
    names = [name for name in calls.names if "flash_attention_for_cpu_backward" in name]
    assert len(names) == backwards
    assert [i for i, x in enumerate(tensors) if x.grad is not None] == trained
    assert not any("cat" in name for name in calls.names)


def test_backward_keeps_its_inputs_the_result_and_a_number_a_query():
    tensors, kept = inputs(1, 2, 2, 64, 64, 3, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = merged_prefix_attention(*tensors, is_causal=True)
    known = {x.data_ptr() for x in (*tensors, y)}
    assert sum(x.numel() for x in kept if x.data_ptr() not in known) == 2 * 64


@pytest.mark.parametrize("power", [1, 2])  # 1: dy is a constant
def test_a_second_derivative_raises(power):
    tensors = inputs(1, 2, 2, 3, 3, 2, 4)
    y = merged_prefix_attention(*tensors, is_causal=True)
    gradients = torch.autograd.grad(y.pow(power).sum(), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant):
    tensors = inputs(1, 2, 2, 7, 7, 3, 8)

    def run(*x):
        return merged_prefix_attention(*x, is_causal=True)

    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    checkpoint(run, *tensors, use_reentrant=use_reentrant).sum().backward()
    for x, gradient in zip(tensors, expected, strict=True):
        assert torch.equal(x.grad, gradient)


def test_under_autocast_it_works_in_autocasts_dtype_and_gradients_keep_theirs():
    tensors = inputs(1, 2, 2, 7, 7, 3, 8)
    low = [x.detach().bfloat16().requires_grad_() for x in tensors[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        y = merged_prefix_attention(*tensors, is_causal=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, merged_prefix_attention(*low, *tensors[3:], is_causal=True))
    y.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors)
    with torch.autocast("cpu", torch.bfloat16):
        double = inputs(1, 2, 2, 7, 7, 3, 8, dtype=torch.float64)
        assert merged_prefix_attention(*double, is_causal=True).dtype == torch.float64


def test_no_graph_without_gradients():
    tensors = inputs(1, 2, 2, 7, 7, 3, 8)
    y = merged_prefix_attention(*tensors, is_causal=True)
    with torch.no_grad():
        alone = merged_prefix_attention(*tensors, is_causal=True)
    assert torch.equal(y, alone) and y.requires_grad and alone.grad_fn is None


class Own(torch.Tensor):
    """A subclass."""


@pytest.mark.parametrize(
    ("change", "keywords", "reason"),
    [
        ({}, {"mask": torch.ones(1, 1, 1, 5, dtype=torch.bool)}, "a mask"),
        ({}, {"dropout": 0.1}, "dropout"),
        ({"q": torch.randn(1, 2, 5, 8).as_subclass(Own)}, {}, "subclass"),
        ({"prefix_k": torch.empty(2, 3, 8, device="meta")}, {}, "not all tensors are on the CPU"),
        ({"k": torch.randn(1, 2, 5, 8).half()}, {}, "dtypes"),
        ({"v": torch.randn(1, 2, 5, 4)}, {}, "values of size 4, keys of size 8"),
        ({"q": torch.randn(1, 2, 3, 8)}, {}, "3 causal queries over 5 keys"),
        ({"q": torch.randn(1, 2, 0, 8)}, {"is_causal": False}, "no tokens"),
        ({"k": torch.randn(1, 2, 0, 8)}, {"is_causal": False}, "no tokens"),
    ],
)
def test_what_it_does_not_take(change, keywords, reason):
    arguments = {
        "q": torch.randn(1, 2, 5, 8), "k": torch.randn(1, 2, 5, 8), "v": torch.randn(1, 2, 5, 8),
        "prefix_k": torch.randn(2, 3, 8), "prefix_v": torch.randn(2, 3, 8),
    }  # fmt: skip
    assert why_not_merge(*arguments.values(), is_causal=True) is None
    arguments.update(change)
    assert reason in why_not_merge(*arguments.values(), **keywords)


def test_one_query_over_many_keys_may_be_causal():
    tensors = inputs(2, 4, 2, 1, 9, 3, 8)
    assert why_not_merge(*tensors, is_causal=True) is None
    a, b = (merged_prefix_attention(*tensors, is_causal=c) for c in (True, False))
    assert torch.equal(a, b)


def test_transforms_and_switches_are_respected():
    tensors = inputs(1, 2, 2, 5, 5, 3, 8)
    reasons = []

    def ask(q):
        reasons.append(why_not_merge(q, *tensors[1:]))
        return q

    torch.vmap(ask)(tensors[0][None])
    torch.func.grad(lambda q: ask(q).sum())(tensors[0])
    with torch.autograd.forward_ad.dual_level():
        ask(torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0])))
    with sdpa_kernel(SDPBackend.MATH):
        ask(tensors[0])
    assert ["subclass" in (r or "") for r in reasons] == [False] * 4
    assert reasons[0] == reasons[1] == "a torch.func transform is active"
    assert reasons[2] == "forward-mode differentiation"
    assert "sdpa_kernel" in reasons[3]
    ask(nn.Parameter(tensors[0].detach()))
    assert reasons[4] is None


def test_a_case_that_cannot_be_merged_raises_and_says_why():
    q, k, v, prefix_k, prefix_v = inputs(1, 2, 2, 3, 5, 3, 8)
    with pytest.raises(ValueError, match="3 causal queries over 5 keys"):
        merged_prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=True)


@pytest.mark.parametrize("change", [
    {"q": torch.randn(1, 3, 5, 8)},
    {"prefix_k": torch.randn(3, 3, 8)}, {"prefix_v": torch.randn(2, 4, 8)},
    {"prefix_v": torch.randn(2, 3, 4)}, {"prefix_k": torch.randn(3, 2, 3, 8)},
    {"prefix_k": torch.randn(3, 8)},
])  # fmt: skip
def test_shapes_that_do_not_belong_together(change):
    arguments = {
        "q": torch.randn(1, 2, 5, 8), "k": torch.randn(1, 2, 5, 8), "v": torch.randn(1, 2, 5, 8),
        "prefix_k": torch.randn(2, 3, 8), "prefix_v": torch.randn(2, 3, 8), **change,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="h a multiple of g" if "q" in change else "prefix of other shapes"
    ):
        merged_prefix_attention(**arguments, is_causal=False)


@pytest.mark.parametrize(
    ("t", "s", "trained", "dtype", "faster"),
    [
        (2048, 2048, "all", "float32", True), (512, 512, "all", "float32", False),
        (128, 128, "prefix", "float32", True), (16, 16, "prefix", "float32", False),
        (16, 16, "prefix", "bfloat16", True), (7, 7, "none", "float32", False),
        (1, 4096, "none", "float32", True), (8, 4096, "none", "float32", True),
        (1, 4095, "none", "float32", False), (1, 4096, "all", "float32", False),
        (64, 8192, "none", "float32", False),
        (1, 8192, "none", "bfloat16", False), (1, 16384, "none", "bfloat16", True),
    ],
)  # fmt: skip
def test_merging_is_chosen_where_it_was_measured_to_win(t, s, trained, dtype, faster):
    q, k, v, *prefix = (torch.empty(1, 2, n, 64) for n in (t, s, s, 16, 16))
    q, k, v = (x.to(getattr(torch, dtype)).requires_grad_(trained == "all") for x in (q, k, v))
    prefix = [x[0].requires_grad_(trained != "none") for x in prefix]
    assert merge_is_faster(q, k, v, *prefix, is_causal=t == s) == faster
    with torch.no_grad():  # a prefix that wants gradients gets none, and decides nothing
        assert merge_is_faster(q, k, v, *prefix, is_causal=t == s) == merge_is_faster(
            *(x.detach() for x in (q, k, v, *prefix)), is_causal=t == s
        )
