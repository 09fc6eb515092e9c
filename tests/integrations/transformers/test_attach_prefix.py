"""attach_prefix on small random models of the real classes, one per family."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
from tests.prefix_behaviours import Case, difference
from tests.prefix_families import FAMILIES, build

SIZES = FAMILIES["LLaMA"].sizes
TOLERANCE = 1e-5  # float32, logits around 1, summed in another order
P, T = 5, 9  # prefix positions, text tokens


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """(1, P) tokens for the prefix and (2, T) of text."""
    return torch.randint(1, 97, (1, P)), torch.randint(1, 97, (2, T))


def attached_from(model: nn.Module, prompt: torch.Tensor) -> mp.integrations.transformers.Prefix:
    """A prefix that holds the keys and values of `prompt`."""
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    prefix = mp.attach_prefix(model, prompt.shape[1])
    prefix.load_kv(cache)
    return prefix


def checkpointing(model: nn.Module, **settings: bool) -> None:
    """Switch it on, under the name that this version of transformers has for it."""
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)(settings)


def test_reentrant_checkpointing_of_given_embeddings():
    model, (_, text) = build("LLaMA").train(), tokens()
    prefix = mp.attach_prefix(model, P)
    embedded = model.get_input_embeddings()(text).detach()
    model(inputs_embeds=embedded, labels=text).loss.backward()
    plain = prefix.encoder.tables[0].grad.clone()
    model.zero_grad()
    checkpointing(model, use_reentrant=True)
    model(inputs_embeds=embedded, labels=text).loss.backward()
    assert torch.equal(prefix.encoder.tables[0].grad, plain)
    assert not embedded.requires_grad  # the caller's tensor is untouched


def test_a_second_model_with_the_same_config_object_is_unaffected():
    import transformers

    model, (_, text) = build("LLaMA"), tokens()
    config = model.config
    other = transformers.LlamaForCausalLM(config).eval()
    before = other(text).logits
    mp.attach_prefix(model, P)
    model(text)
    assert other.config is config and config._attn_implementation == "sdpa"
    assert torch.equal(other(text).logits, before)
    assert model.config is not config and model.config is model.model.config


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_attention_implementations(implementation):
    model, (prompt, text) = build("LLaMA"), tokens()
    model.set_attn_implementation(implementation)
    whole = model(torch.cat([prompt.expand(2, -1), text], 1)).logits[:, P:]
    attached_from(model, prompt)
    torch.testing.assert_close(model(text).logits, whole, rtol=1e-5, atol=1e-5)  # float32
    model.set_attn_implementation("eager")  # a change of mind is respected
    # the same, by another implementation: measured 1e-6
    torch.testing.assert_close(model(text).logits, whole, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation.endswith("_eager")


@torch.no_grad()
def test_positions_that_are_not_shifted():
    model, (_, text) = build("GPT-2"), tokens()
    prefix = mp.attach_prefix(model, P, position="none")
    seen = model(text).logits
    prefix.position = "shift"
    shifted = model(text, position_ids=torch.arange(T)[None] - P).logits
    assert torch.equal(seen, shifted)


@torch.no_grad()
def test_a_sliding_window_never_hides_the_prefix():
    model, (_, text) = build("Mistral", sliding_window=4), tokens()
    prefix = mp.attach_prefix(model, P)
    before = model(text).logits
    for table in prefix.encoder.tables:
        table.mul_(20)
    # the effect of values of size 20; round-off is 1e-6
    assert ((model(text).logits - before).abs().amax(-1) > 1e-3).all()


def test_with_lora_on_an_nf4_base_the_two_train_together():
    model, (_, text) = build("LLaMA").train(), tokens()
    mp.inject_qlora(model, "all-linear", rank=2)
    prefix = mp.attach_prefix(model, P)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in trainable} == {"lora_a", "lora_b", "0", "1", "2"}
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(text, labels=text).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert prefix.encoder.tables[0].grad.abs().max() > 0
    with mp.disable_adapters(model):
        assert not prefix.enabled
        assert model(text, labels=text).loss.item() > losses[-1]


def test_in_bfloat16_the_prefix_stays_float32():
    model, (_, text) = build("LLaMA").bfloat16(), tokens()
    prefix = mp.attach_prefix(model, P)
    assert {p.dtype for p in prefix.parameters()} == {torch.float32}
    assert model(text).logits.dtype == torch.bfloat16


def test_number_of_trainable_parameters():
    model = build("Qwen3")
    mp.attach_prefix(model, P)
    kv_heads, key_dim, value_dim, layers = 2, 16, 16, 3
    assert mp.count_parameters(model).trainable == P * layers * kv_heads * (key_dim + value_dim)


def test_bake_in_place_of_the_mlp():
    model, (_, text) = build("LLaMA"), tokens()
    prefix = mp.attach_prefix(model, P, hidden=8)
    before = model(text).logits
    prefix.bake()
    assert torch.equal(model(text).logits, before)
    assert mp.count_parameters(model).trainable == P * 3 * 2 * 16


def test_deepcopy_and_pickle_are_models_of_their_own():
    model, (_, text) = build("LLaMA"), tokens()
    prefix = mp.attach_prefix(model, P)
    before = model(text).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        prefix.encoder.tables[0].add_(1.0)
    assert torch.equal(twin(text).logits, before)
    twin.minipeft_prefix.remove()
    assert not torch.equal(twin(text).logits, before)
    assert prefix.enabled and model.minipeft_prefix is prefix
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(text).logits, model(text).logits)


def test_the_state_goes_into_another_model():
    model, (_, text) = build("LLaMA"), tokens()
    other = copy.deepcopy(model)
    for m in (model, other):
        mp.attach_prefix(m, P)
    state = mp.adapter_state_dict(model)
    assert list(state) == [f"minipeft_prefix.encoders.default.tables.{i}" for i in range(3)]
    mp.load_adapter_state_dict(other, state)
    assert torch.equal(other(text).logits, model(text).logits)
    with pytest.raises(ValueError, match="shape"):
        mp.load_adapter_state_dict(other, {n: t[:2] for n, t in state.items()})


def refused(model, message, error=ValueError, **keywords):
    """attach_prefix raises and the model is as it was."""
    before = {name: id(module.config) for name, module in model.named_modules()
              if hasattr(module, "config")}  # fmt: skip
    names = set(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        mp.attach_prefix(model, **{"prefix_length": P, **keywords})
    after = {name: id(module.config) for name, module in model.named_modules()
             if hasattr(module, "config")}  # fmt: skip
    assert after == before and set(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("length", [0, -1, True])
def test_impossible_lengths(length):
    refused(build("LLaMA"), "prefix_length", prefix_length=length)


def test_models_that_cannot_take_a_prefix():
    import transformers

    deberta = transformers.DebertaV2ForTokenClassification(
        transformers.DebertaV2Config(
            vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=48,
        )
    )  # fmt: skip
    refused(deberta, "called none from AttentionInterface.*takes no cache")
    refused(nn.Sequential(nn.Linear(2, 2)), "prefix_attention", TypeError)
    model = build("LLaMA")
    model.config._attn_implementation_internal = "flash_attention_2"
    refused(model, "flash_attention_2")


def test_attaching_twice():
    model = build("LLaMA")
    mp.attach_prefix(model, P)
    with pytest.raises(ValueError, match=r"has a prefix called 'default' already.*minipeft"):
        mp.attach_prefix(model, P)
    model.minipeft_prefix.remove()
    mp.attach_prefix(model, P)


def test_prefix_and_text_must_fit_the_position_table():
    refused(build("GPT-2"), "position table of 64", prefix_length=64)
    model = build("GPT-2")
    mp.attach_prefix(model, P)
    model(torch.ones(1, 64 - P, dtype=torch.long))
    with pytest.raises(ValueError, match="position 64 is beyond the model's table of 64"):
        model(torch.ones(1, 65 - P, dtype=torch.long))


def test_masks_of_another_length():
    model, (_, text) = build("LLaMA"), tokens()
    mp.attach_prefix(model, P)
    for length in (T - 1, T + P):
        with pytest.raises(ValueError, match=f"covers {length} tokens; expected {T}"):
            model(text, attention_mask=torch.ones(2, length, dtype=torch.long))
    with pytest.raises(ValueError, match="mask covers 7 of 9 keys"):
        model(text, attention_mask=torch.ones(2, 1, T, 7, dtype=torch.bool))


def test_a_cache_of_another_model():
    model, (prompt, _) = build("LLaMA"), tokens()
    cache = build("Qwen3")(prompt, use_cache=True).past_key_values
    prefix = mp.attach_prefix(model, P)
    with pytest.raises(ValueError, match="layer 0 has shapes"):
        prefix.load_kv(cache)
    with pytest.raises(ValueError, match="use_cache"):
        prefix.load_kv(None)


def test_a_decoder_of_experts_is_a_decoder_whatever_its_weights():
    import transformers

    for seed in range(4):
        torch.manual_seed(seed)
        config = transformers.Qwen3MoeConfig(
            **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
        )
        model = transformers.Qwen3MoeForCausalLM(config).eval()
        assert mp.attach_prefix(model, 4).position == "shift"


def test_a_part_of_a_model_that_has_a_prefix_takes_none():
    for family in ("LLaMA", "BLOOM"):
        case = Case(family)
        case.attach()
        before = case.logits()
        inner = case.model.base_model
        with pytest.raises(ValueError, match="a model around this one has a prefix"):
            mp.attach_prefix(inner, 3, name="x")
        assert torch.equal(case.logits(), before)
        case.model.minipeft_prefix.remove()
        mp.attach_prefix(inner, 3)


def test_an_encoder_decoder_of_two_models_needs_no_mask():
    import transformers

    sizes = FAMILIES["BERT"].sizes
    decoder = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes), decoder, decoder_start_token_id=1, pad_token_id=0
    )
    model = transformers.EncoderDecoderModel(config).eval()
    mp.attach_prefix(model, 4)
    text = torch.randint(3, 97, (2, 9))
    given = {"input_ids": text, "decoder_input_ids": text[:, :5]}
    plain, masked = model(**given), model(**given, attention_mask=torch.ones_like(text))
    assert difference(plain.logits, masked.logits) <= TOLERANCE


def test_odd_padding_ids_and_models_without_tokens():
    import transformers

    config = transformers.LlamaConfig(**{**SIZES, "pad_token_id": None})
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.pad_token_id = -1
    assert mp.attach_prefix(model, 4).position == "shift"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "image_size": 8, "patch_size": 4}  # fmt: skip
    vision = transformers.ViTModel(transformers.ViTConfig(**sizes))
    with pytest.raises(ValueError, match="ViTModel embeds its input by a"):
        mp.attach_prefix(vision, 4)
