"""Does attach_prefix tell the truth about a class?  Asked from outside, with references of its own.

A class is "right" if the prefix is there and does what it says; "told" if a warning says what was
not proved; "refused" if attach_prefix raised a ValueError of its own.  Anything else is a fault:
"silent" (something is off and nobody said so), "late" (a forward raises that attach_prefix could
have tried), "bare" (another error than a ValueError of attach_prefix).
"""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import minipeft as mp
from tests.any_class import VOCABULARY, build, image, mel, wave

P, T, PAD = 5, 14, 4  # prefix positions, tokens of text, padding
FAULTS = ("silent", "late", "bare")
NOT_SMALL = "not made small"
# float32: the matrix of 27 families has at most 2.1e-6 over logits of size 1 to 3; these models are
# of more kinds (experts, latent attention), whose sums are longer
ROUNDING = 2e-5
# with learned positions left padding moves a text by itself: then a prefix has nothing to keep
OWN = 0.05
Make = Callable[[], dict[str, Tensor]]


class Finding(NamedTuple):
    """What was found of one class."""

    outcome: str
    why: str
    figures: dict[str, float]


class Kind(NamedTuple):
    """One class: how to build it, and an example of what it takes if that is no text."""

    config: str
    model: str
    settings: Mapping[str, Any] = MappingProxyType({})
    example: Make | None = None


SPEECH = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
          "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
          "num_conv_pos_embedding_groups": 2}  # fmt: skip
