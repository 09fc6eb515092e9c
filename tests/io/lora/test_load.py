"""LoRA files of other programs, made by a few lines each, beside those programs' arithmetic."""

import argparse
import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minipeft as mp
from minipeft.io.lora import load_lora, save_meta_lora
from minipeft.io.rotary import halves_from_pairs
from minipeft.layers import LoRAFusedLinear
from minipeft.layers.fused import per_head

HEADS, DIM, RANK = 2, 8, 3
IN = HEADS * DIM
# float32 sums of at most 32 products in another order
NEAR = 1e-6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(IN, IN), nn.Linear(IN, IN)
        self.head_dim = DIM


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, IN)
        self.layers = nn.ModuleList([Layer(), Layer()])


class Llama(nn.Module):
    """The names of Hugging Face's LLaMA."""

    def __init__(self):
        super().__init__()
        self.model = Inner()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.proj = nn.Linear(IN, IN), nn.Conv2d(IN, 4, 3)
        self.to_out = nn.ModuleList([nn.Linear(IN, IN)])


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])


class Glm(nn.Module):
    """The names of ChatGLM-6B: rows of query_key_value go by head."""

    def __init__(self):
        super().__init__()
        layer = nn.ModuleDict({"attention": nn.ModuleDict({
            "query_key_value": nn.Linear(IN, 3 * IN), "dense": nn.Linear(IN, IN),
        })})  # fmt: skip
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList([layer])})


def before(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[k], v) for k, v in state.items())


def delta_of(model, name):
    return model.get_submodule(name).delta()


def close(a, b):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() < NEAR * max(1, b.abs().max())


