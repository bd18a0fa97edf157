"""Names of single settings: dotted ones, and the flat ones of the first version and of format version 2.

They are turned into the nested fields of ``ThermoConfig``. A dotted name begins with a field or with a phase of
training, for example ``weights.bits``, ``time_groups.count`` or ``path_kl.steps``.
"""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

# Flat name to the nested field that it sets.
FLAT = {
    "bit_width": "weights.bits",
    "quantizer": "weights.method",
    "average_bits": "weights.bits",
    "hessian": "weights.token_weights",
    "group_size": "weights.group_size",
    "activation_bits": "activations.bits",
    "activation_ranges": "activations.ranges",
    "activation_clip": "activations.clip",
    "activation_group_size": "activations.group_size",
    "activation_token_states": "activations.by_token_state",
    "range_objective": "activations.fit_to",
    "num_time_groups": "time_groups.count",
    "time_group_starts": "time_groups.starts",
    "enable_boundary_smoothing": "time_groups.smoothing",
    "smoothing_method": "time_groups.smoothing",
    "smoothing_window": "time_groups.window",
    "reconstruction": "training",
    "transitions": "training.what",
    "markov_weight": "training.markov_weight",
    "training_states": "training.states",
    "own_share": "training.own_share",
}
# Old names of things that have another name now; each warns once.
_RENAMED = {
    "hessian": "weights.token_weights",
    "activation_token_states": "activations.by_token_state",
    "range_objective": "activations.fit_to",
    "training_states": "sequential.states, blocks.states or path_kl.states",
    "reconstruction": "a phase of training, such as sequential.steps,",
    "transitions": "path_kl.what",
}
_VALUES = {"hessian": {"transition": "path_kl"}, "training_states": {"chains": "fresh"}}
# Values that say nothing: where a part is absent, only these are taken in silence.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "average_bits": (None,),
    "hessian": ("uniform",),
    "activation_ranges": ("static",),
    "activation_clip": (1, 1.0),
    "activation_group_size": (None,),
    "activation_token_states": (False,),
    "range_objective": ("activation",),
    "time_group_starts": (None,),
    "enable_boundary_smoothing": (False,),
    "smoothing_method": (None,),
    "smoothing_window": (None,),
    "reconstruction": ("none",),
    "transitions": ("none",),
    "markov_weight": (0, 0.0),
    "training_states": ("calibration",),
    "own_share": (0, 0.0),
}
PHASE_NAMES = ("sequential", "blocks", "path_kl", "time_norms")
PARTS = ("weights", "activations", "time_groups", *PHASE_NAMES)
_SEED_GROUPS = 3  # of the first version, wherever smoothing was asked for
_warned: set[str] = set()


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A question that offers the allowed name nearest to a wrong one, or nothing."""
    found = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def is_single(name: str) -> bool:
    """Whether a name is a flat one or a dotted one."""
    return name in FLAT or (name.partition(".")[0] in PARTS and "." in name)


def nested(
    fields: Mapping[str, Any], base: Mapping[str, Any] | None = None, *, lenient: bool = False
) -> dict[str, Any]:
    """Fields of ``ThermoConfig``, from flat and dotted names and any nested ones beside them.

    Args:
        fields: by name; nested fields are kept, flat ones change them, and dotted ones change these.
        base: nested fields that the others change.
        lenient: ignore flat fields that have no meaning beside the others, as folders of version 2 hold them.

    Raises:
        ValueError: a flat field that has no meaning beside the others; names it, what was found and what is allowed.
    """
    result = dict(base or {}) | {name: value for name, value in fields.items() if not is_single(name)}
    flat = {
        name: _VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
        for name, value in fields.items()
        if name in FLAT
    }
    if not lenient:
        _warn(flat)
    use = _Use(flat, lenient)
    if weights := _weights(use, _as_dict(result.get("weights"))):
        result["weights"] = weights
    result["activations"] = _activations(use, _as_dict(result.get("activations")))
    result["time_groups"] = _time_groups(use, _as_dict(result.get("time_groups")))
    result["training"] = _training(use, tuple(_as_dict(phase) for phase in result.get("training", ())))
    for name, value in fields.items():
        if name not in FLAT and is_single(name):
            part, _, key = name.partition(".")
            _set(result, part, key, value)
    return result


def _set(fields: dict[str, Any], part: str, key: str, value: Any) -> None:
    """Set one setting of a part, which is there with its defaults if it wasn't before."""
    if part not in PHASE_NAMES:
        fields[part] = {**(fields.get(part) or {}), key: value}
        return
    if key == "phase":
        allowed = "allowed are the settings of that phase"
        raise ValueError(f"{part}.phase: found {value!r:.80}, {allowed}")
    phases = list(fields["training"])
    if all(phase["phase"] != part for phase in phases):
        later = PHASE_NAMES[PHASE_NAMES.index(part) + 1 :]
        place = next((number for number, phase in enumerate(phases) if phase["phase"] in later), len(phases))
        phases.insert(place, {"phase": part})
    fields["training"] = tuple(phase | {key: value} if phase["phase"] == part else phase for phase in phases)


