"""Meta's checkpoints, written here by loops over the processes, beside Meta's own arithmetic."""

import json

import pytest
import torch

import minipeft as mp
from minipeft.io.meta import load_meta, save_meta

transformers = pytest.importorskip("transformers")

DIM, HEADS, KV, LAYERS, FF, VOCAB = 16, 4, 2, 2, 24, 12
HEAD = DIM // HEADS
PARAMS = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": KV, "n_layers": LAYERS, "norm_eps": 1e-5,
          "vocab_size": -1, "multiple_of": 8}  # fmt: skip


def llama(**changes):
    settings = {
        "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": FF, "rms_norm_eps": 1e-5,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**settings, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def weights():
    torch.manual_seed(3)
    sizes = {"tok_embeddings": (VOCAB, DIM), "norm": (DIM,), "output": (VOCAB, DIM)}
    for i in range(LAYERS):
        layer = f"layers.{i}"
        sizes |= {
            f"{layer}.attention.wq": (DIM, DIM), f"{layer}.attention.wk": (KV * HEAD, DIM),
            f"{layer}.attention.wv": (KV * HEAD, DIM), f"{layer}.attention.wo": (DIM, DIM),
            f"{layer}.feed_forward.w1": (FF, DIM), f"{layer}.feed_forward.w2": (DIM, FF),
            f"{layer}.feed_forward.w3": (FF, DIM), f"{layer}.attention_norm": (DIM,),
            f"{layer}.ffn_norm": (DIM,),
        }  # fmt: skip
    return {f"{name}.weight": torch.randn(*size) * 0.3 for name, size in sizes.items()}


def cut(name, value, number, shards, by_rows=()):
    part = name.split(".")[-2]
    if value.dim() == 1:
        return value.clone()
    columns = part in ("wo", "w2", "tok_embeddings") and part not in by_rows
    size = value.shape[columns] // shards
    own = slice(number * size, (number + 1) * size)
    return (value[:, own] if columns else value[own]).clone()


def written(folder, state, shards, params=PARAMS, by_rows=()):
    folder.mkdir(exist_ok=True)
    for number in range(shards):
        file = {name: cut(name, value, number, shards, by_rows) for name, value in state.items()}
        file["rope.freqs"] = torch.ones(HEAD // 2)
        torch.save(file, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def metas_logits(state, ids):
    """The arithmetic of Meta's model for one text, in float64: neighbours are complex numbers."""
    w = {name.removesuffix(".weight"): value.double() for name, value in state.items()}

    def norm(x, scale):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * scale

    t = torch.arange(len(ids), dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    turns = torch.polar(torch.ones(len(ids), HEAD // 2, dtype=torch.float64),
                        t[:, None] * frequencies)  # fmt: skip

    def rotated(x, heads):
        pairs = torch.view_as_complex(x.reshape(len(ids), heads, HEAD // 2, 2).contiguous())
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    h = w["tok_embeddings"][ids]
    for i in range(LAYERS):
        at = f"layers.{i}.attention"
        x = norm(h, w[f"layers.{i}.attention_norm"])
        q, k = rotated(x @ w[f"{at}.wq"].T, HEADS), rotated(x @ w[f"{at}.wk"].T, KV)
        v = (x @ w[f"{at}.wv"].T).reshape(len(ids), KV, HEAD)
        heads = []
        for head in range(HEADS):
            group = head * KV // HEADS
            scores = q[:, head] @ k[:, group].T / HEAD**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, group])
        h = h + torch.cat(heads, -1) @ w[f"{at}.wo"].T
        x, ff = norm(h, w[f"layers.{i}.ffn_norm"]), f"layers.{i}.feed_forward"
        gate = torch.nn.functional.silu(x @ w[f"{ff}.w1"].T)
        h = h + (gate * (x @ w[f"{ff}.w3"].T)) @ w[f"{ff}.w2"].T
    return norm(h, w["norm"]) @ w["output"].T


IDS = torch.tensor([1, 5, 2, 9, 4, 7])


@pytest.mark.parametrize(
    ("shards", "by_rows"),
    [(1, ()), (2, ()), (2, ("tok_embeddings",))],
    ids=["one", "two", "Llama 3"],
)
def test_a_checkpoint_computes_what_metas_code_does(shards, by_rows, tmp_path):
    state, model = weights(), llama()
    names = load_meta(model, written(tmp_path / "m", state, shards, by_rows=by_rows))
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    with torch.no_grad():
        logits = model(IDS[None]).logits[0]
    expected = metas_logits(state, IDS)
    # float32 against float64 through two layers
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shards", [1, 2])
def test_there_and_back(shards, tmp_path):
    state, model = weights(), llama()
    load_meta(model, written(tmp_path / "m", state, 2))
    files = save_meta(model, tmp_path / "back", shards=shards)
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == [*files, "params.json"]
    for number, file in enumerate(files):
        found = torch.load(tmp_path / "back" / file, weights_only=True)
        assert found.keys() == state.keys()
        for name, value in found.items():
            assert torch.equal(value, cut(name, state[name], number, shards))
    again = llama()
    load_meta(again, tmp_path / "back")
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert {**PARAMS, "vocab_size": VOCAB}.items() <= {**params, "multiple_of": 8}.items()
    hidden = int(params["ffn_dim_multiplier"] * int(2 * (4 * DIM) / 3))  # as Meta's code has it
    assert hidden == FF
    with pytest.raises(ValueError, match="exists already"):
        save_meta(model, tmp_path / "back")


def short(folder):
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-500])


def without_shard(folder):
    (folder / "consolidated.00.pth").unlink()


def last_lost(folder):
    (folder / "consolidated.01.pth").unlink()


def changed(change, number=1):
    def do(folder):
        path = folder / f"consolidated.{number:02d}.pth"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return do


def params(**changes):
    return lambda folder: (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))


WQ = "layers.1.attention.wq.weight"
WRONG = {
    "cut": (short, r"consolidated.01.pth: cut short or damaged"),
    "first lost": (without_shard, r"consolidated.00.pth: no such file, beside consolidated.01.pth"),
    "last lost": (last_lost, r"in each of 1 files.*some of them are missing"),
    "a tensor lost": (changed(lambda s: s.pop(WQ)), rf"01.pth: {WQ} is missing"),
    "a tensor more": (changed(lambda s: s.update(x=torch.ones(1))), "01.pth: x is unknown"),
    "another piece": (changed(lambda s: s.update({WQ: torch.ones(4, DIM)})), "01.pth: .*wq"),
    "two norms": (changed(lambda s: s["norm.weight"].add_(1)), "norm.weight is not the same"),
    "NaN": (changed(lambda s: s[WQ].fill_(float("nan"))), "wq.weight holds NaN"),
    "integers": (changed(lambda s: s.update(x=print)), "print"),
    "heads": (params(n_heads=2), "n_heads is 2; the model's configuration has 4"),
    "keys' heads": (params(n_kv_heads=None), "n_kv_heads is None"),
    "theta": (params(rope_theta=5e5), "rope_theta is 500000.0"),
    "eps": (params(norm_eps=1e-6), "norm_eps is 1e-06"),
    "scaled": (params(use_scaled_rope=True), "use_scaled_rope is True"),
    "a text": (params(dim="16"), "dim is '16'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_are_refused_and_the_model_is_as_it_was(case, tmp_path):
    break_it, message = WRONG[case]
    folder = written(tmp_path / "m", weights(), 2)
    break_it(folder)
    model = llama()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_meta(model, folder)
    assert all(map(torch.equal, model.parameters(), before))


def test_wrong_models_are_refused(tmp_path):
    folder = written(tmp_path / "m", weights(), 2)
    with pytest.raises(ValueError, match=r"w1.weight is \(12, 16\) in each of 2 files.*\(32, 16\)"):
        load_meta(llama(intermediate_size=32), folder)
    with pytest.raises(ValueError, match=r"q_proj[.]bias, which Meta's LLaMA has not"):
        load_meta(llama(attention_bias=True), folder)
    with pytest.raises(ValueError, match=r"output[.]weight differ, and are tied"):
        load_meta(llama(tie_word_embeddings=True), folder)
    with pytest.raises(ValueError, match="no consolidated"):
        load_meta(llama(), tmp_path)
    adapted = llama()
    mp.inject_lora(adapted, ["q_proj"], rank=2)
    for call in (load_meta, save_meta):
        with pytest.raises(ValueError, match="has adapters"):
            call(adapted, folder if call is load_meta else tmp_path / "n")
    with pytest.raises(
        ValueError, match=r"shards=3 does not divide tok_embeddings.weight \(12, 16\)"
    ):
        save_meta(llama(), tmp_path / "n", shards=3)
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match="meta device"):
        load_meta(empty, folder)
    assert not (tmp_path / "n").exists()


SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def test_positions_and_heads_that_params_json_cannot_say_are_refused(tmp_path):
    longer = {"max_position_embeddings": 131072}
    save_meta(llama(rope_parameters={**SCALED, "factor": 8.0}, **longer), tmp_path / "a")
    with pytest.raises(ValueError, match=r"'factor': 32.0, .*expected .*'factor': 8.0"):
        save_meta(llama(rope_parameters={**SCALED, "factor": 32.0}, **longer), tmp_path / "b")
    with pytest.raises(ValueError, match=r"4 heads of 8 numbers; Meta's code makes .* 16 / 4"):
        save_meta(llama(head_dim=8), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
