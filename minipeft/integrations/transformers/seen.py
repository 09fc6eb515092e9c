"""Whether each layer's attention sees its own prefix, beyond every window: by trying it."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.integrations.transformers import positions, probe
from minipeft.integrations.transformers.texts import PREFIX, TEXT, cut, invent
from minipeft.integrations.transformers.trial import Trial

SHORT_WINDOW = 4  # that windows have while the third question is asked
LONGEST = 1024  # the longest text for a window that cannot be shortened


def blind_layers(trial: Trial) -> tuple[list[tuple[int, nn.Module]], list[str]]:
    """The layers whose own prefix does not reach the last token, and what was not asked.

    Each attention module runs a second time with other values in its prefix, on the inputs of the
    first.  The same sums give the same bits, so any difference comes from the prefix.
    """
    blind: list[tuple[int, nn.Module]] = []
    first: dict[int, Any] = {}  # arguments without a prefix

    def note(layer: int) -> Any:
        return lambda module, args, kwargs: first.__setitem__(layer, (args, kwargs))

    def ask_again(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            table = trial.encoder.tables[layer]
            kept = table.detach().clone()
            table.copy_(64 * kept.roll(1, 0) + 1)
            if trial.prefix.route == "attention":  # a cache would keep the tokens twice
                args = [None if hasattr(a, "get_seq_length") else a for a in args]
                kwargs = {n: None if hasattr(a, "get_seq_length") else a for n, a in kwargs.items()}
            if trial.prefix.route == "past":  # the prefix came in with the arguments
                feeder = trial.prefix.hooks.feeders[layer]
                args, kwargs = feeder.before(module, *first[layer]) or first[layer]
            try:
                other = module.forward(*args, **kwargs)
            finally:
                table.copy_(kept)
            one, two = (out[0] if isinstance(out, tuple) else out for out in (output, other))
            if torch.equal(one[:, -1], two[:, -1]):
                blind.append((layer, module))

        return hook

    with ExitStack() as undo:
        inputs, doubts = _beyond_windows(trial, undo)
        trial.encoder.enabled = True
        layers = dict(enumerate(trial.prefix.hooks.modules)) or _askers(trial)
        for layer, module in layers.items():
            handle = module.register_forward_hook(ask_again(layer), with_kwargs=True)
            undo.callback(handle.remove)
            handle = module.register_forward_pre_hook(note(layer), with_kwargs=True, prepend=True)
            undo.callback(handle.remove)
        positions.run(trial.model, **inputs)
    return sorted(blind, key=lambda found: found[0]), doubts


def _askers(trial: Trial) -> dict[int, nn.Module]:
    """On route A, the modules that ask the cache for their layer's keys: seen in one run."""
    running: list[nn.Module] = []
    found: dict[int, nn.Module] = {}
    encoder = trial.encoder
    layer_of = encoder.layer

    def noted(layer: int) -> tuple[Tensor, Tensor]:
        found[layer] = running[-1]
        return layer_of(layer)

    with ExitStack() as undo:
        encoder.__dict__["layer"] = noted
        undo.callback(encoder.__dict__.pop, "layer")
        for module in trial.model.modules():
            before = module.register_forward_pre_hook(lambda m, args: running.append(m))
            after = module.register_forward_hook(lambda m, args, output: running.remove(m))
            undo.callback(before.remove)
            undo.callback(after.remove)
        positions.run(trial.model, **trial.rest)
    return found


def _beyond_windows(trial: Trial, undo: ExitStack) -> tuple[dict[str, Any], list[str]]:
    """Inputs whose last token stands beyond every window; windows are shortened where that works.

    The window of a config is read when the mask is made, so that a shorter one counts at once.
    Other windows are parts of the modules: then the text must be longer.
    """
    inputs: dict[str, Any] = trial.rest
    doubts: list[str] = []
    if not trial.is_text:
        return inputs, doubts
    for config in probe.configs_of(trial.model):
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(config, name, None)
            if isinstance(window, int) and window > SHORT_WINDOW and trial.prefix.has_windows:
                undo.callback(setattr, config, name, window)
                setattr(config, name, SHORT_WINDOW)
    longest = max((w for w in windows(trial.model)), default=0)
    room = trial.holder and positions.table_rows(trial.holder)
    needed = longest + PREFIX + TEXT
    if longest >= TEXT:
        if needed > min(LONGEST, room or LONGEST):
            doubts.append(f"whether layers see the prefix beyond a window of {longest} tokens")
        else:
            inputs = cut(invent(trial.model, needed), PREFIX)
    return inputs, doubts


def windows(model: nn.Module) -> list[int]:
    """All numbers of the configs that say how far attention sees."""
    found = []
    for config in probe.configs_of(model):
        for name, value in vars(config).items():
            named = any(part in name for part in ("window", "chunk_size", "local_attention"))
            if named and isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found.append(value)
    return found