class _Use:
    """Flat fields, taken one by one; what is left has no meaning.

    Args:
        flat: the fields.
        lenient: see ``nested``.
    """

    def __init__(self, flat: Mapping[str, Any], lenient: bool):
        self.flat, self.lenient = dict(flat), lenient

    def take(self, target: dict[str, Any], **names: str) -> None:
        """Move the fields that were given into ``target``; ``names`` are the target's keys to flat names."""
        target |= {key: self.flat.pop(name) for key, name in names.items() if name in self.flat}

    def refuse(self, because: str, *names: str) -> None:
        """Take out fields that have no meaning, and raise ValueError if one of them says something."""
        for name in names:
            if name not in self.flat:
                continue
            value, allowed = self.flat.pop(name), _NOTHING[name]
            if not self.lenient and not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
                raise ValueError(f"{name}: found {value!r:.80}, allowed is {allowed[0]!r} with {because}")


def _as_dict(part: Any) -> Any:
    """A part with its settings as a mapping; what isn't a part, as None, stays as it is."""
    return part.model_dump(exclude_unset=True) | _tags(part) if hasattr(part, "model_dump") else part


def _tags(part: Any) -> dict[str, Any]:
    return {tag: getattr(part, tag) for tag in ("method", "ranges", "phase") if hasattr(part, tag)}


def _weights(use: _Use, base: dict[str, Any] | None) -> dict[str, Any]:
    present = dict(base or {})
    method = use.flat.pop("quantizer", present.get("method", "gptq"))
    if present and method != present.get("method", "gptq"):
        present = {key: present[key] for key in ("bits", "group_size") if key in present}
    present["method"] = method
    average = use.flat.pop("average_bits", None) if method == "trellis" else None
    if average is not None:
        use.flat.pop("bit_width", None)
        present |= {"bits": average, "spread": True}
    elif method == "trellis" and "bit_width" in use.flat:
        present["spread"] = False
    use.take(present, bits="bit_width", group_size="group_size")
    if method in ("gptq", "trellis"):
        use.take(present, token_weights="hessian")
    use.refuse(f"quantizer={method!r}", "average_bits", "hessian")
    return present if base or len(present) > 1 or method != "gptq" else {}


def _activations(use: _Use, base: dict[str, Any] | None) -> dict[str, Any] | None:
    bits = use.flat.pop("activation_bits", 16 if base is None else base.get("bits", 8))
    if bits == 16 and not isinstance(bits, bool):
        names = ("ranges", "clip", "group_size", "token_states")
        use.refuse("activation_bits=16", *(f"activation_{name}" for name in names), "range_objective")
        return None
    present = dict(base or {})
    ranges = use.flat.pop("activation_ranges", present.get("ranges", "static"))
    if present and ranges != present.get("ranges", "static"):
        present = {}
    present |= {"bits": bits, "ranges": ranges}
    if ranges == "dynamic":
        use.take(present, clip="activation_clip")
        use.refuse("activation_ranges='dynamic'", "activation_group_size", "activation_token_states", "range_objective")
    else:
        if "range_objective" in use.flat and use.flat["range_objective"] != present.get("fit_to", "activation"):
            for key in ("steps", "batch", "lr"):
                present.pop(key, None)
        use.take(
            present,
            group_size="activation_group_size",
            by_token_state="activation_token_states",
            fit_to="range_objective",
        )
        use.refuse("activation_ranges='static', whose ranges are fitted", "activation_clip")
    return present


