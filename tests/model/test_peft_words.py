"""Words of other libraries get an error that says this library's."""

import inspect

import pytest
from torch import nn

import minipeft as mp
from minipeft.model.peft_words import BITSANDBYTES, OURS

FUNCTIONS = [mp.inject_lora, mp.inject_qlora, lambda model, *a, **k: mp.inject_lora(
    model, *a, **k, name="second")]  # fmt: skip
OF_LORA = list(OURS)[: list(OURS).index("encoder_hidden_size")]  # the rest is of prefixes


def model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


@pytest.mark.parametrize("function", FUNCTIONS, ids=["inject_lora", "inject_qlora", "one more"])
@pytest.mark.parametrize("word", OF_LORA)
def test_a_word_of_peft_gets_ours_and_nothing_changes(function, word):
    plain = model()
    before = [(name, id(part)) for name, part in plain.named_modules()]
    with pytest.raises(TypeError, match=f"PEFT's {word} is here"):
        function(plain, ["0"], **{word: 8})
    with pytest.raises(TypeError, match=f"no keyword '{word}'"):
        function(plain, ["0"], 4, **{word: 8})
    assert [(name, id(part)) for name, part in plain.named_modules()] == before


def test_every_argument_by_the_words_of_peft():
    with pytest.raises(TypeError, match="PEFT's target_modules is here target"):
        mp.inject_lora(model(), target_modules=["0"], r=8, lora_alpha=16)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("drpout", "did you mean dropout"), ("lora_r", "it takes model, target, rank, alpha"),
     ("lora_alphas", "did you mean alpha")],
)  # fmt: skip
def test_a_word_of_nobody_gets_the_nearest_one_or_all(word, hint):
    with pytest.raises(TypeError, match=hint):
        mp.inject_lora(model(), ["0"], 4, **{word: 0.1})


def test_words_that_are_known_pass():
    names = mp.inject_lora(
        model(), ["0"], rank=2, alpha=4, exclude=["2"], dropout=0.1, rank_stabilized=True,
        init=mp.starts.gaussian(), dora=True,
    )  # fmt: skip
    assert names == ["0"]


def test_signature_and_docstring_stay():
    parameters = inspect.signature(mp.inject_lora).parameters
    assert list(parameters)[:4] == ["model", "target", "rank", "alpha"]
    assert mp.inject_lora.__doc__.startswith("Wrap the layers")


OTHERS = [
    (mp.attach_prefix, "num_virtual_tokens", "PEFT's num_virtual_tokens is here prefix_length"),
    (mp.attach_prefix, "layers_to_transform", "PEFT's layers_to_transform is here layers"),
    (mp.attach_prompt, "num_virtual_tokens", "PEFT's num_virtual_tokens is here prompt_length"),
    (mp.attach_prompt, "prompt_tuning_init_text", "is here init, the token ids"),
    (mp.attach_prompt, "knd", "did you mean kind"),
    (mp.load_peft, "adapter_name", "PEFT's adapter_name is here name"),
    (mp.load_peft, "r", "it takes model, path, name, strict"),  # it takes no rank
    (mp.save_peft, "selected_adapters", "is here name"),
    (mp.save_prefix, "save_directory", "is here path"),
    (mp.load_prefix, "model_id", "is here path"),
    (mp.merge, "name", "name is here minipeft.use_adapters"),
    (mp.merge, "adapter_names", "is here minipeft.use_adapters"),
    (mp.merge, "foo", "it takes model"),
    (mp.remove, "requantise", "did you mean requantize"),
    (mp.use_adapters, "adapter_names", "is here names"),
    (mp.combine_adapters, "combination_type", "is here method"),
    (mp.combine_adapters, "adapter_name", "is here new_name"),
    (mp.quantize_model, "blocksize", "bitsandbytes' blocksize is here block_size"),
    (mp.quantize_model, "blok_size", "did you mean block_size"),
    (mp.quantize_model, "load_in_4bit", "is here nothing"),
    (mp.quantize_model, "foo", "skip, also, embeddings, experts, head, block_size, double_quant"),
    (mp.load_quantized, "bnb_4bit_compute_dtype", "is here compute_dtype"),
    (mp.LoRALinear, "r", "LoRALinear: no keyword 'r'; PEFT's r is here rank"),
    (mp.layers.DoRALinear, "lora_alpha", "DoRALinear: .* is here alpha"),
    (mp.layers.LoRAFusedLinear, "slice", "did you mean slices"),
    (mp.NF4Linear, "blocksize", "NF4Linear: .* is here block_size"),
    (mp.PrefixEncoder, "num_virtual_tokens", "PrefixEncoder: .* is here prefix_length"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "word", "hint"), OTHERS)
