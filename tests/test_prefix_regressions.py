"""Defects of prefixes that were found once, each with the check that it stays away."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn

import minipeft as mp

pytest.importorskip("transformers")
from benchmarks.models import enable_checkpointing
from tests.prefix_behaviours import GREEDY, Case, P, difference
from tests.prefix_families import FAMILIES

TOLERANCE = 1e-5  # float32, logits around 1, summed in another order
SIZES = FAMILIES["LLaMA"].sizes


def open_gates(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gates" in name:
                parameter.fill_(1.0)


def random_lora(model: nn.Module) -> None:
    mp.inject_lora(model, "all-linear", rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)


def test_a_decoder_of_experts_is_a_decoder_whatever_its_weights():
    import transformers

    for seed in range(4):
        torch.manual_seed(seed)
        config = transformers.Qwen3MoeConfig(
            **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
        )
        model = transformers.Qwen3MoeForCausalLM(config).eval()
        assert mp.attach_prefix(model, 4).position == "shift"


@pytest.mark.parametrize(
    ("family", "reentrant"),
    # re-entrant checkpointing hands T5's layers a mask that does not say whose it is
    [("LLaMA", False), ("LLaMA", True), ("BLOOM", False), ("BLOOM", True), ("T5", False)],
)
def test_switching_before_a_checkpointed_backward_is_refused(family, reentrant):
    case = Case(family)
    case.model.train()
    case.model.config.use_cache = False
    case.attach(tokens=False)
    mp.attach_prefix(case.model, P, name="other")
    enable_checkpointing(case.model, reentrant=reentrant)
    mp.use_adapters(case.model, "default")
    loss = case.model(**case.inputs()).logits.square().mean()
    mp.use_adapters(case.model, "other")
    with pytest.raises(ValueError, match="a prefix was switched after this forward"):
        loss.backward()
    loss = case.model(**case.inputs()).logits.square().mean()
    with mp.disable_adapters(case.model), pytest.raises(ValueError, match="was switched"):
        loss.backward()


def test_prompts_beside_lora_rows_are_refused():
    case = Case("LLaMA")
    random_lora(case.model)
    mp.attach_prompt(case.model, 4, name="prompt")
    with pytest.raises(ValueError, match="is a prompt, which runs through the model once"):
        mp.use_adapters(case.model, rows=[["default", "prompt"], "prompt"])
    mp.use_adapters(case.model, rows=["default", None])
    with pytest.raises(ValueError, match="use_adapters"):
        mp.attach_prefix(case.model, 3, name="more")


def test_threads_do_not_see_each_others_prompts():
    case = Case("LLaMA")
    mp.attach_prompt(case.model, 4, init_std=1.0)
    expected, wrong = case.logits(), []

    def work() -> None:
        for _ in range(40):
            try:
                if difference(case.logits(), expected) > TOLERANCE:
                    wrong.append("differs")
            except Exception as error:
                wrong.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[:3]


def test_gated_prefixes_are_no_tokens_of_a_window_and_stay_causal():
    case = Case("Mistral, window")
    case.attach(tokens=False, window="like_token")
    mp.attach_prefix(case.model, 3, gated=True, name="gated", init_std=1.0)
    open_gates(case.model)
    text = torch.randint(3, 97, (1, 20))
    with torch.no_grad():
        whole, start = case.model(text).logits[:, :4], case.model(text[:, :4]).logits
    assert difference(whole, start) <= TOLERANCE


@torch.no_grad()
def test_a_conversation_keeps_the_prompt_that_it_began_with():
    case = Case("LLaMA")
    mp.attach_prompt(case.model, 4, init_std=1.0)
    whole = case.logits()
    cache = case.model(case.text[:, :4], use_cache=True).past_key_values
    own = {name: value.clone() for name, value in mp.adapter_state_dict(case.model).items()}
    other = {name: torch.randn_like(value) for name, value in own.items()}
    mp.load_adapter_state_dict(case.model, other)
    case.model(case.text)
    for state in (other, own):  # whichever is there now
        mp.load_adapter_state_dict(case.model, state)
        again = copy.deepcopy(cache)
        rest = case.model(case.text[:, 4:], past_key_values=again).logits
        assert difference(rest, whole[:, 4:]) <= TOLERANCE


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


def test_packed_texts_and_a_window_that_leaves_the_prefix_behind():
    case = Case("Mistral, window")
    case.attach(tokens=False, window="like_token")
    numbers = torch.cat([torch.arange(12), torch.arange(8)])[None]
    text = torch.randint(3, 97, (1, 20))
    with pytest.raises(ValueError, match="texts are packed"):
        case.logits(text=text, position_ids=numbers, use_cache=False)


def test_baking_a_prompt_in_training_mode_bakes_no_dropout():
    case = Case("LLaMA")
    prefix = mp.attach_prompt(case.model, 3, kind="lstm", dropout=0.5)
    before = case.logits()
    case.model.train()
    prefix.bake()
    case.model.eval()
    assert difference(case.logits(), before) <= TOLERANCE


def test_remove_refuses_before_it_takes_anything_off():
    case = Case("LLaMA")
    random_lora(case.model)
    case.attach()
    mp.merge(case.model)
    before = case.logits()
    with pytest.raises(ValueError, match="is merged"):
        mp.remove(case.model, name="default")
    assert torch.equal(case.logits(), before) and hasattr(case.model, "minipeft_prefix")


def test_a_head_under_lora_is_not_left_behind():
    import transformers

    config = transformers.LlamaConfig(**SIZES, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    text = torch.randint(3, 97, (2, 9))
    before = model(text).logits.detach()
    prefix = mp.attach_prefix(model, 5, name="first")
    mp.add_adapter(model, "lora", "score", 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "copy" in name:
                parameter.add_(1.0)
    with pytest.raises(ValueError, match="another adapter over it"):
        prefix.remove()
    mp.remove(model, name="first")
    assert torch.equal(model(text).logits, before)


def test_rows_chosen_in_inference_mode_can_be_chosen_again():
    case = Case("LLaMA")
    prefix = case.attach()
    mp.attach_prefix(case.model, 3, name="other")
    with torch.inference_mode():
        mp.use_adapters(case.model, rows=["default", "other"])
        with prefix.use(["other", None]):
            pass
    mp.use_adapters(case.model, rows=["other", "default"])
    rows = case.logits()
    for row, name in enumerate(["other", "default"]):
        mp.use_adapters(case.model, name)
        assert difference(rows[row], case.logits()[row]) <= TOLERANCE


def test_heads_go_on_and_off_with_their_prefix_and_a_second_prefix_is_told():
    import transformers

    config = transformers.BertConfig(**FAMILIES["BERT"].sizes, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    text = torch.randint(3, 97, (2, 9))
    before = model(text).logits.detach()
    prefix = mp.attach_prefix(model, 5, name="first")
    with torch.no_grad():
        model.classifier.copy.weight.add_(1.0)
    trained = model(text).logits.detach()
    with prefix.use(None):
        assert torch.equal(model(text).logits, before)
    with pytest.raises(ValueError, match="would answer for every row"), prefix.use(["first", None]):
        pass
    assert torch.equal(model(text).logits, trained) and difference(trained, before) > 1e-3
    with pytest.warns(UserWarning, match="'second' has none of its own"):
        mp.attach_prefix(model, 5, name="second")


def test_rows_of_a_prefix_with_a_head_use_its_head():
    import transformers

    config = transformers.BertConfig(**FAMILIES["BERT"].sizes, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    text = torch.randint(3, 97, (3, 9))
    before = model(text).logits.detach()
    prefix = mp.attach_prefix(model, 5, name="first")
    with torch.no_grad():
        model.classifier.copy.weight.add_(1.0)
    trained = model(text).logits.detach()
    mp.use_adapters(model, rows=["first", None, "first"])
    mixed = model(text).logits
    assert difference(mixed[[0, 2]], trained[[0, 2]]) <= TOLERANCE
    assert difference(mixed[1], before[1]) <= TOLERANCE
    with pytest.raises(ValueError, match="head of a prefix differs by row"), prefix.use(None):
        pass
    mp.use_adapters(model, "first")
    assert torch.equal(model(text).logits, trained)


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


def test_a_prefix_that_is_off_while_rows_use_it_is_named():
    case = Case("LLaMA")
    prefix = case.attach()
    mp.attach_prefix(case.model, 3, name="other")
    mp.use_adapters(case.model, rows=["default", "other"])
    prefix.encoders["other"].enabled = False
    with pytest.raises(ValueError, match="prefix 'other' is off, and rows use it"):
        case.logits()


def test_masks_for_one_row_for_all_slots_and_from_the_model_that_was_copied():
    case = Case("LLaMA")
    mp.attach_prefix(case.model, 3, gated=True)
    case.logits(attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
    bloom = Case("BLOOM")
    mask = torch.ones_like(bloom.text)
    mask[0, :3] = 0
    settings = GREEDY | {"attention_mask": mask, "max_new_tokens": 8}
    plain = bloom.model.generate(bloom.text, cache_implementation="static", **settings)
    bloom.attach(tokens=False)
    with bloom.model.minipeft_prefix.use(None):
        off = bloom.model.generate(bloom.text, cache_implementation="static", **settings)
    assert torch.equal(off, plain)
    dynamic = bloom.model.generate(bloom.text, **settings)
    static = bloom.model.generate(bloom.text, cache_implementation="static", **settings)
    assert torch.equal(static, dynamic)
    first = Case("LLaMA")
    first.attach()
    twin = copy.deepcopy(first.model)
    mp.attach_prefix(first.model, 3, name="other")
    expected = twin.generate(first.text, **GREEDY)
    again = copy.deepcopy(first.model)
    mp.attach_prefix(first.model, 4, name="third")
    again.minipeft_prefix.remove(name="other")
    static = again.generate(first.text, cache_implementation="static", **GREEDY)
    assert torch.equal(static, expected)


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


def test_a_gated_prefix_moves_no_token_also_beside_another():
    case = Case("GPT-2")
    prefix = case.attach(tokens=False)
    before = case.logits()
    mp.attach_prefix(case.model, 3, name="gated", gated=True)
    assert difference(case.logits(), before) <= TOLERANCE
    assert prefix.position == "shift"
