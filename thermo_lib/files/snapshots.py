"""Snapshots of long runs, so that one that was stopped goes on where it was, with the same result bit for bit."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thermo_lib.files.tensors import check_tensors
from thermo_lib.files.whole import replacing


def digest(*parts: Any) -> str:
    """What a run depends on, in 16 hexadecimal digits: names to tensors, or anything that JSON can hold."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Mapping) and any(isinstance(value, Tensor) for value in part.values()):
            for name, tensor in sorted(part.items()):
                found.update(name.encode())
                found.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Snapshot:
    """The state of a run in a safetensors file, which is replaced whole.

    Attributes:
        path: the file.
        run: digest of what the run depends on.
        is_sealed: whether a digest of the state is in the file too, so that a damaged one is known.
    """

    path: Path
    run: str
    is_sealed: bool = True

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the file by one with this state.

        Raises:
            OSError: no space left, or no right to write; an earlier file is as it was.
        """
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
        about = f"{self.run}|{digest(tensors)}" if self.is_sealed else self.run
        with replacing(self.path, "an earlier snapshot is kept, the same call goes on from there") as new:
            save_file(tensors, new, metadata={"run": about})

    def load(self) -> dict[str, Tensor]:
        """The state; empty where there is no file yet.

        Raises:
            ValueError: a damaged file, or one of another run.
        """
        if not self.path.is_file():
            return {}
        try:
            about, state = _read(self.path, is_sealed=self.is_sealed)
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(error) from error
        if about != self.run:
            found = f"found a run of other weights, states or settings in {self.path}"
            raise ValueError(f"resume: {found}, allowed is the same run; delete it or name another folder")
        return state

    @contextmanager
    def checked(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[None]:
        """Compare a state with what it should be, then say of any error while it is put back where it is from.

        Args:
            found: the state, or a part of it.
            expected: tensors of the same names, shapes and types.

        Raises:
            ValueError: a tensor is missing, extra, of another shape or type, or holds NaN or infinity.
        """
        try:
            check_tensors(found, expected, self.path)
            for name, tensor in found.items():
                if tensor.dtype != expected[name].dtype:
                    raise ValueError(f"{name}: found {tensor.dtype}, expected {expected[name].dtype}")
            yield
        except (ValueError, RuntimeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"resume: {self.path} is not a complete snapshot ({error}); delete it")


def remove_damaged(folder: Path) -> None:
    """Remove the snapshots in a folder that aren't complete."""
    for path in folder.glob("*.safetensors"):
        try:
            _read(path, is_sealed=True)
        except (SafetensorError, OSError, ValueError):
            path.unlink()


def _read(path: Path, *, is_sealed: bool) -> tuple[str, dict[str, Tensor]]:
    """The run of a snapshot and its state; raises ValueError where the state isn't what was saved."""
    with safe_open(path, framework="pt") as file:
        run, _, seal = (file.metadata() or {}).get("run", "").partition("|")
        state = {key: file.get_tensor(key) for key in file.keys()}
    if (seal or is_sealed) and seal != digest(state):
        raise ValueError("its content has changed since it was written")
    return run, state


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of ``state`` whose key begins with ``name`` and a dot, without both."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def named(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``part_of``."""
    return {f"{name}.{key}": value for key, value in state.items()}
