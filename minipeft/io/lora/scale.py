"""Where the scaling of a foreign adapter stands: in the file, beside it, or nowhere.

kohya, diffusers    a tensor `.alpha` for each module; without it the scaling is 1
diffusers           or the metadata's lora_adapter_metadata: r, lora_alpha of each part
PEFT, torchtune     adapter_config.json: lora_alpha / r
MLX                 adapter_config.json: lora_parameters.scale (older: times alpha / rank)
loralib, SAT        nowhere (VisualGLM: alpha 1), nor in PandaGPT's and torchtune's adapter_0.pt
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from minipeft.io import fields
from minipeft.io.fields import is_off, parse_object

METADATA = "lora_adapter_metadata"
_USED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "bias"}
_IGNORED = fields.ORIGIN | fields.ORIGIN_ELSEWHERE | {"peft_type", "fan_in_fan_out"}
_POSITIVE = fields.Kind(
    "a number above 0", lambda value: fields.NUMBER.fits(value) and value > 0  # type: ignore[operator]
)  # fmt: skip
_OF_PEFT = {
    "r": fields.whole(1), "lora_alpha": _POSITIVE, "use_rslora": fields.TRUTH,
    "bias": fields.one_of("none"),
}  # fmt: skip
_OF_MLX = {"scale": _POSITIVE, "rank": fields.whole(1), "alpha": _POSITIVE}


class Scales:
    """Alpha of each pair of factors, so that the scaling is alpha / rank.

    `config`: the content of adapter_config.json, empty if there is none; `metadata`: of the
    safetensors file; `alpha`: what the caller says.

    Raises:
        ValueError: fields of another kind, or that say more than a scaling.
    """

    def __init__(
        self, where: str, config: Mapping[str, object], metadata: Mapping[str, str],
        alpha: float | None,
    ) -> None:  # fmt: skip
        self._where, self._given, self._mlx = where, alpha, config.get("lora_parameters")
        self._dora = config.get("use_dora") is True or config.get("fine_tune_type") == "dora"
        if alpha is not None and not _POSITIVE.fits(alpha):
            raise ValueError(f"load_lora: alpha={alpha!r:.40}; expected {_POSITIVE.expected}")
        if self._mlx is not None:
            if not isinstance(self._mlx, dict):
                raise ValueError(f"{where}: lora_parameters is {self._mlx!r:.60}, no object")
            fields.check(f"{where}: lora_parameters", self._mlx, _OF_MLX, ("scale",))
        self._parts: dict[str, Mapping[str, object]] = {}
        if METADATA in metadata:
            for key, value in parse_object(metadata[METADATA].encode(), where).items():
                part, _, field = key.rpartition(".")
                self._parts.setdefault(part, {})[field] = value  # type: ignore[index]
        if config and self._mlx is None:
            self._parts[""] = config
        for own in self._parts.values():
            _check(where, own)

    def alpha(self, module: str, part: str, program: str, rank: int, own: Tensor | None) -> float:
        """Alpha of a pair of this rank; `own`: the tensor `.alpha` of its module, if there is one.

        Raises:
            ValueError: nothing says it, or two things do; another rank than the configuration's.
        """
        found = self._in_file(module, part, rank, own)
        if found is not None and self._given is not None:
            raise ValueError(f"{self._where}: alpha={self._given}, but the file has its own")
        found = self._given if found is None else found
        if found is None and program in ("kohya", "diffusers"):
            return rank
        if found is None:
            raise ValueError(
                f"{self._where}: the file does not say its alpha (the scaling is alpha / rank, "
                f"and {module:.80} has rank {rank}); pass alpha= as it was trained with"
            )
        return found

    def check_magnitudes(self, found: Iterable[bool]) -> None:
        """Raise ValueError if the configuration says DoRA, and a module has no magnitude."""
        if self._dora and not all(found):
            raise ValueError(
                f"{self._where}: the configuration beside it says DoRA, and the file has modules "
                "without a magnitude; is it complete, and is the configuration its own?"
            )

    def _in_file(self, module: str, part: str, rank: int, own: Tensor | None) -> float | None:
        if own is not None:
            if own.numel() != 1 or not own.isfinite().all() or own.item() <= 0:
                raise ValueError(f"{self._where}: {module:.80}.alpha is {own!s:.40}, no scaling")
            return float(own)
        if isinstance(self._mlx, dict):
            self._check_rank(module, rank, self._mlx.get("rank", rank))
            scale, alpha = self._mlx["scale"], self._mlx.get("alpha")
            whole: float = scale * rank if alpha is None else scale * alpha
            return whole
        config = self._parts.get(part, self._parts.get(""))
        if config is None:
            return None
        self._check_rank(module, rank, config["r"])
        found: float = config["lora_alpha"]  # type: ignore[assignment]
        return found * rank**0.5 if config.get("use_rslora") else found

    def _check_rank(self, module: str, rank: int, said: object) -> None:
        if said != rank:
            raise ValueError(
                f"{self._where}: {module:.80} has rank {rank}, the configuration says {said}"
            )


def _check(where: str, config: Mapping[str, object]) -> None:
    on = {key: value for key, value in config.items() if not is_off(value)}
    fields.check(where, on, _OF_PEFT, ("r", "lora_alpha"))
    if more := [key for key in on if key not in _USED | _IGNORED]:
        raise ValueError(
            f"{where}: {more[0]:.80} = {on[more[0]]!r:.80} is not read from another program's "
            "adapter; of a PEFT directory load_peft reads it"
        )
