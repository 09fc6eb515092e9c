"""The special steps and the files of the survey's systems, each as a function that measures it."""

import argparse
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minipeft as mp
from minipeft.io.delta import apply_delta, make_delta
from minipeft.io.lora import load_lora, save_meta_lora
from minipeft.io.meta import load_meta, save_meta
from minipeft.io.prefixes import load_prefix_encoder
from minipeft.io.rotary import pairs_from_halves
from minipeft.layers.fused import LoRAFusedLinear, model_parallel, per_group, per_head

Step = Callable[[Any], float]  # of a System
ROWS = {  # the model's layer, and the rows of its parts: 4 heads of 16
    "glm": ("query_key_value", lambda: per_head(4, 16)),
    "bloom": ("query_key_value", lambda: per_head(4, 16)),
    "falcon-7b": ("query_key_value", lambda: per_group(4, 1, 16)),
    "falcon-40b": ("query_key_value", lambda: per_group(4, 2, 16)),
    "falcon-rw": ("query_key_value", lambda: per_head(4, 16)),
    "moss": ("qkv_proj", lambda: model_parallel(4, 16)),
}


def after_a_step(model: nn.Module, inputs: dict[str, Tensor], lr: float = 1e-2) -> Tensor:
    """The logits after two steps of AdamW on all that trains; in the first A has no gradient.

    Raises:
        ValueError: the steps changed no logit, so that equal logits would say nothing.
    """
    with torch.no_grad():
        before = model(**inputs).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    if (logits - before).abs().max() < 1e-3:
        raise ValueError("two steps changed no logit by 0.001")
    return logits


@torch.no_grad()
def off(model: nn.Module, logits: Tensor, inputs: dict[str, Tensor]) -> float:
    """How far the model's logits are from these."""
    return float((model(**inputs).logits - logits).abs().max())


@torch.no_grad()
def cache_off(model: Any, inputs: dict[str, Tensor]) -> float:
    """Logits of four generated tokens with a cache, beside those without one.

    Of the GLM module, which generate does not know, and of vectors, for which generate always keeps
    a cache: the last token's logits from a cache of the others, beside one forward's.
    """
    glm = hasattr(model, "positions")
    if not glm and "inputs_embeds" not in inputs:
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False,
                    "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
        mask = {"attention_mask": torch.ones(2, 9, dtype=torch.long)}
        one, other = (
            torch.stack(model.generate(**inputs, **mask, **settings, use_cache=cached).logits)
            for cached in (True, False)
        )
        return float((one - other).abs().max())
    first = {name: value[:, :-1] for name, value in inputs.items()}
    last = {name: value[:, -1:] for name, value in inputs.items()}
    if glm:  # numbers a token by its text
        last["position_ids"] = model.positions(inputs["input_ids"])[0][..., -1:]
    cache = model(**first, use_cache=True).past_key_values
    return off(model, model(**inputs).logits[:, -1:], {**last, "past_key_values": cache})


def worst(*values: float) -> float:
    """The largest, and NaN if any is: Python's max passes over a NaN behind a number."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def differences(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    state = other.state_dict()
    return worst(*(float((t - state[name]).abs().max()) for name, t in one.state_dict().items()))


def trained(system: Any) -> tuple[nn.Module, Tensor]:
    """The system's model with its LoRA after a step, and the logits."""
    model = system.build()
    mp.inject_lora(model, system.targets, system.rank, system.alpha)
    return model, after_a_step(model, system.inputs())


def peft_bin(system: Any) -> float:
    """The adapter's weights in adapter_model.bin, a pickled file."""
    from safetensors.torch import load_file

    model, logits = trained(system)
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        weights = Path(folder) / "adapter_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        other = system.build()
        mp.load_peft(other, folder)
    return off(other, logits, system.inputs())


def trains_on(system: Any) -> float:
    """Further steps of a loaded adapter, beside those of the model that wrote it."""
    model, _ = trained(system)
    other = system.build()
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        mp.load_peft(other, folder)
    return float(
        (after_a_step(model, system.inputs()) - after_a_step(other, system.inputs())).abs().max()
    )


