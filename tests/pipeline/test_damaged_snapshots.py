"""A snapshot that holds something else than its run would have saved is refused in one line, whatever is wrong."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from thermo_lib import Calibration, ThermoConfig, quantize
from thermo_lib.files.snapshots import Snapshot, digest
from thermo_lib.models.lm import DiffusionLM

GPTQ = {"quantizer": "gptq", "activation_bits": 16, "num_time_groups": 1, "timesteps": 6, "group_size": 16}
NETWORK = {"phase": "path_kl", "what": "network", "steps": 2, "batch": 2}
BLOCKS = {"phase": "blocks", "steps": 1, "batch": 2}
SEQUENTIAL = {"phase": "sequential", "steps": 1, "batch": 2}

Damage = Callable[[dict[str, Tensor], str], object]


def _shorter(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].flatten()[:1]


def _in_another_type(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].to(torch.int64 if state[name].is_floating_point() else torch.float32)


def _with_nan(state: dict[str, Tensor], name: str) -> None:
    state[name] = torch.full_like(state[name], torch.nan)


DAMAGES: Mapping[str, Damage] = {
    "missing tensors": lambda state, name: state.pop(name),
    "found shape": _shorter,
    "expected torch": _in_another_type,
    "found NaN or infinity": _with_nan,
    "unexpected tensors more": lambda state, _: state.update(more=torch.zeros(1)),
}


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Save another state as that of the same run."""
    with safe_open(path, framework="pt") as file:
        run = file.metadata()["run"].partition("|")[0]
        state = {key: file.get_tensor(key) for key in file.keys()}
    change(state)
    Snapshot(path, run).save(state)


@pytest.fixture(scope="module")
def run(tiny: DiffusionLM, calibration: Calibration) -> Callable[..., object]:
    return lambda training, folder: quantize(
        tiny, ThermoConfig(**GPTQ, training=training), calibration, resume=folder, progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "file", "names"),
    [
        ((), "weights-0", ["weight_scale", "input_layernorm.weight"]),
        ((SEQUENTIAL,), "sequential-0", ["weight_zero_point", "input_layernorm.weight", "packed"]),
        ((BLOCKS,), "blocks-1", ["weight_scale", "post_attention_layernorm.weight"]),
        ((NETWORK,), "transitions", ["parameter.0", "moment.0.exp_avg_sq", "draws.generator", "lr"]),
    ],
)
def test_whatever_is_wrong_is_said(
    run: Callable[..., object], tmp_path: Path, training: tuple[object, ...], file: str, names: list[str]
) -> None:
    path = tmp_path / f"{file}.safetensors"
    run(training, tmp_path)
    whole = path.read_bytes()
    for ending in names:
        for said, damage in DAMAGES.items():
            path.write_bytes(whole)
            with safe_open(path, framework="pt") as kept:
                name = next(key for key in kept.keys() if key.endswith(ending))
                is_float = kept.get_tensor(name).is_floating_point()
            if damage is _with_nan and not is_float:
                continue
            changed(path, lambda state, damage=damage, name=name: damage(state, name))
            with pytest.raises(ValueError, match=rf"^resume: .*{file}\.safetensors is not a complete") as error:
                run(training, tmp_path)
            assert said in str(error.value)
            assert str(error.value).endswith("; delete it")
            assert "\n" not in str(error.value)
    path.unlink()
    run(training, tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_steps_is_said(run: Callable[..., object], tmp_path: Path, count: int) -> None:
    path = tmp_path / "transitions.safetensors"
    run((NETWORK,), tmp_path)
    changed(path, lambda state: state.update(losses=torch.ones(count, dtype=torch.float64)))
    with pytest.raises(ValueError, match=rf"found {count} losses and 2 steps, allowed are 1\.\.2 of both\); delete it"):
        run((NETWORK,), tmp_path)


def test_a_snapshot_without_its_digest_is_no_snapshot(tmp_path: Path) -> None:
    """Only a file of evaluations has none."""
    snapshot = Snapshot(tmp_path / "a.safetensors", "run")
    snapshot.save(state := {"x": torch.zeros(2)})
    assert snapshot.load()["x"].equal(state["x"])
    assert digest(state)
    save_file(state, snapshot.path, metadata={"run": "run"})
    with pytest.raises(ValueError, match=r"is not a complete snapshot \(its content has changed"):
        snapshot.load()
    assert Snapshot(snapshot.path, "run", is_sealed=False).load()["x"].equal(state["x"])