def _time_groups(use: _Use, base: dict[str, Any] | None) -> dict[str, Any] | None:
    smoothing = ("enable_boundary_smoothing", "smoothing_method", "smoothing_window")
    off = use.flat.get("enable_boundary_smoothing") is False
    said = not off and any(use.flat.get(name) not in (None, False) for name in smoothing)
    starts = use.flat.get("time_group_starts")
    implied = len(starts) + 1 if isinstance(starts, list | tuple) else _SEED_GROUPS if said else 1
    count = use.flat.pop("num_time_groups", implied if base is None else base.get("count", _SEED_GROUPS))
    if count == 1 and not isinstance(count, bool):
        if off:
            use.flat = {name: value for name, value in use.flat.items() if name not in smoothing}
        use.refuse("num_time_groups=1, which has no boundary", "time_group_starts", *smoothing)
        return None
    present = dict(base or {})
    if count != present.get("count", count) and "time_group_starts" not in use.flat:
        present.pop("starts", None)
    present["count"] = count
    use.take(present, starts="time_group_starts")
    before = present.get("smoothing", "linear")
    method = use.flat.pop("smoothing_method", before)
    enabled = use.flat.pop("enable_boundary_smoothing", method is not None)
    if not isinstance(enabled, bool):
        raise ValueError(f"enable_boundary_smoothing: found {enabled!r:.80}, allowed are True and False")
    present["smoothing"] = (method or "linear") if enabled else None
    windowed = present["smoothing"] not in (None, "spline")
    if windowed:
        use.take(present, window="smoothing_window")
    else:  # a window that nothing uses is no error: earlier versions had it always
        use.flat.pop("smoothing_window", None)
        present.pop("window", None)
    return present


def _training(use: _Use, base: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    if not use.flat:
        return base  # a phase may be there twice
    phases = {phase["phase"]: dict(phase) for phase in base}
    reconstruction = use.flat.pop("reconstruction", None)
    if reconstruction is not None:
        phases = {name: phase for name, phase in phases.items() if name in ("path_kl", "time_norms")}
        if not isinstance(reconstruction, str):
            raise ValueError(f"reconstruction: found {reconstruction!r:.80}, allowed are none, sequential and blocks")
        if reconstruction != "none":
            phases = {reconstruction: {"phase": reconstruction}, **phases}
    transitions = use.flat.pop("transitions", None)
    if transitions == "none":
        phases.pop("path_kl", None)
    elif transitions is not None:
        phases.setdefault("path_kl", {"phase": "path_kl"})["what"] = transitions
    states = use.flat.get("training_states")
    if phases and states is not None:
        use.flat.pop("training_states")
        for phase in phases.values():
            phase["states"] = states
    if "path_kl" in phases:
        use.take(phases["path_kl"], markov_weight="markov_weight")
        if phases["path_kl"].get("states") == "fresh" or not use.lenient:
            use.take(phases["path_kl"], own_share="own_share")
    use.refuse("transitions='none'", "markov_weight", "own_share")
    use.refuse("nothing that is trained", "training_states")
    return tuple(phases.values())


def _warn(flat: Mapping[str, Any]) -> None:
    for name in _RENAMED:
        if name in flat and name not in _warned:
            _warned.add(name)
            warnings.warn(f"{name}: is {_RENAMED[name]} of ThermoConfig now", DeprecationWarning, stacklevel=4)