def meta_checkpoint(system: Any) -> float:
    """Written as consolidated.00.pth and .01.pth, and read."""
    model, other = system.build(), system.build()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        save_meta(model, Path(folder) / "meta", shards=2)
        load_meta(other, Path(folder) / "meta")
    return differences(model, other)


def codes_stay(system: Any) -> float:
    """The 4-bit codes and scales, before and after a step."""
    model = system.build()
    mp.inject_qlora(model, system.targets, system.rank, system.alpha)
    packed = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    after_a_step(model, system.inputs())
    state = model.state_dict()
    return max(float((t.int() - state[n].int()).abs().max()) for n, t in packed.items())


def moved(model: nn.Module) -> nn.Module:
    """The model with all weights changed, as full training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def _delta(system: Any, *, pad: bool, dtype: torch.dtype, published: bool) -> float:
    """A difference, ours or as its authors made it, added to the base; beside the tuned model."""
    from transformers import LlamaForCausalLM

    base, tuned = system.build().to(dtype), system.build().to(dtype)
    if pad:  # one more row, started at the mean of the others
        tuned.resize_token_embeddings(len(tuned.get_input_embeddings().weight) + 1)
        with torch.no_grad():
            for table in (tuned.get_input_embeddings(), tuned.get_output_embeddings()):
                table.weight[-1] = table.weight[:-1].mean(0)
    start = {name: t.clone() for name, t in tuned.state_dict().items()}
    moved(tuned)
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / name for name in ("base", "tuned", "delta", "made")]
        base.save_pretrained(paths[0])
        tuned.save_pretrained(paths[1])
        rows = {"rows": "mean"} if pad else {}
        if published:  # as theirs: a difference in a pickled file
            tuned.config.save_pretrained(paths[2])
            change = {n: t - start[n] for n, t in tuned.state_dict().items()}
            torch.save(change, paths[2] / "pytorch_model.bin")
            expected = {n: start[n] + t for n, t in change.items()}
            apply_delta(paths[0], paths[2], paths[3], **rows)
        else:
            expected = tuned.state_dict()
            make_delta(*paths[:3], dtype=dtype, **rows)
            apply_delta(paths[0], paths[2], paths[3])
        made = LlamaForCausalLM.from_pretrained(paths[3], dtype=dtype).state_dict()
    return worst(*(float((t.float() - made[n].float()).abs().max()) for n, t in expected.items()))


def delta_with_pad(system: Any) -> float:
    """Alpaca's difference in float32, with a row more than the base has."""
    return _delta(system, pad=True, dtype=torch.float32, published=False)


def delta_float16(system: Any) -> float:
    """Vicuna's difference in float16."""
    return _delta(system, pad=False, dtype=torch.float16, published=False)


def foreign_delta(system: Any) -> float:
    """A difference as Alpaca published it."""
    return _delta(system, pad=True, dtype=torch.float32, published=True)


def foreign_delta_float16(system: Any) -> float:
    """A difference as Vicuna published it."""
    return _delta(system, pad=False, dtype=torch.float16, published=True)


def in_order(system: Any) -> float:
    """Two adapters with new rows, merged in order, beside the model that they were made on."""
    model, plain = system.build(), system.build()
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / "first", Path(place) / "second"]
        for folder, rows in zip(folders, (13, 1), strict=True):
            mp.extend_vocabulary(model, rows, whole_table=True)
            mp.inject_lora(model, system.targets, system.rank, system.alpha)
            after_a_step(model, system.inputs())
            mp.save_peft(model, folder)
            mp.remove(model, merge=True)
        mp.merge_in_order(plain, folders)
    with torch.no_grad():
        return off(plain, model(**system.inputs()).logits, system.inputs())


