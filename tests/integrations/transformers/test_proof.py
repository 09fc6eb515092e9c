"""attach_prefix asks the model what it does with a prefix, and refuses what is not so."""

import copy
import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.io.prefixes import load_prefix, save_prefix
from tests.any_class import build, image, mel
from tests.prefix_audit import classes

transformers = pytest.importorskip("transformers")

TEXT = torch.arange(5, 17).view(2, 6)


def llama(**settings):
    return build("LlamaConfig", "LlamaForCausalLM", **settings)


def of_class(name):
    """A model of a class that transformers' mappings name."""
    found = next(kind for kind in classes() if kind.model == name)
    return build(found.config, found.model)


def left_padded(model, text=TEXT, pad=4):
    ids = torch.cat([torch.zeros(len(text), pad, dtype=torch.long), text], 1)
    mask = (torch.arange(ids.shape[1]) >= pad).long().expand(len(text), -1)
    return model(input_ids=ids, attention_mask=mask)[0][:, pad:]


def random_values(prefix):
    for parameter in prefix.parameters():
        nn.init.normal_(parameter)


def left_as_it_was(model, before):
    """Whether hooks, names and configs are those of `before` (see `traces`)."""
    *found, names = traces(model)
    *wanted, names_before = before
    assert found == wanted
    return set(names) <= set(names_before)  # names of prefixes that are gone may go too


def traces(model):
    from transformers import AttentionInterface

    return (
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        model.config._attn_implementation, id(model.config),
        sorted(AttentionInterface._global_mapping),
    )  # fmt: skip


# --- the first question: a prefix of real tokens is these tokens ---


