"""The pictures of the course, computed from the library.

`python docs/pictures.py FOLDER` writes them; the site's hook (make_pages.py) needs no folder.

Each picture is drawn twice, for light and dark pages.  The colours are of Okabe and Ito's palette,
which all kinds of colour vision can tell apart; shape, hatching or a label says the same again.
"""

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import minipeft as mp


class Style(NamedTuple):
    """Colours of one kind of page."""

    text: str
    faint: str
    first: str
    second: str
    third: str


STYLES = {
    "light": Style("#222222", "#aaaaaa", "#0072b2", "#d55e00", "#009e73"),
    "dark": Style("#e4e4e4", "#6d7280", "#56b4e9", "#e69f00", "#12c08e"),
}
SETTINGS = {
    "axes.spines.right": False, "axes.spines.top": False, "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans", "font.size": 10, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "minipeft",
}  # fmt: skip


def nf4_values(style: Style) -> Figure:
    """The 16 values of NF4 below the curve whose quantiles they are."""
    figure, axes = _axes(style, (5.2, 2.9))
    draw_values(axes, style)
    return figure


def draw_values(axes: Any, style: Style) -> None:
    """The same on axes that are there (also for the picture at the top of the README)."""
    # the largest value is 1 after scaling; before, it is this quantile of the standard normal
    widest = NormalDist().inv_cdf(1 - (1 / 15 + 1 / 16) / 4)
    x = torch.linspace(-1.25, 1.25, 251)
    curve = torch.exp(-((x * widest) ** 2) / 2)
    axes.plot(x, curve, color=style.faint)
    axes.fill_between(x, curve, color=style.faint, alpha=0.25)
    for code, value in enumerate(mp.NF4_CODEBOOK):
        height = float(torch.exp(torch.tensor(-((value * widest) ** 2) / 2)))
        axes.plot([value, value], [0, height], color=style.first, linewidth=1.6)
        axes.text(value, height + 0.04, str(code), color=style.first, ha="center", size=8)
    axes.set(xlabel="weight / absmax", yticks=[], ylim=(0, 1.18))
    axes.spines["left"].set_visible(False)


def nf4_block(style: Style) -> Figure:
    """64 weights, and what their codes and their scale give back."""
    torch.manual_seed(0)
    weights = torch.randn(64) * 0.02
    packed, absmax = mp.quantize_nf4(weights)
    decoded = mp.dequantize_nf4(packed, absmax, weights.shape)
    order = weights.argsort()
    figure, axes = _axes(style, (5.2, 2.9))
    for value in mp.NF4_CODEBOOK:
        axes.axhline(value * float(absmax), color=style.faint, linewidth=0.6)
    axes.plot(weights[order], "o", ms=4, color=style.first, label="before")
    axes.plot(decoded[order], "s", ms=4, mfc="none", color=style.second, label="after")
    axes.set(xlabel="the 64 weights of a block, in order of size", ylabel="value")
    _legend(axes, style, loc="upper left")
    return figure


def bits(style: Style) -> Figure:
    """Bits a weight: codes, scales, scales of scales; counted from layers of 1024 x 1024."""
    linear = nn.Linear(1024, 1024, bias=False)
    rows = []
    for name, double in (("NF4", False), ("NF4 with\ndouble quantisation", True)):
        layer = mp.NF4Linear.from_linear(linear, double_quant=double)
        stored = {
            own: 8 * value.numel() / 2**20 for own, value in layer.packed_parameters().items()
        }
        scales = stored.get("absmax_bytes", stored.get("absmax_code", 0.0))
        rows.append((name, stored.pop("packed"), scales, sum(stored.values()) - scales))
    figure, axes = _axes(style, (5.2, 2.3))
    kinds = (
        ("codes", style.first, ""),
        ("scales", style.second, "//"),
        ("scales of scales", style.third, ""),
    )
    names, left = [row[0] for row in rows], [0.0, 0.0]
    for column, (kind, colour, hatch) in enumerate(kinds, 1):
        widths = [row[column] for row in rows]
        axes.barh(names, widths, left=left, color=colour, hatch=hatch, edgecolor=style.text,
                  linewidth=0.4, label=kind)  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, (total, (_, *own)) in enumerate(zip(left, rows, strict=True)):
        sum_of = " + ".join(f"{number:.3f}".rstrip("0").rstrip(".") for number in own if number)
        axes.text(total + 0.01, index, sum_of, va="center", color=style.text)
    axes.set(xlabel="bits a weight (the axis starts at 3.8)", xlim=(3.8, 4.7))
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, labelcolor=style.text)
    return figure


