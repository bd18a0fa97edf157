"""What can be chosen on the workbench, and the configuration that a choice means."""

from dataclasses import dataclass
from typing import Any

from thermo_lib.pipeline.config import ThermoConfig
from thermo_lib.pipeline.presets import PRESETS
from thermo_lib.time_aware.smoothing import SMOOTHING_METHODS, WINDOWED

_BEAM = 16  # of trellises: a fourth of what presets take, a fourth of the time
_CLIP = 0.9  # of dynamic ranges, as the preset w2a4 has it
_TRELLIS: dict[str, Any] = {"method": "trellis", "token_weights": "uniform", "beam": _BEAM}
METHODS: dict[str, dict[str, Any]] = {
    "round-to-nearest": {"method": "rtn"},
    "least squares": {"method": "least_squares"},
    "GPTQ": {"method": "gptq"},
    "trellis": _TRELLIS | {"spread": False},
    "trellis, spread bits": _TRELLIS | {"spread": True},
}
NAMED = {f"preset {name}": name for name in PRESETS}
WEIGHTS = (*METHODS, *NAMED)
GROUP_SIZES = (32, 64, 128, 256, None)  # None for the whole row
ACTIVATION_BITS = (16, 8, 4, 3, 2)
SMOOTHING = (None, *SMOOTHING_METHODS)
MOST = {"time_groups": 64, "window": 20}


@dataclass(frozen=True)
class Choice:
    """What is chosen.

    Attributes:
        weights: one of ``WEIGHTS``: a method, or a preset with its training.
        weight_bits: number of bits of a weight's code; a preset has its own.
        group_size: one of ``GROUP_SIZES``: number of neighbours in a row that share a scale; a preset has its own, and
            a trellis has one scale a row.
        activation_bits: one of ``ACTIVATION_BITS``, 16 for not quantized; None for what a preset has.
        is_dynamic: put activations into the range of each token instead of static ranges.
        time_groups: number of groups of timesteps with static ranges of their own; 1 for one range at all timesteps.
        smoothing: one of ``SMOOTHING``.
        window: number of timesteps smoothed on each side of a boundary, 1 to 20.
        layer: name of the linear whose parameters are shown.

    Raises:
        ValueError: a value that isn't allowed; names the field, what was found and what is allowed.
    """

    weights: str = "least squares"
    weight_bits: float = 2
    group_size: int | None = 128
    activation_bits: int | None = 4
    is_dynamic: bool = False
    time_groups: int = 3
    smoothing: str | None = "linear"
    window: int = 3
    layer: str = ""

    def __post_init__(self) -> None:
        bits: tuple[int | None, ...] = (*ACTIVATION_BITS, None) if self.weights in NAMED else ACTIVATION_BITS
        some = {"weights": WEIGHTS, "group_size": GROUP_SIZES, "activation_bits": bits, "smoothing": SMOOTHING}
        for name, allowed in some.items():
            if (found := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: found {found!r:.80}, allowed are {', '.join(map(str, allowed))}")
        for name, most in MOST.items():
            found = getattr(self, name)
            if type(found) is not int or not 1 <= found <= most:
                raise ValueError(f"{name}: found {found!r:.80}, allowed are whole numbers from 1 to {most}")

    @property
    def is_static(self) -> bool:
        """Whether static ranges of its own are asked for."""
        return self.activation_bits not in (None, 16) and not self.is_dynamic

    @property
    def name(self) -> str:
        """Of the weights, as a folder can be called; equal for choices with the same weights."""
        if self.weights in NAMED:
            return self.weights.replace(" ", "-")
        words = f"{self.weights} {self.weight_bits:g} bits"
        if not self.weights.startswith("trellis"):
            words += f" {self.group_size or 'row'}"
        return words.replace(",", "").replace(" ", "-").lower()

    def weights_config(self, timesteps: int) -> ThermoConfig:
        """How the weights are made, activations as they are unless a preset has its own.

        Raises:
            ValueError: bits that the method can't have.
        """
        fields = self.weights_fields()
        return (
            ThermoConfig.preset(NAMED[self.weights], timesteps=timesteps)
            if fields is None
            else ThermoConfig(weights=fields, timesteps=timesteps)
        )

    def weights_fields(self) -> dict[str, Any] | None:
        """What ``ThermoConfig.weights`` is given; None for a preset."""
        if self.weights in NAMED:
            return None
        how = METHODS[self.weights]
        size = {} if how["method"] == "trellis" else {"group_size": self.group_size}
        bits = int(self.weight_bits) if self.weight_bits == int(self.weight_bits) else self.weight_bits
        return how | {"bits": bits} | size

    def activation_fields(self, timesteps: int, tokens: int) -> dict[str, Any] | None:
        """What ``requantize_activations`` is given; None where activations stay as the weights' configuration has them.

        Args:
            timesteps: ``T``.
            tokens: that static ranges are fitted on, see ``Static``.
        """
        if self.activation_bits is None or (self.activation_bits == 16 and self.weights in METHODS):
            return None
        if self.activation_bits == 16:
            return {"activations": None, "time_groups": None}
        if self.is_dynamic:
            how: dict[str, Any] = {"ranges": "dynamic", "bits": self.activation_bits, "clip": _CLIP}
            return {"activations": how, "time_groups": None}
        how = {"ranges": "static", "bits": self.activation_bits, "tokens": tokens}
        count, half = self._groups(timesteps)
        if count == 1:
            return {"activations": how, "time_groups": None}
        is_windowed = self.smoothing in WINDOWED
        groups: dict[str, Any] = {"count": count, "smoothing": None if is_windowed and not half else self.smoothing}
        if is_windowed and half:
            groups["window"] = min(self.window, half)
        return {"activations": how, "time_groups": groups}

    def _groups(self, timesteps: int) -> tuple[int, int]:
        """The number of groups, and half of the timesteps of the longest, which is the widest window."""
        count = min(self.time_groups, timesteps)
        return count, -(-timesteps // count) // 2

    def notes(self, timesteps: int) -> list[str]:
        """What has no effect, a line each."""
        found = []
        if self.weights in NAMED:
            found.append(f"weights: found {self.weights}, which has bits and groups of its own.")
        if not self.is_static:
            if self.time_groups > 1:
                has = "dynamic ranges" if self.is_dynamic and self.activation_bits != 16 else self.activation_bits
                because = f"activation_bits: found {has or self.weights}"
                found.append(f"{because}, so time groups have no effect; choose static ranges of 8 bits or fewer.")
            return found
        if self.time_groups == 1 and self.smoothing is not None:
            found.append("time_groups: found 1, which has no boundary to smooth; choose 2 or more.")
        if self.time_groups > timesteps:
            found.append(f"time_groups: found {self.time_groups}, shown are {timesteps}, one for each timestep.")
        half = self._groups(timesteps)[1]
        if self.time_groups > 1 and self.smoothing in WINDOWED and self.window > half:
            acts = (
                f"half of a group is {half}, which is what acts" if half else "a group has one timestep, nothing acts"
            )
            found.append(f"window: found {self.window}, {acts}.")
        return found
