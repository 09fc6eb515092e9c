"""Small checkpoints for the tests of deltas, and their bytes."""

import json

import torch

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def write(folder, state, form="safetensors", files=2):
    """A checkpoint of several files, or of one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    start = "model" if form == "safetensors" else "pytorch_model"
    places = {}
    for number in range(files):
        name = f"{start}-{number + 1:05d}-of-{files:05d}.{form}" if files > 1 else f"{start}.{form}"
        part = {key: state[key] for key in list(state)[number::files]}
        (save_file if form == "safetensors" else torch.save)(part, folder / name)
        places |= dict.fromkeys(part, name)
    if files > 1:
        (folder / INDEX[form]).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"is": folder.name}))
    (folder / "tokenizer.model").write_bytes(folder.name.encode())
    return folder


def read(folder):
    """All tensors of a folder that apply_delta wrote, by safetensors alone."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_bits(one, other):
    def described(value):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist()

    return {n: described(v) for n, v in one.items()} == {n: described(v) for n, v in other.items()}


def pair(dtype=torch.float32, seed=0, rows=0):
    """A base and a tuned model: near, far, equal, with -0.0, other kinds of numbers, no numbers."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    base = {
        "embed.weight": (normal(20, 8) * 0.02).to(dtype), "a.weight": normal(31, 7).to(dtype),
        "far.weight": (normal(9, 5) * 2000).to(dtype), "same": normal(6).to(dtype),
        "zero": torch.tensor([0.0, -0.0, 1.0]).to(dtype), "scalar": torch.tensor(0.5).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype), "ids": torch.arange(5), "steps": torch.tensor(255),
        "bytes": torch.arange(250, 256).to(torch.uint8), "mask": torch.tensor([True, False]),
    }  # fmt: skip
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["embed.weight"] += (normal(20, 8) * 1e-3).to(dtype)
    tuned["a.weight"] += (normal(31, 7) * 0.3 + 1).to(dtype)
    tuned["far.weight"] = normal(9, 5).mul(1e-4).to(dtype)  # the base drowns it
    tuned["zero"] = torch.tensor([-0.0, -0.0, -0.0]).to(dtype)
    tuned["bytes"] += 3
    tuned["mask"] = ~tuned["mask"]
    if rows:
        tuned["embed.weight"] = torch.cat([tuned["embed.weight"], normal(rows, 8).to(dtype)])
    return base, tuned