class TwicePositions(transformers.LlamaModel):
    """Counts a shift twice: from its own cache it goes on rightly, behind a prefix it does not."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        if past_key_values is None and position_ids is not None:
            position_ids = position_ids + position_ids[:, :1]
        return super().forward(
            input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs
        )


def test_tokens_that_a_shift_moves_too_far_are_refused():
    model = llama()
    model.model.__class__ = TwicePositions
    before = traces(model)
    with pytest.raises(
        ValueError,
        match=r"attach_prefix: LlamaForCausalLM does not take a prefix: a "
        r"prefix with the keys of real tokens .* off, where",
    ):
        mp.attach_prefix(model, 4)  # fmt: skip
    assert left_as_it_was(model, before)
    assert mp.attach_prefix(model, 4, position="none").position == "none"  # not asked there


def test_tokens_beside_those_of_the_text_are_refused():
    model = build("CpmAntConfig", "CpmAntForCausalLM")  # it puts 32 prompts of its own in front
    with pytest.raises(ValueError, match=r"sees \[40\] keys for 8 tokens"):
        mp.attach_prefix(model, 4)


def test_a_state_beside_keys_and_values_is_told():
    model = of_class("InklingForCausalLM")  # convolutions over keys
    with pytest.warns(UserWarning, match="not proved for .*: it keeps a state beside keys"):
        prefix = mp.attach_prefix(model, 3)
    with pytest.warns(UserWarning, match=r"load_tokens: .*keeps a state beside keys and values"):
        prefix.load_tokens(torch.tensor([[5, 6, 7]]))


def test_numbers_of_16_bits_are_measured_against_their_own_noise():
    model = llama().to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.attach_prefix(model, 4)


# --- the second: padding stays outside ---


@pytest.mark.parametrize(("name", "position"), [
    ("LlamaForCausalLM", "shift"), ("LlamaForCausalLM", "none"), ("GPT2LMHeadModel", "shift"),
    ("GPT2LMHeadModel", "none"), ("ModernBertForMaskedLM", "none"),
])  # fmt: skip
def test_left_padding_changes_nothing_without_position_ids(name, position):
    """Attention by distance saw the prefix further away by each padding token."""
    stem = name.split("For")[0].removesuffix("LMHeadModel")
    model = build(f"{stem}Config", name)
    random_values(mp.attach_prefix(model, 4, position=position, train_head=False))
    with torch.no_grad():
        off = float((left_padded(model) - model(input_ids=TEXT)[0]).abs().max())
    assert off < 1e-5  # rounding of logits up to 4 in float32


def test_rows_without_a_prefix_and_gated_ones_are_numbered_as_ever():
    model = build("GPT2Config", "GPT2LMHeadModel")
    with torch.no_grad():
        before = left_padded(model)
        prefix = mp.attach_prefix(model, 4, gated=True)
        assert torch.equal(left_padded(model), before)
        prefix.remove()
        random_values(mp.attach_prefix(model, 4))
        mp.use_adapters(model, rows=["default", None])
        found = left_padded(model)
    assert float((found[1] - before[1]).abs().max()) < 1e-5  # rounding, as above
    assert float((found[0] - before[0]).abs().max()) > 0.1


def test_padding_between_prefix_and_text_is_refused():
    """RoFormer numbers by slot, and takes no position_ids."""
    settings = {"is_decoder": True}
    model = build("RoFormerConfig", "RoFormerForCausalLM", **settings)
    with pytest.raises(ValueError, match="a padded text must give what it gives unpadded"):
        mp.attach_prefix(model, 4, train_head=False)


# --- the third: each layer sees its prefix ---


def gpt_neo():
    types = [[["global", "local"], 1]]
    return build("GPTNeoConfig", "GPTNeoForCausalLM", attention_types=types)


def test_a_window_inside_the_module_is_found():
    model = gpt_neo()
    before = traces(model)
    with pytest.raises(
        ValueError,
        match=r"GPTNeoSelfAttention of GPTNeoForCausalLM does not see "
        r"its prefix in layers \[1\].*window='like_token'",
    ):
        mp.attach_prefix(model, 4)  # fmt: skip
    assert left_as_it_was(model, before)
    prefix = mp.attach_prefix(model, 4, window="like_token")
    prefix.load_tokens(torch.tensor([[5, 6, 7, 8]]))
    whole = torch.cat([torch.tensor([[5, 6, 7, 8]]).expand(2, -1), TEXT], 1)
    with torch.no_grad():
        behind = model(input_ids=TEXT).logits
        prefix.enabled = False
        # float32 logits through two layers, in another order of keys
        assert float((behind - model(input_ids=whole).logits[:, 4:]).abs().max()) < 1e-5


class Deaf(nn.Module):
    """Attention of which one layer hides the first columns of every mask."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None:
            attention_mask = attention_mask.clone()
            hidden = False if attention_mask.dtype == torch.bool else float("-inf")
            attention_mask[..., : attention_mask.shape[-1] - hidden_states.shape[1]] = hidden
        return self.attention(hidden_states, attention_mask=attention_mask, **kwargs)


def test_one_layer_that_hides_the_prefix_is_named():
    model = llama()
    model.model.layers[2].self_attn = Deaf(model.model.layers[2].self_attn)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not"):
        mp.attach_prefix(model, 4)
    with pytest.raises(ValueError, match=r"does not see its prefix in layers \[2\]"):
        mp.attach_prefix(model, 4, position="none")


