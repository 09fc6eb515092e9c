"""Prefixes on published modelling files that hand layers their past in tuples.

    python -m benchmarks.tuple_caches FOLDER

FOLDER has modeling_chatglm.py and configuration_chatglm.py of ChatGLM-6B, or the two files of MOSS
(modeling_moss.py, configuration_moss.py) or of Baichuan-7B, as their authors published them.  They
are run: look at them first.  What transformers 5 no longer has is put in their place, weights are
random and small.  A line each: how far a prefix is from the same keys and values given by hand, and
from ChatGLM's own prefix encoder for a checkpoint of P-tuning v2, and how far the GLM module of
examples/recipes is from ChatGLM's code.
"""

import argparse
import copy
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minipeft as mp
from benchmarks.output import add_output, keep
from examples.recipes.glm import GLM, GLMConfig
from minipeft.io.prefixes import load_prefix_encoder

LENGTH = 4
# decorators of documentation that transformers 5 does not have
DECORATORS = """
from transformers.utils import logging
def _as_it_is(*args, **kwargs):
    return lambda function: function
add_start_docstrings = add_start_docstrings_to_model_forward = _as_it_is
add_code_sample_docstrings = replace_return_docstrings = _as_it_is
"""


def load(folder: Path, name: str) -> Any:
    """One published file as a module."""
    path = folder / f"{name}.py"
    text = re.sub(r"from transformers\.utils import (\([^)]*\)|.*add_start.*)", DECORATORS,
                  path.read_text())  # fmt: skip
    text = text.replace("import PreTrainedModel, add_start_docstrings", "import PreTrainedModel")
    text = text.replace("from xformers import ops as xops", "xops = None  # for training alone")
    text = re.sub(r"from \.(\w+) import", r"from \1 import", text)
    text = text.replace("torch.half", "torch.float").replace(".half()", ".float()")
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module