OF_SIGHT_AND_SOUND = (
    Kind("ViTConfig", "ViTForImageClassification", example=image),
    Kind("DeiTConfig", "DeiTModel", example=image),
    Kind("CLIPVisionConfig", "CLIPVisionModel", example=image),
    Kind("SiglipVisionConfig", "SiglipVisionModel", example=image),
    Kind("Dinov2Config", "Dinov2Model", example=image),
    Kind("WhisperConfig", "WhisperForConditionalGeneration", example=mel),
    Kind("Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH, wave),
    Kind("HubertConfig", "HubertModel", SPEECH, wave),
)
MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM")


def classes() -> list[Kind]:
    """Every class of transformers' mappings of language models, and those of images and sounds."""
    from transformers.models.auto import configuration_auto, modeling_auto

    found: dict[str, Kind] = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(
            modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"
        ).items():
            name = names if isinstance(names, str) else names[0]
            config = configuration_auto.CONFIG_MAPPING_NAMES.get(model_type)
            if config is not None:
                settings: dict[str, Any] = {}
                if mapping == "CAUSAL_LM":  # BERT's kind looks ahead unless it is a decoder
                    settings["is_decoder"] = True
                found.setdefault(name, Kind(config, name, settings))
    return [*found.values(), *OF_SIGHT_AND_SOUND]


def audit(kind: Kind) -> Finding:
    """What attach_prefix does with this class, or why the class cannot be made small and run."""
    try:
        settings = dict(kind.settings)
        if "is_decoder" in settings and not _takes(kind.config, "is_decoder"):
            del settings["is_decoder"]
        model = build(kind.config, kind.model, **settings)
        case = Case(model, None if kind.example is None else kind.example())
        case.without = case.run()
    except Exception as error:
        return Finding(NOT_SMALL, f"{type(error).__name__}: {' '.join(str(error).split())}", {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case.prefix = mp.attach_prefix(
                model, P, train_head=False, example=case.inputs if kind.example else None
            )
        except ValueError as error:
            own = str(error).startswith("attach_prefix: ")
            return Finding("refused" if own else "bare", str(error), {})
        except Exception as error:
            return Finding("bare", f"{type(error).__name__}: {error}", {})
    told = [str(w.message) for w in caught if "not proved" in str(w.message)]
    try:
        figures = case.figures()
    except Exception as error:
        return Finding("late", f"{type(error).__name__}: {error}", {})
    own = figures.get("own padding", 0.0)
    limits = {
        "as tokens": ROUNDING, "padding": ROUNDING + 2 * own if own < OWN else float("inf"),
        "without gradient": 0, "other tokens": figures.get("own other tokens", 0), "removed": 0,
    }  # fmt: skip
    off = [name for name, limit in limits.items() if figures.get(name, 0) > limit]
    if figures["effect"] == 0:
        off.append("effect")
    if off and not (told and off == ["as tokens"]):
        return Finding("silent", ", ".join(off), figures)
    return Finding("told" if told else "right", "; ".join(told), figures)


def _takes(config: str, setting: str) -> bool:
    import transformers

    return setting in getattr(transformers, config)().to_dict()


class Case:
    """A model with its texts, and what to compare."""

    prefix: Any
    without: Tensor

    def __init__(self, model: Any, example: dict[str, Tensor] | None) -> None:
        self.model, self.example = model, example
        self.two = bool(getattr(model.config, "is_encoder_decoder", False))
        draw = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, VOCABULARY, (1, P), generator=draw)
        self.text = torch.randint(3, VOCABULARY, (2, T), generator=draw)
        self.inputs = example or self.of_text(self.text)

    def of_text(self, ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
        """The arguments of a forward over a text."""
        second = {"decoder_input_ids": self.text} if self.two else {}
        return {"input_ids": ids, **second, **more}

    def run(self, **inputs: Tensor) -> Tensor:
        """Logits, or the last states where the class has no head."""
        with torch.no_grad():
            return self.output(**inputs)

    def output(self, **inputs: Tensor) -> Tensor:
        """The same, with gradients."""
        output = self.model(**(inputs or self.inputs))
        found = getattr(output, "logits", None)
        states: Tensor = output.last_hidden_state if found is None else found
        return states

    def figures(self) -> dict[str, float]:
        """Differences relative to the largest logit, and counts."""
        found: dict[str, float] = {}
        scale = float(self.without.abs().max())

        def off(one: Tensor, other: Tensor) -> float:
            return float((one - other).abs().max()) / scale

        if self.prefix.position == "shift" and not self.two:
            found["as tokens"] = off(self._as_tokens(), self._after_prompt())
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in self.prefix.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        with_prefix = self.run()
        found["effect"] = off(with_prefix, self.without)
        if self.example is None:
            found |= self._padding(with_prefix, off)
        self.model.train()
        self.output().float().pow(2).mean().backward()
        self.model.eval()
        gradients = [parameter.grad for parameter in self.prefix.parameters()]
        found["without gradient"] = sum(g is None or not bool(g.abs().max() > 0) for g in gradients)
        if self.example is None and self.prefix.position == "shift":
            found["other tokens"] = self._generated()
        self.prefix.remove()
        found["removed"] = off(self.run(), self.without)
        if "other tokens" in found:
            found["own other tokens"] = self._generated()
        return found

    def _as_tokens(self) -> Tensor:
        """The text behind a prefix of the prompt's keys and values."""
        kept = self.prefix.window
        if self.prefix.has_windows:
            self.prefix.window = "like_token"
        self.prefix.load_tokens(self.prompt)
        behind = self.run()
        self.prefix.window = kept
        return behind

    def _after_prompt(self) -> Tensor:
        """The text behind the prompt itself."""
        self.prefix.enabled = False
        whole = torch.cat([self.prompt.expand(2, -1), self.text], 1)
        found = self.run(**self.of_text(whole))[:, P:]
        self.prefix.enabled = True
        return found

    def _padding(self, with_prefix: Tensor, off: Any) -> dict[str, float]:
        ids = torch.cat([torch.zeros(2, PAD, dtype=torch.long), self.text], 1)
        mask = (torch.arange(PAD + T) >= PAD).long().expand(2, -1)
        inputs = self.of_text(ids, attention_mask=mask)
        self.prefix.enabled = False
        try:
            own = off(self.run(**inputs)[:, -T:], self.without)
        except Exception:  # the class takes no padding
            return {}
        finally:
            self.prefix.enabled = True
        return {"padding": off(self.run(**inputs)[:, -T:], with_prefix), "own padding": own}

    def _generated(self) -> int:
        """Tokens that differ between generation with the cache and without it."""
        if not hasattr(self.model, "generate") or not self.model.can_generate():
            return 0
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        one, other = (
            self.model.generate(self.text, use_cache=c, **settings) for c in (True, False)
        )
        return int((one != other).sum())
