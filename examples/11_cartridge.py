"""A text distilled into a short prefix, so that the model need not read the text again.

The teacher is the model with all of the text before it.  The student sees a cartridge in the text's
place: a few trained keys and values (Cartridges, arXiv 2506.06266).  It is trained on what the
teacher itself says, to give the teacher's probabilities.  Here a small random LLaMA and 48 tokens
into 6; `python -m benchmarks cartridge` does the same with SmolLM2 and a page of English.
"""

import copy

import torch
import torch.nn.functional as F
import transformers

import minipeft as mp


def attach(model: torch.nn.Module, text: torch.Tensor, length: int) -> None:
    """The prefix "text", keys and values of a text (1, tokens), and the prefix "cartridge"."""
    mp.attach_prefix(model, text.shape[1], name="text").load_tokens(text, name="text")
    # a first position that stays as it is: models lean on it, and training it is unstable
    mp.attach_prefix(model, length, name="cartridge", frozen=1)


def answers(model: torch.nn.Module, asked: torch.Tensor, length: int) -> torch.Tensor:
    """What the teacher says after tokens (rows, n), drawn one by one: (rows, n + length)."""
    mp.use_adapters(model, "text")
    tokens, new, cache = asked, asked, None
    with torch.no_grad():
        for _ in range(length):
            out = model(new, past_key_values=cache, use_cache=True)
            cache, new = out.past_key_values, torch.multinomial(out.logits[:, -1].softmax(-1), 1)
            tokens = torch.cat([tokens, new], dim=1)
    return tokens


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits (rows, positions, words): nats, the mean of positions."""
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()


def divergence(model: torch.nn.Module, tokens: torch.Tensor, first: int = 0) -> torch.Tensor:
    """How far the cartridge is from the text, over tokens (rows, n) after it, from `first` on."""
    mp.use_adapters(model, "text")
    with torch.no_grad():
        teacher = model(tokens, use_cache=False).logits[:, first:]
    mp.use_adapters(model, "cartridge")
    return kl(teacher, model(tokens, use_cache=False).logits[:, first:])


def distill(
    model: torch.nn.Module, said: torch.Tensor, *, steps: int, rows: int, rate: float
) -> list[float]:
    """Train the cartridge on texts (all, positions), `rows` at a time; the loss of each step."""
    optimizer = torch.optim.Adam(mp.adapter_parameters(model, name="cartridge"), lr=rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses = []
    for step in range(steps):
        chosen = torch.arange(step * rows, (step + 1) * rows) % len(said)
        loss = divergence(model, said[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Distil a text, and compare what was not trained on."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    text = torch.randint(1, 64, (1, 48))
    attach(model, text, length=6)
    said, held_out = (answers(model, torch.randint(1, 64, (n, 2)), 14) for n in (256, 64))

    found = {}
    prefix = model.minipeft_prefix
    with torch.no_grad():
        found["at random"] = divergence(model, held_out).item()
        prefix.load_tokens(text[:, :6], name="cartridge")
        found["the text's first tokens"] = divergence(model, held_out).item()
    sink = copy.deepcopy(prefix.encoders["cartridge"].sinks)
    distill(model, said, steps=150, rows=16, rate=0.1)
    with torch.no_grad():
        found["trained"] = divergence(model, held_out).item()
    for what, nats in found.items():
        print(f"cartridge {what}: {nats:.3f} nats a token from the text")
    same = map(torch.equal, sink, prefix.encoders["cartridge"].sinks)
    assert found["trained"] < found["the text's first tokens"] / 2 and all(same)


if __name__ == "__main__":
    main()