def learnt_rank(style: Style) -> Figure:
    """Singular values of what LoRA of three ranks learns, beside those of the change to learn."""
    wanted, learnt = _learnt_values()
    figure, axes = _axes(style, (5.2, 3.2))
    numbers = torch.arange(1, len(wanted) + 1)
    axes.plot(numbers, wanted, "-", color=style.faint, linewidth=2, label="the change to learn")
    looks = ((style.first, "o", 15), (style.second, "s", 9), (style.third, "^", 5))
    for (rank, values), (colour, marker, size) in zip(learnt.items(), looks, strict=True):
        axes.plot(numbers[:rank], values, marker, ms=size, mfc="none", mew=1.6, color=colour,
                  label=f"learnt with rank {rank}")  # fmt: skip
    axes.set(xlabel="number of the singular value", ylabel="singular value", yscale="log")
    axes.set_yticks([0.2, 0.5, 1, 2, 4], labels=["0.2", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    _legend(axes, style, loc="upper right", labelspacing=0.8)
    return figure


@functools.cache
def _learnt_values() -> tuple[Tensor, dict[int, Tensor]]:
    """Singular values of a change, and of the deltas that LoRA of each rank learns for it.

    A linear layer is to follow another one.  In what it differs by, each singular value is 0.7 of
    the one before.
    """
    torch.manual_seed(0)
    size, count = 64, 10
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    wanted = left[:, :count] * 4.0 * 0.7 ** torch.arange(count) @ right[:, :count].T
    learnt = {rank: torch.linalg.svdvals(_learn(wanted, rank))[:rank] for rank in (2, 4, 8)}
    return torch.linalg.svdvals(wanted)[:count], learnt


def _learn(wanted: Tensor, rank: int) -> Tensor:
    """The delta of a LoRALinear of this rank after training on random inputs."""
    steps, layer = 600, mp.LoRALinear(nn.Linear(*wanted.shape, bias=False), rank)
    optimizer = torch.optim.Adam(mp.adapter_parameters(layer), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        x = torch.randn(128, wanted.shape[1])
        loss = (layer(x) - layer.base(x) - x @ wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer.delta().detach()


def attention_weights(tokens: int = 12, length: int = 4) -> Tensor:
    """Causal attention over a prefix and tokens, (tokens, length + tokens), NaN where hidden."""
    torch.manual_seed(0)
    size = 16
    q, k = torch.randn(2, tokens, size)
    prefix_k = 1.2 * torch.randn(length, size)
    scores = q @ torch.cat([prefix_k, k]).T / size**0.5
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores[:, length:] = scores[:, length:].masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=1)
    return weights.masked_fill(weights == 0, float("nan"))


def prefix_attention(style: Style) -> Figure:
    """Attention weights of twelve tokens over a prefix of four positions and themselves."""
    tokens, length = 12, 4
    figure, axes = _axes(style, (5.2, 3.7))
    image = axes.imshow(attention_weights(tokens, length), cmap="cividis", vmin=0)
    axes.axvline(length - 0.5, color=style.second, linewidth=2)
    axes.set(xlabel="keys: 4 of the prefix, then the tokens", ylabel="queries",
             xticks=range(length + tokens), yticks=range(0, tokens, 2))  # fmt: skip
    axes.set_xticklabels([*(f"p{i}" for i in range(1, length + 1)), *map(str, range(tokens))])
    bar = figure.colorbar(image, label="attention weight")
    bar.ax.tick_params(colors=style.text)
    bar.ax.yaxis.label.set_color(style.text)
    bar.outline.set_edgecolor(style.faint)
    return figure


def _axes(style: Style, size: tuple[float, float]) -> tuple[Figure, Any]:
    """An empty picture in the colours of the page."""
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.tick_params(colors=style.text)
    axes.xaxis.label.set_color(style.text)
    axes.yaxis.label.set_color(style.text)
    for spine in axes.spines.values():
        spine.set_color(style.faint)
    return figure, axes


def _legend(axes: Any, style: Style, **place: Any) -> None:
    axes.legend(labelcolor=style.text, **place)


PICTURES: dict[str, Callable[[Style], Figure]] = {
    "nf4_values": nf4_values,
    "nf4_block": nf4_block,
    "bits": bits,
    "learnt_rank": learnt_rank,
    "prefix_attention": prefix_attention,
}


def make() -> dict[str, bytes]:
    """Every picture, by the name of its file: <picture>-light.svg and <picture>-dark.svg."""
    made = {}
    with mpl.rc_context(SETTINGS):
        for name, draw in PICTURES.items():
            for page, style in STYLES.items():
                buffer = io.BytesIO()
                draw(style).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
                made[f"{name}-{page}.svg"] = buffer.getvalue()
    return made


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in make().items():
        (folder / name).write_bytes(content)