def small(make: Any, base: Any, config: Any) -> Any:
    """A small random model, in float32."""
    base.get_head_mask = lambda self, mask, layers, *rest: [None] * layers
    base.all_tied_weights_keys, base._tied_weights_keys = {}, None
    torch.manual_seed(0)
    model = make(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def steps(model: Any, first: Any, later: Any) -> Tensor:
    """The logits of what comes after a first part, from the cache."""
    cache = model(**first, use_cache=True).past_key_values
    logits: Tensor = model(**later, past_key_values=cache, use_cache=True).logits
    return logits


def moss(folder: Path) -> dict[str, float]:
    """MOSS: pairs (batch, heads, tokens, size)."""
    config, files = load(folder, "configuration_moss"), load(folder, "modeling_moss")
    settings = config.MossConfig(
        vocab_size=60, n_positions=64, n_ctx=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return with_batch_first(small(files.MossForCausalLM, files.MossPreTrainedModel, settings))


def baichuan(folder: Path) -> dict[str, float]:
    """Baichuan-7B: pairs (batch, heads, tokens, size), which it takes in eval mode alone."""
    config, files = load(folder, "configuration_baichuan"), load(folder, "modeling_baichuan")
    settings = config.BaiChuanConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return with_batch_first(small(files.BaiChuanForCausalLM, files.PreTrainedModel, settings))


def with_batch_first(model: Any) -> dict[str, float]:
    """The figures of a model with pairs (batch, heads, tokens, size) in two layers."""
    ids, prompt = torch.randint(3, 60, (2, 6)), torch.tensor([[7, 8, 9, 10]])
    prefix = mp.attach_prefix(model, LENGTH)
    prefix.load_tokens(prompt)
    pairs = tuple(
        tuple(t[None].expand(2, -1, -1, -1) for t in prefix.encoder.layer(i)) for i in range(2)
    )
    found, whole = model(ids).logits, torch.cat([prompt.expand(2, -1), ids], 1)
    with mp.disable_adapters(model):
        by_hand = model(
            ids, past_key_values=pairs, attention_mask=torch.ones(2, 10, dtype=torch.long)
        ).logits
        tokens = model(whole).logits[:, LENGTH:]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    return {
        "by hand": off(found, by_hand), "as tokens": off(found, tokens),
        "padded": off(model(padded, attention_mask=mask).logits[:, 3:], found),
        "from the cache": off(
            steps(model, {"input_ids": ids[:, :4]}, {"input_ids": ids[:, 4:]}), found[:, 4:]
        ),
    }  # fmt: skip


def chatglm(folder: Path) -> dict[str, float]:
    """ChatGLM-6B: pairs (tokens, batch, heads, size), ids with [gMASK] and bos, two positions."""
    config, files = load(folder, "configuration_chatglm"), load(folder, "modeling_chatglm")
    settings = config.ChatGLMConfig(
        vocab_size=60, hidden_size=16, num_layers=2, num_attention_heads=2, inner_hidden_size=64,
        max_sequence_length=64, bos_token_id=55, eos_token_id=56, mask_token_id=57,
        gmask_token_id=58, pad_token_id=59,
    )  # fmt: skip
    kind = files.ChatGLMForConditionalGeneration
    model = small(kind, files.ChatGLMPreTrainedModel, settings)
    ids = torch.tensor([[5, 6, 7, 58, 55, 8, 9], [15, 16, 17, 58, 55, 18, 19]])
    bare, example = copy.deepcopy(model), {"input_ids": ids[:1]}
    prefix = mp.attach_prefix(model, LENGTH, example=example)
    for table in prefix.encoder.tables:
        table.normal_()
    pairs = tuple(
        tuple(t.permute(1, 0, 2)[:, None].expand(-1, 2, -1, -1) for t in prefix.encoder.layer(i))
        for i in range(2)
    )
    base = bare.transformer
    mask = base.get_masks(ids, device=ids.device)
    numbers = base.get_position_ids(ids, mask_positions=[3, 3], device=ids.device,
                                    use_gmasks=[True, True])  # fmt: skip
    mask = torch.cat([mask.new_zeros(*mask.shape[:-1], LENGTH), mask], -1)
    by_hand = bare(ids, past_key_values=pairs, attention_mask=mask, position_ids=numbers).logits
    found = {"by hand": off(model(ids).logits, by_hand)}
    later = {"input_ids": ids[:, -1:], "position_ids": numbers[..., -1:]}
    found["from the cache"] = off(steps(model, {"input_ids": ids[:, :-1]}, later),
                                  by_hand[:, -1:])  # fmt: skip

    settings.pre_seq_len = LENGTH
    theirs = small(kind, files.ChatGLMPreTrainedModel, settings)
    theirs.load_state_dict(bare.state_dict(), strict=False)
    state = theirs.transformer.prefix_encoder.state_dict()
    load_prefix_encoder(
        bare, {f"transformer.prefix_encoder.{name}": t for name, t in state.items()},
        example=example,
    )  # fmt: skip
    found["P-tuning checkpoint"] = off(bare(ids).logits, theirs(ids).logits)

    own = GLM(GLMConfig(60, 16, 2, 2, gmask_token_id=58, bos_token_id=55)).eval()
    for layer in own.transformer.layers:
        layer.alpha = 56**0.5  # of 28 layers, which is what their code takes whatever there is
    own.load_state_dict(mp.base_state_dict(bare))
    with mp.disable_adapters(bare):
        found["module of the recipes"] = off(own(ids).logits, bare(ids).logits)
    return found


@torch.no_grad()
def main() -> int:
    """Print a line for each model whose files are there, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuple_caches", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    add_output(parser)
    arguments = parser.parse_args()
    folder = arguments.folder
    there = [run for run in (moss, baichuan, chatglm)
             if folder and (folder / f"modeling_{run.__name__}.py").exists()]  # fmt: skip
    if not there:
        print(f"tuple_caches: expected a folder with modeling_chatglm.py, modeling_moss.py or "
              f"modeling_baichuan.py, got {folder}; --help says where they come from",
              file=sys.stderr)  # fmt: skip
        return 2
    figures = {}
    for run in there:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run(folder)
        figures[run.__name__] = found
        print(f"{run.__name__}: " + ", ".join(f"{n} {value:.1e}" for n, value in found.items()))
    keep(arguments, "tuple_caches", largest_differences=figures)
    return int(any(value > 2e-6 for found in figures.values() for value in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
