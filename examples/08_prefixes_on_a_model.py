"""Two prefixes on one Hugging Face model, served side by side; a row without one is the base.

A small LLaMA with random weights learns to answer every text with a fixed word: one prefix learns
one word, another of another length a second one.  The weights never change.
"""

import tempfile

import torch
import transformers

import minipeft as mp

WORDS = {"left": 11, "right": 42}


def make_model() -> transformers.LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.2,  # logits wide enough to prefer one word
        )
    ).eval()


def learn(model: transformers.LlamaForCausalLM, name: str, word: int) -> float:
    """Train one prefix to say `word` after any text; returns the last loss."""
    mp.use_adapters(model, name)
    optimizer = torch.optim.AdamW(mp.adapter_parameters(model, name=name), lr=1e-1)
    for _ in range(80):
        text = torch.randint(2, 64, (16, 5))
        logits = model(text, use_cache=False).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.full((16,), word))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def next_word(model: transformers.LlamaForCausalLM, text: torch.Tensor) -> list[int]:
    """By generate, as without prefixes: masks and caches hold the text alone."""
    settings = {"max_new_tokens": 1, "do_sample": False, "attention_mask": torch.ones_like(text)}
    return model.generate(text, **settings)[:, -1].tolist()


def main() -> None:
    """Train two prefixes, let each row of a batch use its own, save one and load it elsewhere."""
    model = make_model()
    text = torch.randint(2, 64, (1, 6)).expand(3, -1)
    base = next_word(model, text)[0]
    for (name, word), length in zip(WORDS.items(), (8, 3), strict=True):
        mp.attach_prefix(model, length, name=name)
        print(
            f"prefix {name!r} of {length} learns word {word}: loss {learn(model, name, word):.3f}"
        )

    mp.use_adapters(model, rows=["left", None, "right"])
    rows = next_word(model, text)
    print(f"rows with left, none, right: {rows}; the base says {base}")

    with tempfile.TemporaryDirectory() as folder:
        mp.save_peft(model, folder, name="right")  # PEFT loads it too
        other = make_model()
        mp.load_peft(other, folder)
    alone = next_word(other, text)[0]
    print(f"'right' in another model says {alone}")
    assert rows == [WORDS["left"], base, WORDS["right"]] and alone == WORDS["right"]


if __name__ == "__main__":
    main()