def test_a_long_window_is_shortened_for_the_trial(monkeypatch):
    model = build("MistralConfig", "MistralForCausalLM", sliding_window=4096,
                  max_position_embeddings=8192)  # fmt: skip
    longest = []
    handle = model.model.register_forward_pre_hook(
        lambda m, args, kwargs: longest.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prefix = mp.attach_prefix(model, 4)
    handle.remove()
    assert max(longest) < 64 and model.config.sliding_window == 4096
    assert prefix.has_windows and prefix.window == "always"


# --- what raises later raises now ---


@pytest.mark.parametrize(("config", "name"), [
    ("DogeConfig", "DogeForCausalLM"), ("LayoutLMConfig", "LayoutLMForMaskedLM"),
    ("HYV4Config", "HYV4ForCausalLM"),
])  # fmt: skip
def test_forwards_that_would_raise_are_refused_when_attached(config, name):
    model = build(config, name)
    before = traces(model)
    with pytest.raises(ValueError, match=f"attach_prefix: {name}.*could not be run on a few"):
        mp.attach_prefix(model, 4)
    assert left_as_it_was(model, before)


def gemma3n():
    kinds = ["sliding_attention", "full_attention"] * 2
    return build("Gemma3nTextConfig", "Gemma3nForCausalLM", num_hidden_layers=4, layer_types=kinds,
                 num_kv_shared_layers=2, activation_sparsity_pattern=None,
                 intermediate_size=48)  # fmt: skip


def test_prompts_are_what_attention_sees():
    """Gemma 3n's last layers use the keys of earlier ones, so its cache keeps fewer than layers."""
    with pytest.raises(ValueError, match=r"attach_prompt: .*Gemma3n"):
        mp.attach_prompt(gemma3n(), 4)
    model = of_class("InklingForCausalLM")
    with pytest.warns(UserWarning, match="keeps a state"):
        mp.attach_prompt(model, 4)
    model(input_ids=TEXT).logits.sum().backward()


# --- example= and layers= ---


def test_images_and_sounds_take_a_prefix_by_example():
    for model, example in (
        (build("ViTConfig", "ViTForImageClassification"), image()),
        (build("WhisperConfig", "WhisperForConditionalGeneration"), mel()),
    ):
        with pytest.raises(ValueError, match=r"attach_prefix: .*pass example="):
            mp.attach_prefix(model, 4)
        with torch.no_grad():
            before = model(**example).logits
        prefix = mp.attach_prefix(model, 4, example=example, train_head=False)
        random_values(prefix)
        logits = model(**example).logits
        assert float((logits.detach() - before).abs().max()) > 0.01
        logits.sum().backward()
        assert all(p.grad is not None for p in prefix.parameters())
        prefix.remove()
        with torch.no_grad():
            assert torch.equal(model(**example).logits, before)


def test_rows_of_a_vision_encoder_use_their_own():
    model, example = build("ViTConfig", "ViTForImageClassification"), image()
    with torch.no_grad():
        before = model(**example).logits
        random_values(mp.attach_prefix(model, 4, example=example, train_head=False))
        both = model(**example).logits
        mp.use_adapters(model, rows=["default", None])
        found = model(**example).logits
    # rounding: another mask takes another kernel
    torch.testing.assert_close(found, torch.stack([both[0], before[1]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("example", "message"), [
    ({}, "expected the keyword arguments"), ({"pixel_values": 3}, "tensors among them"),
    ({"waves": torch.zeros(1, 3)}, r"example has \['waves'\]; LlamaForCausalLM takes"),
    ({"input_ids": torch.zeros(1, 4, 4, 4)}, "could not be run on a few tokens"),
    ({"input_ids": torch.full((1, 6), 10**6)}, "could not be run on a few tokens"),
    ({"input_ids": torch.zeros(1, 6, dtype=torch.long, device="meta")}, r"no values \(meta"),
])  # fmt: skip
def test_examples_that_do_not_fit_are_refused(example, message):
    model = llama()
    if "waves" in example:
        model.forward = lambda input_ids=None, attention_mask=None: None
    with pytest.raises(ValueError, match=f"attach_prefix: .*{message}"):
        mp.attach_prefix(model, 4, example=example)


@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_an_example_shorter_than_the_window_is_no_hindrance(window, tokens):
    model = build("MistralConfig", "MistralForCausalLM", sliding_window=window)
    ids = torch.arange(3, 3 + 12)[None]
    plain = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is proved, and nothing is left to tell
        prefix = mp.attach_prefix(model, 4, example={"input_ids": ids[:, :tokens]})
    assert prefix.report() == "3 layers of self" and not torch.equal(model(ids).logits, plain)


def hybrid():
    return build("Qwen3NextConfig", "Qwen3NextForCausalLM")


def test_hybrids_take_a_prefix_on_their_attention_layers(tmp_path):
    model = hybrid()
    with pytest.raises(
        ValueError, match=r"has 3 layers, of which 1 called attention.*layers=\[1\]"
    ):
        mp.attach_prefix(model, 4)
    with pytest.raises(ValueError, match=r"layers=\[0\]; attention of .* is in layers \[1\]"):
        mp.attach_prefix(model, 4, layers=[0])
    with pytest.warns(UserWarning, match="keeps a state beside keys and values"):
        prefix = mp.attach_prefix(model, 4, layers=[1])
    random_values(prefix)
    with torch.no_grad():
        logits = model(input_ids=TEXT).logits
    save_prefix(model, tmp_path)
    other = hybrid()
    with pytest.warns(UserWarning, match="load_prefix: not proved"):
        assert load_prefix(other, tmp_path).layers == [1]
    with torch.no_grad():
        assert torch.equal(other(input_ids=TEXT).logits, logits)
    with pytest.raises(ValueError, match=r"a prefix in layers .* alone"):
        mp.save_peft(model, tmp_path / "peft")


def test_layers_of_any_decoder_can_be_chosen():
    model = llama()
    prefix = mp.attach_prefix(model, 4, layers=[0, 2])
    assert len(prefix.kv_shapes) == 2 and prefix.layers == [0, 2]
    text = torch.tensor([[5, 6, 7, 8]])
    prefix.load_tokens(text)  # the middle layer sees the text alone
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=TEXT).logits).all()
    with pytest.raises(ValueError, match=r"layers=\[1\], but the first prefix has \[0, 2\]"):
        mp.attach_prefix(model, 4, name="b", layers=[1])


# --- what attaching leaves alone ---


def test_random_state_buffers_and_modes_are_as_before():
    model = build("Qwen2Config", "Qwen2ForCausalLM").train()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda m, args, output: m.calls.add_(1))
    encoder = mp.PrefixEncoder([(2, 8, 8)] * 3, 4)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    mp.attach_prefix(model, encoder)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_at_most_eight_forwards_more_than_it_took_before():
    """Before the questions, LLaMA took 5 forwards: one to see attention, four about numbers."""
    model = llama()
    runs = []
    model.model.register_forward_pre_hook(lambda m, args: runs.append(1))
    mp.attach_prefix(model, 4)
    print(f"forwards of attach_prefix: {len(runs)}")
    assert len(runs) <= 5 + 8