def pairs(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def trains(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def goes_round(model, fresh, folder):
    """What was loaded is saved as our own file, and loads with equal values and training."""
    mp.save_peft(model, folder)
    names = mp.load_peft(fresh, folder)
    assert trains(fresh) == trains(model) > 0
    for name in names:
        assert torch.equal(delta_of(fresh, name), delta_of(model, name))
        assert type(fresh.get_submodule(name)) is type(model.get_submodule(name))


def test_kohya(tmp_path):
    down, up, conv, point = pairs(1, (RANK, IN), (IN, RANK), (2, IN, 3, 3), (4, 2, 1, 1))
    file = {
        "lora_unet_down_blocks_0_to_q.lora_down.weight": down,
        "lora_unet_down_blocks_0_to_q.lora_up.weight": up,
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(1.5),
        "lora_unet_down_blocks_0_proj.lora_down.weight": conv,
        "lora_unet_down_blocks_0_proj.lora_up.weight": point,
        "lora_te_text_model_q.lora_down.weight": down.clone(),
        "lora_te_text_model_q.lora_up.weight": up.clone(),
    }
    save_file(file, tmp_path / "kohya.safetensors")
    model = Unet()
    state = before(model)
    with pytest.raises(ValueError, match=r"lora_te_text_model_q.*lora_unet: 2.*part="):
        load_lora(model, tmp_path / "kohya.safetensors")
    assert same(model, state)
    names = load_lora(model, tmp_path / "kohya.safetensors", part="lora_unet")
    assert list(names) == ["down_blocks.0.to_q", "down_blocks.0.proj"]
    assert names.unexpected == ["lora_te_text_model_q"]
    close(delta_of(model, "down_blocks.0.to_q"), up @ down * 0.5)
    # without an alpha the scaling is 1; the product over a convolution, channel by channel
    expected = torch.einsum("or,rikl->oikl", point[..., 0, 0], conv)
    close(delta_of(model, "down_blocks.0.proj"), expected)
    goes_round(model, Unet(), tmp_path / "own")
    with pytest.raises(ValueError, match="alpha=3, but the file has its own"):
        load_lora(Unet(), tmp_path / "kohya.safetensors", part="lora_unet", alpha=3)
    with pytest.raises(ValueError, match="nothing is of part 'lora_te1'"):
        load_lora(Unet(), file, part="lora_te1")


@pytest.mark.parametrize("form", ["new", "middle", "old"])
def test_diffusers(form, tmp_path):
    down, up, down2, up2 = pairs(2, (RANK, IN), (IN, RANK), (RANK, IN), (IN, RANK))
    q, out = "unet.down_blocks.0.to_q", "unet.down_blocks.0.to_out.0"
    ends = {"new": (".lora_A.weight", ".lora_B.weight"),
            "middle": (".lora.down.weight", ".lora.up.weight")}  # fmt: skip
    if form == "old":
        place = "unet.down_blocks.0.processor"
        file = {
            f"{place}.to_q_lora.down.weight": down, f"{place}.to_q_lora.up.weight": up,
            f"{place}.to_out_lora.down.weight": down2, f"{place}.to_out_lora.up.weight": up2,
        }  # fmt: skip
    else:
        a, b = ends[form]
        file = {f"{q}{a}": down, f"{q}{b}": up, f"{out}{a}": down2, f"{out}{b}": up2}
    metadata, scaling = {}, 1.0
    if form == "new":
        metadata["lora_adapter_metadata"] = json.dumps({"unet.r": RANK, "unet.lora_alpha": 6})
        scaling = 2.0
    save_file(file, tmp_path / "a.safetensors", metadata=metadata)
    model = Unet()
    load_lora(model, tmp_path / "a.safetensors")
    close(delta_of(model, "down_blocks.0.to_q"), up @ down * scaling)
    close(delta_of(model, "down_blocks.0.to_out.0"), up2 @ down2 * scaling)


def mlx(folder, parameters, tensors):
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx(tmp_path):
    a, b, ea, eb = pairs(3, (IN, RANK), (RANK, IN), (7, RANK), (RANK, IN))
    file = {f"{Q}.lora_a": a, f"{Q}.lora_b": b, "model.embed_tokens.lora_a": ea,
            "model.embed_tokens.lora_b": eb}  # fmt: skip
    new = mlx(tmp_path / "new", {"rank": RANK, "scale": 20.0, "dropout": 0.0}, file)
    old = mlx(tmp_path / "old", {"rank": RANK, "alpha": 6.0, "scale": 10.0, "dropout": 0.0}, file)
    with pytest.raises(ValueError, match=r"is of MLX.*load_lora"):
        mp.load_peft(Llama(), new)
    for folder in (new, old):  # 10 * 6 / 3
        model = Llama()
        assert list(load_lora(model, folder)) == ["model.embed_tokens", Q]
        close(delta_of(model, Q), 20 * (a @ b).T)
        ids = torch.tensor([0, 3, 6])
        table = Llama().model.embed_tokens.weight
        model.model.embed_tokens.base.weight.data.copy_(table)
        close(model.model.embed_tokens(ids), table[ids] + 20 * ea[ids] @ eb)


def in_pairs(b):
    """Rows of heads in neighbours, from rows in halves, one number at a time."""
    made = torch.empty_like(b)
    for head in range(len(b) // DIM):
        for i in range(DIM // 2):
            made[head * DIM + 2 * i] = b[head * DIM + i]
            made[head * DIM + 2 * i + 1] = b[head * DIM + DIM // 2 + i]
    return made


def test_torchtune(tmp_path):
    a, b, va, vb = pairs(4, (RANK, IN), (IN, RANK), (RANK, IN), (IN, RANK))
    q, v = "layers.0.attn.q_proj", "layers.1.attn.v_proj"
    file = {f"{q}.lora_a.weight": a, f"{q}.lora_b.weight": in_pairs(b),
            f"{v}.lora_a.weight": va, f"{v}.lora_b.weight": vb}  # fmt: skip
    torch.save(file, tmp_path / "adapter_0.pt")
    path, model = tmp_path / "adapter_0.pt", Llama()
    with pytest.raises(ValueError, match=r"is a file.*load_lora"):
        mp.load_peft(model, path)
    with pytest.raises(ValueError, match="does not say its alpha"):
        load_lora(model, path, rotary_rows="pairs")
    with pytest.raises(ValueError, match=r"rotary_rows='pairs'.*'halves'"):
        load_lora(model, path, alpha=6)
    assert load_lora(model, path, alpha=6, rotary_rows="pairs") == [Q, V]
    close(delta_of(model, Q), 2 * b @ a)
    close(delta_of(model, V), 2 * vb @ va)
    other = Llama()
    load_lora(other, file, alpha=6, rotary_rows="halves")
    close(delta_of(other, Q), 2 * in_pairs(b) @ a)


def test_metas_names_are_read_and_written(tmp_path):
    a, b = pairs(5, (RANK, IN), (IN, RANK))
    keys = [f"base_model.model.layers.0.attention.wq.lora_{x}.weight" for x in "AB"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["wq", "wv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(dict(zip(keys, [a, in_pairs(b)], strict=True)), tmp_path / "adapter_model.bin")
    model = Llama()
    with pytest.raises(ValueError, match="load_lora"):
        mp.load_peft(model, tmp_path)
    load_lora(model, tmp_path)
    close(delta_of(model, Q), 2 * b @ a)
    assert save_meta_lora(model, tmp_path / "back") == ["layers.0.attention.wq"]
    again = Llama()
    load_lora(again, tmp_path / "back")
    assert torch.equal(delta_of(again, Q), delta_of(model, Q)) and trains(again) == trains(model)
    with pytest.raises(ValueError, match="load_lora"):
        mp.load_peft(Llama(), tmp_path / "back")
    unet = Unet()
    mp.inject_lora(unet, ["to_q"], rank=2)
    with pytest.raises(ValueError, match=r"to_q.*projections of LLaMA"):
        save_meta_lora(unet, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_rotary_rows_compute_what_metas_code_does():
    """Scores of rotated queries and keys: neighbours as complex numbers, halves by halves."""
    wq, wk, x = pairs(6, (IN, IN), (IN, IN), (5, IN))
    angles = torch.arange(5)[:, None] * 0.3 ** torch.arange(DIM // 2)

    def of_meta(w):
        neighbours = torch.view_as_complex((x @ w.T).reshape(5, HEADS, DIM // 2, 2))
        turned = neighbours * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    def in_halves(w):
        first, second = (x @ halves_from_pairs(w, DIM).T).reshape(5, HEADS, 2, -1).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def scores(turn):
        return torch.einsum("qhd,khd->hqk", turn(wq), turn(wk))

    assert (scores(of_meta) - scores(in_halves)).abs().max() < 1e-4  # sums of values up to 200


def test_pandagpt(tmp_path):
    a, b, w, bias = pairs(7, (RANK, IN), (IN, RANK), (IN, 4), (IN,))
    place = "llama_model.base_model.model.model.layers.0.self_attn.q_proj"
    file = OrderedDict({
        "llama_proj.weight": nn.Parameter(w), "llama_proj.bias": nn.Parameter(bias),
        f"{place}.lora_A.default.weight": nn.Parameter(a),
        f"{place}.lora_B.default.weight": nn.Parameter(b),
    })  # fmt: skip
    torch.save(file, tmp_path / "pytorch_model.pt")

    class Panda(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama_model, self.llama_proj = Llama(), nn.Linear(4, IN)

    model = Panda()
    state = before(model)
    with pytest.raises(ValueError, match=r"llama_proj.weight' \(2 in all\).*whole="):
        load_lora(model, tmp_path / "pytorch_model.pt", alpha=RANK)
    assert same(model, state)
    names = load_lora(model, tmp_path / "pytorch_model.pt", alpha=RANK, whole=["llama_proj"])
    assert sorted(names) == [f"llama_model.{Q}", "llama_proj"] and not names.unexpected
    close(delta_of(model, f"llama_model.{Q}"), b @ a)
    x = torch.randn(2, 4)
    close(model.llama_proj(x), x @ w.T + bias)
    assert trains(model) == sum(value.numel() for value in file.values())
    alone = Llama()
    rest = load_lora(alone, tmp_path / "pytorch_model.pt", alpha=RANK, strict=False).unexpected
    assert rest == ["llama_proj.weight", "llama_proj.bias"]
    close(delta_of(alone, Q), b @ a)


QKV = "transformer.layers.0.attention.query_key_value"
DENSE = "transformer.layers.0.attention.dense"


def sat(**changes):
    """A file of VisualGLM's, with some tensors changed or (None) taken out."""
    values = pairs(8, *[(RANK, IN)] * 3, *[(IN, RANK)] * 3, (RANK, IN), (IN, RANK))
    names = [f"{QKV}.matrix_{x}.{i}" for x in "AB" for i in range(3)]
    module = dict(zip([*names, f"{DENSE}.matrix_A", f"{DENSE}.matrix_B"], values, strict=True))
    module |= {f"{QKV}.{key}": value for key, value in changes.items()}
    return {key: value for key, value in module.items() if value is not None}


def by_head(x, module, scaling):
    """The branch of VisualGLM's LoraQKV: per head the outputs of the three pairs, one by one."""
    outs = [x @ module[f"{QKV}.matrix_A.{i}"].T @ module[f"{QKV}.matrix_B.{i}"].T for i in range(3)]
    rows = []
    for head in range(HEADS):
        for out in outs:
            rows += [out[:, head * DIM + i] * scaling for i in range(DIM)]
    return torch.stack(rows, 1)


ROWS = {"query_key_value": per_head(HEADS, DIM)}


def test_visualglm(tmp_path):
    module = sat()
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": module, "args": argparse.Namespace(lora_rank=RANK), "x": 1}, path)
    model, plain, x = Glm(), Glm(), torch.randn(4, IN)
    plain.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"3 pairs of factors.*per_head\(heads, head_dim\)"):
        load_lora(model, path, alpha=1)
    load_lora(model, path, alpha=1, slices=ROWS)
    close(model.get_submodule(QKV)(x), plain.get_submodule(QKV)(x) + by_head(x, module, 1 / RANK))
    close(delta_of(model, DENSE), module[f"{DENSE}.matrix_B"] @ module[f"{DENSE}.matrix_A"] / RANK)
    assert isinstance(model.get_submodule(QKV), LoRAFusedLinear)
    assert trains(model) == sum(value.numel() for value in module.values())
    goes_round(model, plain, tmp_path / "own")


def test_slices_of_the_right_sizes_by_another_number_of_heads_are_refused():
    model = Glm()
    model.config = argparse.Namespace(num_attention_heads=HEADS)
    state = before(model)
    slices = {"query_key_value": per_head(HEADS * 2, DIM // 2)}
    with pytest.raises(ValueError, match="by 4 heads; the model's configuration has 2"):
        load_lora(model, sat(), alpha=1, slices=slices)
    assert same(model, state)
    load_lora(model, sat(), alpha=1, slices=ROWS)


WRONG = {
    "a pair without its B": (sat(**{"matrix_B.1": None}), ROWS, r"B of part 1 is missing"),
    "a pair missing": (sat(**{"matrix_A.2": None, "matrix_B.2": None}), ROWS, "2 pairs.*slices"),
    "two ranks": (sat(**{"matrix_A.0": torch.ones(2, IN)}), ROWS, "two ranks"),
    "another size": (sat(**{f"matrix_B.{i}": torch.ones(IN // 2, RANK) for i in range(3)}), ROWS,
                     r"slice 'q'.*expected.*\(16, rank\)"),
    "another head count": (sat(), {"query_key_value": per_head(HEADS * 2, DIM)},
                           r"\[32, 32, 32\] rows; the projection has 48"),
    "another module": ({k.replace("query_key_value", "qkv"): v for k, v in sat().items()}, ROWS,
                       r"attention.qkv \(1 of 2; keys of SAT\) is no module"),
    "base weights": (sat(**{"original.weight": torch.ones(1)}), ROWS, "is no factor of LoRA"),
    "NaN": (sat(**{"matrix_B.0": torch.full((IN, RANK), float("nan"))}), ROWS, "NaN"),
    "integers": (sat(**{"matrix_B.0": torch.ones(IN, RANK).long()}), ROWS, "no factors"),
    "no factors": ({"a.weight": torch.ones(2)}, ROWS, "no factors of LoRA by the keys of PEFT"),
    "a gap": ({k.replace("A.2", "A.3").replace("B.2", "B.3"): v for k, v in sat().items()}, ROWS,
              r"parts \[0, 1, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_and_the_model_is_as_it_was(case):
    tensors, slices, message = WRONG[case]
    model = Glm()
    state = before(model)
    with pytest.raises(ValueError, match=message):
        load_lora(model, tensors, alpha=1, slices=slices)
    assert same(model, state)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"module": sat(), "args": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="could run code"):
        load_lora(Glm(), tmp_path / "a.pt", alpha=1, slices=ROWS)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("enabled", [[True, True, True], [True, False, True], [False, False, True]])
def test_loralibs_merged_linear(enabled, tmp_path):
    """Chinese-Vicuna's ChatGLM: three thirds of the rows, each enabled one with a pair."""
    n = sum(enabled)
    a, b = pairs(9, (RANK * n, IN), (IN * n, RANK))
    file = {f"{QKV}.lora_A": a, f"{QKV}.lora_B": b}
    expected, done = torch.zeros(3 * IN, IN), 0
    for third, on in enumerate(enabled):
        if on:
            own = b[done * IN : (done + 1) * IN] @ a[done * RANK : (done + 1) * RANK]
            expected[third * IN : (third + 1) * IN] = own * 2
            done += 1
    torch.save(file, tmp_path / "a.pt")
    model = Glm()
    if n == 2:
        with pytest.raises(ValueError, match=r"make 32 rows, the projection has 48.*enable_lora="):
            load_lora(model, tmp_path / "a.pt", alpha=6)
    load_lora(model, tmp_path / "a.pt", alpha=6, enable_lora=enabled)
    close(delta_of(model, QKV), expected)
    assert trains(model) == a.numel() + b.numel()
    goes_round(model, Glm(), tmp_path / "own")


@pytest.mark.parametrize("enabled", [[True, True, True], [True, False, True]])
def test_peft_02(enabled, tmp_path):
    """A directory of PEFT 0.2: lora_B is the weight of a convolution in groups."""
    n = sum(enabled)
    a, b = pairs(10, (RANK * n, IN), (IN * n, RANK, 1))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "lora_dropout": 0.0,
              "target_modules": ["query_key_value"], "enable_lora": enabled, "merge_weights": False,
              "fan_in_fan_out": False, "bias": "none", "inference_mode": True}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    keys = [f"base_model.model.{QKV}.lora_{x}.weight" for x in "AB"]
    torch.save(dict(zip(keys, [a, b], strict=True)), tmp_path / "adapter_model.bin")
    model, x = Glm(), torch.randn(4, IN)
    assert mp.load_peft(model, tmp_path) == [QKV]
    down = nn.functional.linear(x, a)
    branch = nn.functional.conv1d(down.T[None], b, groups=n)[0].T * 2
    expected, places = torch.zeros(4, 3 * IN), iter(branch.split(IN, 1))
    for third, on in enumerate(enabled):
        if on:
            expected[:, third * IN : (third + 1) * IN] = next(places)
    layer = model.get_submodule(QKV)
    close(layer(x) - layer.base(x), expected)
    assert trains(model) == a.numel() + b.numel()
    goes_round(model, Glm(), tmp_path / "own")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "enable_lora": "all"}))
    with pytest.raises(ValueError, match="enable_lora = 'all'"):
        mp.load_peft(Glm(), tmp_path)


def configured(folder, tensors, file, config):
    folder.mkdir()
    save_file(tensors, folder / file)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("program", ["PEFT", "MLX"])
def test_dora_without_its_magnitudes_is_refused(program, tmp_path):
    """Read as LoRA it would compute something else."""
    a, b = pairs(1, (RANK, IN), (IN, RANK))
    if program == "PEFT":
        tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
        config = {"r": RANK, "lora_alpha": 4, "use_dora": True}
        folder = configured(tmp_path / "f", tensors, "adapter_model.safetensors", config)
    else:
        tensors = {f"{Q}.lora_a": a.T.contiguous(), f"{Q}.lora_b": b.T.contiguous()}
        config = {"fine_tune_type": "dora", "lora_parameters": {"rank": RANK, "scale": 2.0}}
        folder = configured(tmp_path / "f", tensors, "adapters.safetensors", config)
    model = Llama()
    state = before(model)
    with pytest.raises(ValueError, match="says DoRA, and the file has modules without a magnitude"):
        load_lora(model, folder)
    assert same(model, state)


def test_another_rank_than_mlx_says_is_refused(tmp_path):
    a, b = pairs(1, (IN, RANK), (RANK, IN))
    config = {"lora_parameters": {"rank": RANK + 1, "scale": 2.0}}
    tensors = {f"{Q}.lora_a": a, f"{Q}.lora_b": b}
    folder = configured(tmp_path / "f", tensors, "adapters.safetensors", config)
    with pytest.raises(ValueError, match=f"has rank {RANK}, the configuration says {RANK + 1}"):
        load_lora(Llama(), folder)


def test_an_alpha_beside_a_merged_linear_is_not_passed_over():
    name = "transformer.layers.0.attention.query_key_value"
    a, b = pairs(1, (2 * RANK, IN), (2 * IN, RANK))
    state = {f"{name}.lora_A": a, f"{name}.lora_B": b, f"{name}.alpha": torch.tensor(7.0)}
    with pytest.raises(ValueError, match="alpha=2, but the file has its own"):
        load_lora(Glm(), state, alpha=2, enable_lora=[True, False, True])


def test_errors_name_what_was_read_and_an_alpha_of_nothing_is_no_crash():
    a, b = pairs(1, (RANK, IN), (IN, RANK))
    with pytest.raises(ValueError, match=f"the tensors: {Q}: factors of rank 0"):
        load_lora(Llama(), {f"{Q}.lora_A": a[:0], f"{Q}.lora_B": b[:, :0]}, alpha=1)
    with pytest.raises(ValueError, match=f"^the tensors: {Q}: .* of shape"):
        load_lora(Llama(), {f"{Q}.lora_A": a[:, :2], f"{Q}.lora_B": b}, alpha=1)
    state = {f"{Q}.lora_A": a, f"{Q}.lora_B": b, f"{V}.lora.alpha": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"lora.alpha"):
        load_lora(Llama(), state, alpha=1, whole=[V])


def test_a_rank_that_is_not_peft_02s_is_said_plainly(tmp_path):
    name = "base_model.model.transformer.layers.0.attention.query_key_value"
    a, b = pairs(1, (2 * RANK, IN), (2 * IN, RANK, 1))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["query_key_value"],
              "enable_lora": [True, False, True]}  # fmt: skip
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder = configured(tmp_path / "f", tensors, "adapter_model.safetensors", config)
    with pytest.raises(ValueError, match=r"lora_A is \(6, 16\); expected 2 parts of r = 4 rows"):
        mp.load_peft(Glm(), folder)


@pytest.mark.parametrize("name", ["dora_scale", "lora_mid.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_tensors_that_change_what_factors_mean_are_never_passed_over(name, strict):
    a, b = pairs(1, (RANK, IN), (IN, RANK))
    state = {f"{Q}.lora_A": a, f"{Q}.lora_B": b, f"{Q}.{name}": torch.ones(IN)}
    model = Llama()
    unchanged = before(model)
    with pytest.raises(ValueError, match=f"{name}.* computes? something else"):
        load_lora(model, state, alpha=1, strict=strict)
    assert same(model, unchanged)


@pytest.mark.parametrize("newer", ["use_rslora", "use_dora"])
def test_fields_that_peft_02_lacks_beside_its_own_are_refused(newer, tmp_path):
    name = "base_model.model.transformer.layers.0.attention.query_key_value"
    a, b = pairs(1, (2 * RANK, IN), (2 * IN, RANK, 1))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "enable_lora": [True, False, True],
              "target_modules": ["query_key_value"], newer: True}  # fmt: skip
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder = configured(tmp_path / "f", tensors, "adapter_model.safetensors", config)
    with pytest.raises(ValueError, match=newer):
        mp.load_peft(Glm(), folder)


def test_errors_name_the_pickled_file(tmp_path):
    name = f"base_model.model.{Q}"
    a, b = pairs(1, (RANK, IN + 1), (IN, RANK))
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"],
              "layers_to_transform": [0]}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_model.bin: .*q_proj"):
        mp.load_peft(Llama(), tmp_path)
