# ruff: noqa: RUF001  (the Chinese punctuation is meant)
"""What the recipes share: text from a package, templates with their loss masks, a training loop."""

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # the benchmarks' loader of text
from benchmarks.data import IGNORED, conversations

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

CHINESE = [  # no package that the tests have holds Chinese: four talks of our own
    ["你好！", "你好，我可以帮助你。"], ["你是谁？", "我是助手，很高兴认识你。"],
    ["今天天气好吗？", "今天天气很好。"], ["谢谢你的帮助。", "不用谢，很高兴帮助你。"],
]  # fmt: skip
WORDS = [
    "你好", "我", "帮助", "你", "助手", "高兴", "认识", "今天", "天气", "很", "谢谢", "，", "。",
]  # fmt: skip


class Template(NamedTuple):
    """How a conversation is written.

    `user` stands around what a user says.  `answer` is what stands before an answer, the end mark
    that is learnt with it, and what stands behind that.  `end` stands behind the last, and is
    learnt.
    """

    header: str
    user: tuple[str, str]
    answer: tuple[str, str, str]
    end: str = ""

    def marks(self, special: Sequence[str]) -> list[str]:
        """What no turn may hold: the template's own words, and special tokens."""
        words = [part.strip() for part in (*self.user, *self.answer, self.end)]
        return [mark for mark in dict.fromkeys([*words, *special]) if mark]


TEMPLATES = {
    "alpaca": Template(ALPACA, ("### Instruction:\n", "\n\n"), ("### Response:", "</s>", "")),
    "chinese-alpaca": Template(
        ALPACA, ("### Instruction:\n", "\n\n"), ("### Response: ", "</s>", "")
    ),
    "guanaco": Template("<s>", ("### Human: ", ""), ("### Assistant: ", "", ""), "</s>"),
    "vicuna": Template(f"<s>{VICUNA} ", ("USER: ", " "), ("ASSISTANT: ", "</s>", "")),
    "chatglm": Template("", ("", ""), ("[gMASK]<bos>", "<eop>", "")),
    "visualglm": Template("", ("问：", "\n"), ("答：[gMASK]<bos>", "<eop>", "")),
    "moss": Template(
        "You are an AI assistant whose name is MOSS.\n",
        ("<|Human|>: ", "<eoh>\n"), ("<|MOSS|>: ", "<eom>", "\n"),
    ),
    "aquila": Template("", ("### Human: ", "\n"), ("### Assistant: ", "</s>", "\n")),
    "pandagpt": Template("", ("### Human: ", "\n"), ("### Assistant: ", "\n###", "\n")),
    "tigerbot": Template("", ("", "\n"), ("", "</s>", "")),
}  # fmt: skip


def encode_turns(
    tokenizer: Any, template: Template, turns: Sequence[str], *, length: int | None = None,
    everything: bool = False,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids of a conversation, and labels: those of answers and their end marks.

    `turns` go user, assistant, user, ...  The text is tokenised once, as it stands, and a token is
    learnt if one of its characters is: tokens counted on a part of the text are often others.
    `everything` learns all tokens.  `length` cuts both.

    Raises:
        ValueError: no pairs of turns; a turn that holds a word of the template or a special token,
            since what follows it would be taken for another turn.
    """
    if not turns or len(turns) % 2:
        raise ValueError(f"encode_turns: {len(turns)} turns; expected pairs of user and assistant")
    for number, turn in enumerate(turns):
        for mark in template.marks(tokenizer.all_special_tokens):
            if mark in turn:
                raise ValueError(
                    f"encode_turns: turn {number} holds {mark!r}, which separates turns; leave "
                    f"the conversation out or write it otherwise: {turn!r:.60}"
                )
    pieces = [(template.header, everything)]
    for number, turn in enumerate(turns):
        before, *behind = template.answer if number % 2 else (*template.user, "")
        answer = number % 2 == 1
        pieces += [(before, everything), (turn, answer or everything)]
        pieces += [(behind[0], answer or everything), (behind[1], everything)]
    pieces.append((template.end, True))
    learnt = [flag for text, flag in pieces for _ in text]
    encoded = tokenizer(
        "".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True
    )
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        token if any(learnt[first:last]) else IGNORED
        for token, (first, last) in zip(ids, spans, strict=True)
    ]
    return ids[:length], labels[:length]


def batch(rows: Sequence[tuple[list[int], list[int]]], pad: int = 0) -> dict[str, Tensor]:
    """Rows of ids and labels, padded on the right: input_ids, labels, attention_mask."""
    longest = max(len(ids) for ids, _ in rows)
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in rows:
        rest = longest - len(ids)
        found["input_ids"].append(ids + [pad] * rest)
        found["labels"].append(labels + [IGNORED] * rest)
        found["attention_mask"].append([1] * len(ids) + [0] * rest)
    return {name: torch.tensor(values) for name, values in found.items()}


def batches(
    tokenizer: Any, template: str, *, count: int = 4, size: int = 4, turns: int = 2,
    length: int = 96, everything: bool = False,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Batches of chit-chat conversations; those that a template refuses are left out."""

    def rows() -> Iterator[tuple[list[int], list[int]]]:
        for talk in conversations():
            said = [message["content"] for message in talk[:turns]]
            try:
                ids, labels = encode_turns(
                    tokenizer, TEMPLATES[template], said, length=length, everything=everything
                )
            except ValueError:
                continue
            if any(label != IGNORED for label in labels[1:]):
                yield ids, labels

    found = list(islice(rows(), count * size))
    return [batch(found[i : i + size]) for i in range(0, len(found), size)]


def train_tokenizer(*special: str, size: int = 800) -> Any:
    """Byte-level pairs learnt on the conversations; `special` tokens get the ids 0, 1, ...

    Ids from 0 to 3 are <unk>, <s>, </s> and <pad> where none are named.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = special or ("<unk>", "<s>", "</s>", "<pad>")
    learner = ByteLevelBPETokenizer()
    texts = (message["content"] for talk in conversations()[:500] for message in talk)
    learner.train_from_iterator(
        texts, vocab_size=size, special_tokens=list(special), show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer, additional_special_tokens=list(special)
    )


def tiny_llama(vocabulary: int, **more: Any) -> Any:
    """A LLaMA with random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**sizes, **more})).eval()


@torch.no_grad()
def mean_loss(model: nn.Module, data: Sequence[dict[str, Tensor]]) -> float:
    """The mean of the batches' losses, without dropout."""
    training = model.training
    model.eval()
    found = sum(model(**one).loss.item() for one in data) / len(data)
    model.train(training)
    return found


def train(
    model: nn.Module, data: Sequence[dict[str, Tensor]], *, lr: float, faster: float = 1.0,
    steps: int = 16, schedule: str = "constant", warmup: float = 0.0, clip: float = 1.0,
    **adamw: Any,
) -> tuple[float, float]:  # fmt: skip
    """AdamW on all that trains; the mean loss before and after.

    `lr` is the recipe's; a model of two layers and a few steps take `faster` times that.  `warmup`
    is the part of the steps in which the rate rises from 0; then it is constant, or falls to 0 in a
    line ("linear") or by a cosine ("cosine").
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, **{"weight_decay": 0.0, **adamw})
    first, rising = mean_loss(model, data), math.ceil(warmup * steps)

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        falls = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return falls[schedule]

    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * faster * rate(step)
        optimizer.zero_grad()
        model(**data[step % len(data)]).loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return first, mean_loss(model.eval(), data)
