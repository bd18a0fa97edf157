"""Snapshots of long runs, so that one that was stopped goes on where it was, with the same result bit for bit."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thermo_lib.files.folders import writing


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
    """

    path: Path
    run: str

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the file by one with this state.

        Raises:
            OSError: no space left, or no right to write; an earlier file is as it was.
        """
        temporary = self.path.with_suffix(".tmp")
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
        with writing(self.path, "an earlier snapshot is kept, the same call goes on from there"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, temporary, metadata={"run": self.run})
                os.replace(temporary, self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def load(self) -> dict[str, Tensor]:
        """The state; empty where there is no file yet.

        Raises:
            ValueError: a damaged file, or one of another run.
        """
        if not self.path.is_file():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                run = (file.metadata() or {}).get("run")
                state = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"resume: {self.path} is not a complete snapshot ({error}); delete it") from error
        if run != self.run:
            found = f"found a run of other weights, states or settings in {self.path}"
            raise ValueError(f"resume: {found}, allowed is the same run; delete it or name another folder")
        return state


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of ``state`` whose key begins with ``name`` and a dot, without both."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def named(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``part_of``."""
    return {f"{name}.{key}": value for key, value in state.items()}