def test_what_has_no_prefix_is_named():
    config = transformers.LongT5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    prefix = mp.attach_prefix(transformers.LongT5ForConditionalGeneration(config).eval(), 4)
    assert list(prefix.left_out) == ["encoder"] and "left_out=['encoder']" in repr(prefix)
    assert "left out: encoder: its attention is not looked up" in prefix.report()
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )).eval()  # fmt: skip
    assert mp.attach_prefix(model, 4).report() == "6 layers of encoder, decoder, cross"
    mp.remove(model)
    prefix = mp.attach_prefix(model, 4, locations=["decoder"], layers=[1])
    assert set(prefix.left_out) == {"encoder", "cross", "layer 0"}
    assert "not asked: whether tokens" in prefix.report()


def test_a_model_whose_layers_share_a_module_is_told_what_trains_it():
    model = build("AlbertConfig", "AlbertForMaskedLM")
    with pytest.raises(
        ValueError, match=r"3 times from 1 modules.*inject_lora trains such a model"
    ):
        mp.attach_prefix(model, 3)
    mp.inject_lora(model, "all-linear", 2)


def test_a_text_that_looks_ahead_goes_on_without_a_cache_alone():
    model = build("BertConfig", "BertLMHeadModel", is_decoder=False)
    mp.attach_prefix(model, 3, train_head=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"BertSelfAttention looks ahead.*pass use_cache=False"):
        model.generate(ids, **settings)
    found = model.generate(ids, **settings, use_cache=False)
    for length in range(4, 7):
        following = model(found[:, :length]).logits[0, -1].argmax()
        assert found[0, length] == following