def longer_tied(system: Any) -> float:
    """13 rows behind a table that the head shares, trained whole beside LoRA, and loaded."""
    model, other = system.build(), system.build()
    mp.extend_vocabulary(model, 13, whole_table=True)
    mp.inject_lora(model, system.targets, system.rank, system.alpha)
    logits = after_a_step(model, system.inputs())
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        other.resize_token_embeddings(logits.shape[-1], mean_resizing=False)
        mp.load_peft(other, folder)
    return off(other, logits, system.inputs())


def slices(kind: str) -> Step:
    """LoRA on the queries and values alone of a fused projection, saved and loaded."""

    def measure(system: Any) -> float:
        target, make = ROWS[kind]
        model, other, rows = system.build(), system.build(), make()
        inputs = system.inputs()
        if kind == "glm" and "q_proj" in system.targets:  # Chinese-Vicuna's other model
            from benchmarks import families

            model, other, inputs = families.glm(), families.glm(), families.glm_text()
        names = mp.inject(
            model, [target],
            lambda base: LoRAFusedLinear(base, {"q": 8, "v": 8}, {"q": 16, "v": 16}, slices=rows),
        )  # fmt: skip
        logits = after_a_step(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            mp.save_peft(model, folder)
            mp.load_peft(other, folder)
        keys = other.get_submodule(names[0]).delta()[rows["k"]].abs().max()
        return worst(off(other, logits, inputs), float(keys))

    return measure


def merged_linear(system: Any) -> float:
    """loralib's MergedLinear on ChatGLM, in a pickled file, beside the product by hand."""
    from benchmarks import families

    model, generator = families.glm(), torch.Generator().manual_seed(2)
    name = "transformer.layers.0.attention.query_key_value"
    a = torch.randn(12, 64, generator=generator)
    b = torch.randn(192, 4, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.pt"
        torch.save({f"{name}.lora_A": a, f"{name}.lora_B": b}, path)
        load_lora(model, path, alpha=8, enable_lora=[True, True, True])
    parts = [b[64 * i : 64 * i + 64] @ a[4 * i : 4 * i + 4] * 2 for i in range(3)]
    return float((model.get_submodule(name).delta() - torch.cat(parts)).abs().max())


def _prefixed(system: Any, build: Callable[[], Any]) -> tuple[Any, Tensor]:
    model = build()
    mp.attach_prefix(model, 4, **system.example())
    return model, after_a_step(model, system.inputs(), lr=0.5)


def prefix_over_nf4(system: Any) -> float:
    """A prefix in float32 before 4-bit layers, saved and loaded."""

    def build() -> Any:
        model = system.build()
        mp.quantize_model(model)
        return model

    model, logits = _prefixed(system, build)
    other = build()
    with tempfile.TemporaryDirectory() as folder:
        mp.save_prefix(model, folder)
        mp.load_prefix(other, folder, **system.example())
    return off(other, logits, system.inputs())


def chatglm_prefix(system: Any) -> float:
    """A prefix under ChatGLM's name in pytorch_model.bin."""
    model, logits = _prefixed(system, system.build)
    (encoder,) = [m for m in model.modules() if isinstance(m, mp.PrefixEncoder)]
    other = system.build()
    with tempfile.TemporaryDirectory() as folder:
        key = "transformer.prefix_encoder.embedding.weight"
        torch.save({key: encoder.flat().detach()}, Path(folder) / "pytorch_model.bin")
        load_prefix_encoder(other, folder, **system.example())
    return off(other, logits, system.inputs())


def sat(system: Any) -> float:
    """VisualGLM's three pairs by head and dense, in SwissArmyTransformer's file."""
    rows, model, other = per_head(4, 16), system.build(), system.build()
    fused = mp.inject(
        model, ["query_key_value"], lambda base: LoRAFusedLinear(base, 10, 1, slices=rows)
    )
    dense = mp.inject(model, ["attention.dense"], lambda base: mp.LoRALinear(base, 10, 1))
    logits = after_a_step(model, system.inputs())
    found: dict[str, Tensor] = {}
    for name in fused:
        for i, pair in enumerate(model.get_submodule(name).slice_factors().values()):
            for letter, t in zip("AB", pair, strict=True):
                found[f"{name}.matrix_{letter}.{i}"] = t.detach().clone()
    for name in dense:
        layer = model.get_submodule(name)
        found[f"{name}.matrix_A"], found[f"{name}.matrix_B"] = layer.lora_a.data, layer.lora_b.data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mp_rank_00_model_states.pt"
        torch.save({"module": found, "args": argparse.Namespace(lora_rank=10)}, path)
        load_lora(other, path, alpha=1, slices={"query_key_value": rows})
    return off(other, logits, system.inputs())


@torch.no_grad()
def rotary_rows(system: Any) -> float:
    """Scores of attention by Meta's arithmetic, from rows in pairs, beside transformers' own."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.enable_grad():
        model: Any = trained(system)[0]
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 9, 64)
    query, key = (p(x).view(1, 9, 4, 16).transpose(1, 2)
                  for p in (attention.q_proj, attention.k_proj))  # fmt: skip
    turns = model.model.rotary_emb(x, torch.arange(9)[None])
    query, key = apply_rotary_pos_emb(query, key, *turns)
    angles = torch.outer(torch.arange(9.0), 10000.0 ** (-torch.arange(0, 16, 2) / 16))

    def by_meta(weight: Tensor) -> Tensor:
        """Neighbours as complex numbers, turned: (1, heads, tokens, dim)."""
        pairs = (x @ weight.T).view(1, 9, 4, 8, 2)
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones(9, 8), angles)[:, None]
        return torch.view_as_real(turned).flatten(3).transpose(1, 2)

    adapted, plain = attention.q_proj, attention.k_proj.weight
    branch = pairs_from_halves(adapted.lora_b, 16) @ adapted.lora_a
    theirs = by_meta(pairs_from_halves(adapted.base.weight, 16) + adapted.scaling * branch)
    scores = theirs @ by_meta(pairs_from_halves(plain, 16)).mT
    return float((scores - query @ key.mT).abs().max())


def flagai(system: Any) -> float:
    """An adapter with Meta's names and rows."""
    model, logits = trained(system)
    other = system.build()
    with tempfile.TemporaryDirectory() as folder:
        save_meta_lora(model, folder)
        load_lora(other, folder)
    return off(other, logits, system.inputs())


class Panda(nn.Module):
    """LLaMA behind a projection of vectors; all inputs are vectors here."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama_model, self.llama_proj = llama, nn.Linear(64, 64)

    def forward(self, inputs_embeds: Tensor) -> Any:
        """The logits over projected vectors."""
        return self.llama_model(inputs_embeds=self.llama_proj(inputs_embeds))


def _pandas(system: Any) -> tuple[Panda, Panda, Tensor, list[str]]:
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(Panda(system.build()).eval())
    model, other = pair
    names = mp.inject_lora(model, system.targets, system.rank, system.alpha)
    mp.train_modules(model, ["llama_proj"])
    return model, other, after_a_step(model, system.inputs()), names


def projection(system: Any) -> float:
    """LoRA and the projection, trained together, saved and loaded."""
    model, other, logits, _ = _pandas(system)
    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder)
        mp.load_peft(other, folder)
    return off(other, logits, system.inputs())


def pandagpt(system: Any) -> float:
    """PandaGPT's file: what trains, as parameters, under PEFT's names in llama_model."""
    model, other, logits, names = _pandas(system)
    found: OrderedDict[str, Tensor] = OrderedDict()
    for name in names:
        layer, own = model.get_submodule(name), name.removeprefix("llama_model.")
        for letter, value in (("A", layer.lora_a), ("B", layer.lora_b)):
            found[f"llama_model.base_model.model.{own}.lora_{letter}.default.weight"] = value
    for part in ("weight", "bias"):
        found[f"llama_proj.{part}"] = nn.Parameter(getattr(model.llama_proj, part).detach())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pytorch_model.pt"
        torch.save(found, path)
        load_lora(other, path, alpha=system.alpha, whole=["llama_proj"])
    return off(other, logits, system.inputs())