def test_every_function_that_takes_keywords_answers_so(function, word, hint):
    with pytest.raises(TypeError, match=hint):
        function(**{word: 8})


@pytest.mark.parametrize("word", BITSANDBYTES)
def test_words_of_bitsandbytes_get_ours(word):
    with pytest.raises(TypeError, match=f"bitsandbytes' {word} is here {BITSANDBYTES[word][:5]}"):
        mp.quantize_model(model(), **{word: 8})


STARTS = [name for name in mp.starts.__all__ if name != "eva"]


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_start_by_its_name_or_not_called_says_call_it(name, by_name):
    init = name if by_name else getattr(mp.starts, name)
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=rf"call it: init=minipeft.starts.{name}\(\)"):
            function(model(), ["0"], 4, init=init)
    for kind in (mp.LoRALinear, mp.layers.DoRALinear):
        with pytest.raises(TypeError, match=rf"{kind.__name__}: .*call it: .*{name}\(\)"):
            kind(nn.Linear(8, 8), 2, init=init)
    mp.LoRALinear(nn.Linear(8, 8), 2, init=mp.starts.gaussian())  # called, it passes


def test_other_starts_that_are_none():
    for init in ("eva", mp.starts.eva):
        with pytest.raises(TypeError, match=r"after injecting: minipeft\.starts\.eva"):
            mp.inject_lora(model(), ["0"], 4, init=init)
    with pytest.raises(TypeError, match=r"call it: init=minipeft\.starts\.pissa"):
        mp.inject_lora(model(), ["0"], 4, init="pissa_niter_16")  # PEFT's
    for init in (True, "kaiming"):
        with pytest.raises(TypeError, match=r"starts are made by a call, of .*'gaussian'"):
            mp.inject_lora(model(), ["0"], 4, init=init)

    def my_start(size=1.0):
        return lambda layer: nn.init.constant_(layer.lora_a, getattr(size, "rank", size))

    with pytest.raises(TypeError, match=r"0: init: .*my_start.* made another function; call it"):
        mp.inject_lora(model(), ["0"], 4, init=my_start)
    wrapped = model()
    mp.inject_lora(wrapped, ["0"], 4, init=my_start(3.0))
    assert (wrapped[0].lora_a == 3).all()


@pytest.mark.parametrize("value", ["float32", float])
def test_a_dtype_that_is_none_says_what_is_expected(value):
    for function, word in [
        (lambda **k: mp.inject_lora(model(), ["0"], 4, **k), "dtype"),
        (lambda **k: mp.LoRALinear(nn.Linear(8, 8), 4, **k), "dtype"),
        (lambda **k: mp.quantize_model(model(), **k), "compute_dtype"),
        (lambda **k: mp.inject_qlora(model(), ["0"], 4, **k), "compute_dtype"),
        (lambda **k: mp.NF4Linear(64, 64, **k), "compute_dtype"),
        (lambda **k: mp.train_modules(model(), ["0"], **k), "dtype"),
        (lambda **k: mp.load_quantized(model(), "folder", **k), "dtype"),
    ]:
        with pytest.raises(TypeError, match=f"{word}="):
            function(**{word: value})


LINES = """
import warnings, torch, tempfile, minipeft as mp
from torch import nn

tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
tied[1].weight = tied[0].weight
four_bit = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
folder = tempfile.mkdtemp()
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as seen:
    mp.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)))
    mp.inject_qlora(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)), ["0"], 2)
    mp.LoRALinear(nn.Linear(4, 4), 8)
    mp.train_modules(tied, ["1"])
    mp.inject_qlora(four_bit, ["0"], 4, init=mp.starts.loftq(), head=())
    mp.save_peft(four_bit, folder)
    mp.load_peft(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), folder)
    mp.save_quantized(four_bit, folder + "/4bit")
    mp.remove(four_bit, merge=True, requantize=True)
for warning in seen:
    print(str(warning.message).split(":")[0][:12], warning.lineno, warning.filename == __file__)
"""


def test_warnings_point_to_the_line_of_the_caller(plain_python):
    first = LINES.splitlines().index("with warnings.catch_warnings(record=True) as seen:") + 1
    printed = [line.rsplit(maxsplit=2)[1:] for line in plain_python(LINES).splitlines()]
    assert printed == [[str(first + n), "True"] for n in (1, 2, 3, 4, 6, 7, 8, 9)], printed
