"""Hugging Face models: Trainer, saving, generating, checkpointing."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minipeft as mp
from benchmarks.models import enable_checkpointing

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def make():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def injected():
    model = make()
    mp.inject_qlora(model, "all-linear", 4)
    for name, parameter in mp.adapter_state_dict(model).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.filterwarnings("ignore")  # Trainer's own, about pinned memory and tokens
def test_five_steps_of_trainer_then_load_and_generate(tmp_path):
    model = injected()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 100, (10, 12))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_steps=5,
    )  # fmt: skip
    before = {name: value.clone() for name, value in mp.adapter_state_dict(model).items()}
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.lora_a"],
                           model.model.layers[0].mlp.up_proj.lora_a)  # fmt: skip
    prompt = torch.randint(3, 100, (2, 5))
    expected = model.eval().generate(prompt, max_new_tokens=8, do_sample=False)
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        assert (folder / "adapter_model.safetensors").is_file()
        fresh = make()
        mp.quantize_model(fresh)
        mp.load_peft(fresh, folder)
        fresh.eval()
        with torch.no_grad():
            assert torch.equal(fresh(prompt).logits, model(prompt).logits)
        assert torch.equal(fresh.generate(prompt, max_new_tokens=8, do_sample=False), expected)


def test_save_pretrained_writes_the_adapter_and_no_weight_of_the_base(tmp_path):
    model = injected()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    }
    own = mp.adapter_state_dict(model).keys()
    assert load_file(tmp_path / "model.safetensors").keys() == own
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "lm_head" not in config["target_modules"]
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="upload"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_copies_save_their_own_adapter(tmp_path):
    model = injected()
    for number, again in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        name, first = next(iter(mp.adapter_state_dict(again).items()))
        first.fill_(number + 5.0)
        again.save_pretrained(tmp_path / str(number))
        fresh = make()
        with pytest.warns(UserWarning, match="was saved over 4-bit layers, and .* is dense here"):
            mp.load_peft(fresh, tmp_path / str(number))
        assert (mp.adapter_state_dict(fresh)[name] == number + 5.0).all()


def test_without_adapters_save_pretrained_is_the_models_own_or_refuses(tmp_path):
    model = make()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    mp.inject_lora(model, "all-linear", 2)
    mp.remove(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in expected.items())
    mp.quantize_model(model)
    with pytest.raises(ValueError, match="save_quantized"):
        model.save_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_activation_checkpointing_equal_those_without(reentrant):
    model, ids = injected(), torch.randint(3, 100, (2, 9))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, reentrant=reentrant)
            if reentrant:  # re-entrant checkpoints pass gradients only if an input needs one
                model.enable_input_require_grads()
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in mp.adapter_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lora_and_a_prefix_of_one_name_come_back_by_both_functions(tmp_path):
    model, ids = make(), torch.randint(3, 100, (2, 7))
    mp.inject_lora(model, "all-linear", 2)
    mp.attach_prefix(model, 4)
    for parameter in mp.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    with pytest.raises(ValueError, match="save_pretrained, which load_peft and load_prefix read"):
        mp.save_peft(model, tmp_path)
    model.save_pretrained(tmp_path)
    fresh = make()
    mp.load_peft(fresh, tmp_path)
    mp.load_prefix(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
