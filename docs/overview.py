"""The picture at the top of the README: `python docs/overview.py` writes assets/three_ideas.png."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pictures import SETTINGS, STYLES, Style, attention_weights, draw_values

import minipeft as mp

PICTURE = Path(__file__).parent / "assets" / "three_ideas.png"
RATIO = 1.4  # width over height of a panel


def lora(axes: Any, style: Style, size: int = 576, rank: int = 16) -> None:
    """W, B and A of one layer, drawn to scale; the numbers are counted on the layer itself."""
    layer = mp.LoRALinear(torch.nn.Linear(size, size, bias=False), rank)
    count = mp.count_parameters(layer)
    gap = size / 5
    frozen = {"facecolor": style.faint, "alpha": 0.35, "edgecolor": style.text}
    axes.add_patch(Rectangle((0, 0), size, size, **frozen))
    axes.add_patch(Rectangle((size + gap, 0), rank, size, color=style.second))
    axes.add_patch(Rectangle((size + 2 * gap, size - rank), size, rank, color=style.second))
    axes.text(size / 2, size / 2, f"W, frozen\n{count.total - count.trainable:,}", ha="center",
              va="center")  # fmt: skip
    axes.text(size + gap / 2, size / 2, "+", ha="center", va="center", size=16)
    axes.text(size + gap, size * 1.04, "B", color=style.second, ha="center")
    axes.text(size * 1.5 + 2 * gap, size * 1.04, "A", color=style.second, ha="center")
    axes.text(size * 1.5 + 2 * gap, size * 0.62, f"rank {rank}, trained\n{count.trainable:,}",
              color=style.second, ha="center", va="center")  # fmt: skip
    width, height = 2 * size + 2 * gap, size * 1.15
    room = (width / RATIO - height) / 2  # so that equal units fill the panel
    axes.set(xlim=(-5, width + 5), ylim=(-room, height + room))
    axes.axis("off")


def nf4(axes: Any, style: Style) -> None:
    """The 16 values of a 4-bit weight."""
    draw_values(axes, style)
    axes.set(xlabel="weight / largest of its block")
    axes.xaxis.label.set_color(style.text)


def prefix(axes: Any, style: Style, length: int = 4) -> None:
    """Attention over a prefix and the tokens."""
    axes.imshow(attention_weights(length=length), cmap="cividis", vmin=0, aspect="auto")
    axes.axvline(length - 0.5, color=style.second, linewidth=2)
    axes.set(xticks=[(length - 1) / 2, length + 5.5], yticks=[], ylabel="tokens ask")
    axes.set_xticklabels(["trained\nprefix", "keys of the tokens\n"])
    axes.get_xticklabels()[0].set_color(style.second)


def draw() -> Figure:
    """The three side by side."""
    style = STYLES["light"]
    layer = mp.NF4Linear.from_linear(torch.nn.Linear(2048, 2048, bias=False))
    bits = mp.memory_report(torch.nn.Sequential(layer)).packed.bits
    figure = Figure(figsize=(10.4, 3.3))
    drawn = {
        "LoRA: two thin matrices beside W": lora,
        f"QLoRA: W as 16 values, {bits:.2f} bits a weight": nf4,
        "P-tuning v2: trained keys in each layer": prefix,
    }
    for axes, (title, panel) in zip(figure.subplots(1, 3), drawn.items(), strict=True):
        panel(axes, style)
        axes.set_title(title, size=11)
        axes.set_box_aspect(1 / RATIO)
    return figure


if __name__ == "__main__":
    with mpl.rc_context(SETTINGS):
        draw().savefig(PICTURE, dpi=150, facecolor="white", metadata={"Software": None})
