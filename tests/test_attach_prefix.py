"""attach_prefix on small random models of the real classes, one per family."""

import copy
import pickle

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
P, T = 5, 9  # prefix positions, text tokens
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
FAMILIES = {
    "LLaMA": ("Llama", SIZES), "Mistral": ("Mistral", SIZES | {"sliding_window": None}),
    "Qwen2": ("Qwen2", SIZES), "Qwen3": ("Qwen3", SIZES | {"head_dim": 16}),
    "Gemma": ("Gemma", SIZES | {"head_dim": 16}), "Gemma2": ("Gemma2", SIZES | {"head_dim": 16}),
    "Gemma3": ("Gemma3", SIZES | {"head_dim": 16}),
    "GPT-2": ("GPT2", {
        "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }),
    "GPT-NeoX": ("GPTNeoX", NEOX),
    "GLM": ("Glm", SIZES | {"head_dim": 16}), "GLM-4": ("Glm4", SIZES | {"head_dim": 16}),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, **changes) -> nn.Module:
    import transformers

    name, sizes = FAMILIES[family]
    config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    model_class = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config = getattr(transformers, config_class)(**sizes | changes)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that logits tell contexts apart
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """(1, P) tokens for the prefix and (2, T) of text."""
    return torch.randint(1, 97, (1, P)), torch.randint(1, 97, (2, T))


def padded(text: torch.Tensor, count: int = 3) -> dict[str, torch.Tensor]:
    """The text with padding on its left, mask and positions as generate makes them."""
    filler = torch.zeros(len(text), count, dtype=torch.long)
    mask = torch.cat([filler, torch.ones_like(text)], 1)
    return {
        "input_ids": torch.cat([filler, text], 1), "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }  # fmt: skip


def attached_from(model: nn.Module, prompt: torch.Tensor) -> mp.integrations.transformers.Prefix:
    """A prefix that holds the keys and values of `prompt`."""
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    prefix = mp.attach_prefix(model, prompt.shape[1])
    prefix.load_kv(cache)
    return prefix


@each_family
@torch.no_grad()
def test_a_prefix_from_real_tokens_equals_these_tokens(family, capsys):
    model, (prompt, text) = build(family), tokens()
    together = model(torch.cat([prompt.expand(2, -1), text], 1)).logits[:, P:]
    without = model(text).logits
    prefix = attached_from(model, prompt)
    seen = model(text).logits
    on_padded = model(**padded(text)).logits[:, 3:]
    with mp.disable_adapters(model):
        off = model(text).logits
    differences = float((seen - together).abs().max()), float((on_padded - together).abs().max())
    with capsys.disabled():
        print(f"\n{family}: as tokens {differences[0]:.1e}, left padded {differences[1]:.1e}")
    assert max(differences) <= 1e-5  # float32, logits around 1
    assert float((without - together).abs().max()) > 0.1  # the prefix matters
    assert torch.equal(off, without)
    prefix.remove()
    assert torch.equal(model(text).logits, without)
    assert not any("prefix" in name for name in model.state_dict())


@each_family
def test_generate_equals_recomputing_and_the_prompt(family):
    model, (prompt, text) = build(family), tokens()
    settings = {"max_new_tokens": 6, "pad_token_id": 0}
    greedy = {**settings, "do_sample": False}
    beams = {**greedy, "num_beams": 3}
    whole = torch.cat([prompt.expand(2, -1), text], 1)
    as_tokens = model.generate(whole, **greedy)[:, P:]
    beams_as_tokens = model.generate(whole, **beams)[:, P:]
    torch.manual_seed(5)
    sampled_as_tokens = model.generate(whole, do_sample=True, **settings)[:, P:]
    attached_from(model, prompt)
    left = padded(text)
    left.pop("position_ids")
    assert torch.equal(model.generate(text, **greedy), as_tokens)
    assert torch.equal(model.generate(text, use_cache=False, **greedy), as_tokens)
    assert torch.equal(model.generate(**left, **greedy)[:, 3:], as_tokens)
    assert torch.equal(model.generate(text, cache_implementation="static", **greedy), as_tokens)
    assert torch.equal(model.generate(text, **beams), beams_as_tokens)
    assert torch.equal(model.generate(text, use_cache=False, **beams), beams_as_tokens)
    torch.manual_seed(5)
    assert torch.equal(model.generate(text, do_sample=True, **settings), sampled_as_tokens)


@each_family
@torch.no_grad()
def test_a_cache_of_the_users_own_holds_real_tokens_only(family):
    from transformers import DynamicCache

    model, (prompt, text) = build(family), tokens()
    attached_from(model, prompt)
    whole = model(text).logits
    cache = DynamicCache(config=model.config)
    first = model(text[:, :4], past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == 4
    mask = torch.ones_like(text)
    rest = model(text[:, 4:], past_key_values=cache, attention_mask=mask, use_cache=True).logits
    assert cache.get_seq_length() == T
    # float32; another order of sums
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-5)


def checkpointing(model: nn.Module, **settings: bool) -> None:
    """Switch it on, under the name that this version of transformers has for it."""
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)(settings)


@each_family
@pytest.mark.parametrize("hidden", [None, 8], ids=["table", "mlp"])
def test_checkpointing_leaves_the_gradients_as_they_are(family, hidden, capsys):
    model, (_, text) = build(family).train(), tokens()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    prefix = mp.attach_prefix(model, P, hidden=hidden)
    calls = []
    prefix._attentions[0].register_forward_hook(lambda *a: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        model(text, labels=text).loss.backward()
        return {name: p.grad.clone() for name, p in prefix.named_parameters()}

    plain = gradients()
    assert all(g.abs().max() > 0 for name, g in plain.items())
    for reentrant in (False, True):
        checkpointing(model, use_reentrant=reentrant)
        again = gradients()
        assert len(calls) == 2  # forward, and again in backward
        worst = max(float((again[n] - g).abs().max() / g.abs().max()) for n, g in plain.items())
        with capsys.disabled():
            print(f"\n{family}: checkpointed, re-entrant {reentrant}: gradients by {worst:.1e}")
        # the same operations; an MLP's gradients are summed over layers in another order
        assert worst <= 1e-5


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
    torch.testing.assert_close(model(text).logits, whole, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "minipeft_eager"


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
    assert list(state) == [f"minipeft_prefix.encoder.tables.{i}" for i in range(3)]
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

    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4
        )
    )
    refused(falcon, "FalconForCausalLM called attention through AttentionInterface 0 times")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    refused(t5, "encoder-decoder")
    refused(nn.Sequential(nn.Linear(2, 2)), "prefix_attention", TypeError)
    model = build("LLaMA")
    model.config._attn_implementation_internal = "flash_attention_2"
    refused(model, "flash_attention_2")


def test_positions_the_model_counts_from_the_mask():
    import transformers

    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    ).eval()
    refused(opt, "position='none'")
    mp.attach_prefix(opt, P, position="none")
    opt(tokens()[1])


def test_attaching_twice():
    model = build("LLaMA")
    mp.attach_prefix(model, P)
    with pytest.raises(ValueError, match="has a prefix already"):
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


def test_save_peft_says_that_it_cannot_yet(tmp_path):
    model = build("LLaMA")
    mp.attach_prefix(model, P)
    with pytest.raises(ValueError, match="prefix"):
        mp.save_peft(model, tmp_path / "adapter")
