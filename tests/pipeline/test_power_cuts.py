"""Whenever the power is cut, the earlier or the new output is on the disk, whole, and the same call goes on from it.

Two ways to see it: what is renamed has been synced before, and its folder is synced before anything goes; and where
loop devices are allowed, copies of a mounted disk as it is at many moments.
"""

import os
import posix
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from configurations import Quantize
from streamed import EARLIER, configured, files, states_of

from thermo_lib.files import folders
from thermo_lib.files.text import write_json
from thermo_lib.files.whole import replacing_together
from thermo_lib.models.lm import DiffusionLM
from thermo_lib.pipeline.storage import save_quantized
from thermo_lib.pipeline.streaming import RUN_NAME, quantize_checkpoint
from thermo_lib.studies import grid
from thermo_lib.studies.grid import Grid, Inputs, point

MIB = 2**20


class Ledger:
    """What has been synced, and which folders have names that haven't.

    What is there at the beginning is on the disk.
    """

    def __init__(self, place: Path):
        self.place, self.pending, self.renames = place, set[Path](), 0
        self.synced = {path: self._state(path) for path in (place, *place.rglob("*"))}

    @staticmethod
    def _state(path: Path) -> object:
        return sorted(path.name for path in path.iterdir()) if path.is_dir() else path.read_bytes()

    def fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self.synced[path] = self._state(path)
        self.pending.discard(path)

    def moved(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """A function that gives a file or folder another's name."""

        def checked(old: Path, new: Path) -> Any:
            old, new = Path(old), Path(new)
            inside = [old, *(old.rglob("*") if old.is_dir() else ())]
            for path in inside:
                assert self.synced.get(path) == self._state(path), f"{path} isn't on the disk when {new} is renamed"
            known = {new / path.relative_to(old): self.synced[path] for path in inside}
            earlier = [new, *(new.rglob("*") if new.is_dir() else ())]
            swapped = {old / path.relative_to(new): self.synced.get(path) for path in earlier}
            found = move(old, new)
            self.synced |= known | swapped
            self.pending.add(new.parent)
            self.renames += 1
            return found

        return checked

    def removed(self, remove: Callable[..., Any]) -> Callable[..., Any]:
        """A function that removes a folder."""

        def checked(path: Path, **more: Any) -> None:
            assert not self.pending, f"{path} goes before the names in {self.pending} are on the disk"
            remove(path, **more)

        return checked


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Ledger]:
    """Begins to record below a folder."""

    def begin(place: Path) -> Ledger:
        ledger = Ledger(place)
        monkeypatch.setattr(os, "fsync", ledger.fsync)
        monkeypatch.setattr(os, "replace", ledger.moved(os.replace))
        if folders._exchange.__name__ != "<lambda>":
            swap = folders._exchange
            complete_first = ledger.moved(lambda complete, folder: swap(folder, complete))
            monkeypatch.setattr(folders, "_exchange", lambda folder, complete: complete_first(complete, folder))
        monkeypatch.setattr(shutil, "rmtree", ledger.removed(shutil.rmtree))
        return ledger

    return begin


class TestOrder:
    @pytest.mark.parametrize("swaps", [True, False])
    @pytest.mark.parametrize("quantizer", ["least_squares", "gptq"])
    @pytest.mark.usefixtures("several_shards")
    def test_quantize_checkpoint(
        self,
        write: Callable[..., Path],
        output: Path,
        record: Callable[[Path], Ledger],
        monkeypatch: pytest.MonkeyPatch,
        quantizer: str,
        swaps: bool,
    ) -> None:
        source, config = write(), configured(quantizer=quantizer, timesteps=8)
        calibration = states_of(source) if config.needs_calibration else None
        if not swaps:
            monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        ledger = record(output.parent)
        quantize_checkpoint(source, output, config, calibration)
        assert (ledger.pending, ledger.renames > 8) == (set(), True)

    @pytest.mark.parametrize("swaps", [True, False])
    def test_folders_and_files(
        self,
        quantized: Quantize,
        output: Path,
        record: Callable[[Path], Ledger],
        monkeypatch: pytest.MonkeyPatch,
        swaps: bool,
    ) -> None:
        if not swaps:
            monkeypatch.setattr(folders, "_exchange", lambda *_: False)
        ledger, place = record(output.parent), output.parent
        save_quantized(quantized(), output)
        write_json(place / "made" / "on" / "the way.json", [1])
        with replacing_together(place / "made") as new:
            (new / "in").mkdir()
            (new / "a").touch()
            (new / "in" / "b").write_text("b")
        assert (ledger.pending, ledger.renames) == (set(), 6 + (not swaps))  # one is that of the earlier folder

    def test_what_is_not_synced_is_found(self, output: Path, record: Callable[[Path], Ledger]) -> None:
        record(output.parent)
        os.fsync = lambda _: None
        with pytest.raises(AssertionError, match=r"isn't on the disk when .*a.json is renamed"):
            write_json(output.parent / "a.json", [1])


class Disk:
    """An ext4 file system in a file, and copies of it as they are after a power cut.

    Attributes:
        place: where it is mounted.
        cuts: the copies.
    """

    def __init__(self, folder: Path):
        self.image, self.place, self.cuts = folder / "image", folder / "disk", list[Path]()
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(24 * MIB)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True, capture_output=True)
        self.mount(self.image, self.place)

    @staticmethod
    def mount(image: Path, place: Path) -> None:
        subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)

    @staticmethod
    def unmount(place: Path) -> None:
        subprocess.run(["umount", place], check=True, capture_output=True)

    def cut(self) -> None:
        """Copy what is on the disk, without what only memory has."""
        copy = self.image.with_name(f"cut {len(self.cuts):04}")
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True)
        self.cuts.append(copy)

    def cutting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function, with a cut before and after it."""

        def wrapped(*arguments: Any) -> Any:
            self.cut()
            found = function(*arguments)
            self.cut()
            return found

        return wrapped

    def after(self, cut: Path) -> Iterator[Path]:
        """Where a copy is mounted."""
        place = self.place.with_name("after")
        place.mkdir(exist_ok=True)
        self.mount(cut, place)
        try:
            yield place
        finally:
            self.unmount(place)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    if not all(shutil.which(tool) for tool in ("mkfs.ext4", "mount", "umount", "losetup")):
        pytest.skip("mkfs.ext4, mount, umount or losetup is missing")
    (tmp_path / "power").mkdir()
    try:
        made = Disk(tmp_path / "power")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"loop devices are not allowed here: {error.stderr.decode().strip()}")
    monkeypatch.setattr(os, "fsync", posix.fsync)
    yield made
    Disk.unmount(made.place)


class TestDisk:
    """After a cut at any moment, and at the end."""

    def check(
        self, disk: Disk, call: Callable[[Path], object], name: str, state: Callable[[Path], object], some: int
    ) -> None:
        """Call on the disk with cuts, and look at some of them; a few go on.

        Args:
            disk: with the earlier output.
            call: writes in the folder that it is given.
            name: of the output.
            state: of the output: what is compared.
            some: number of cuts that are looked at, beside the last.
        """
        subprocess.run(["sync", "-f", disk.place], check=True)
        earlier = state(disk.place / name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", disk.cutting(os.fsync))
            patch.setattr(os, "replace", disk.cutting(os.replace))
            patch.setattr(folders, "_exchange", disk.cutting(folders._exchange))
            call(disk.place)
        disk.cut()
        new, seen = state(disk.place / name), []
        drawn = sorted(random.Random(0).sample(disk.cuts[:-1], min(some, len(disk.cuts) - 1)))
        for number, cut in enumerate([*drawn, disk.cuts[-1]]):
            for place in disk.after(cut):
                found = state(place / name)
                seen.append("earlier" if found == earlier else "new" if found == new else found)
                if number % 4 == 0:
                    call(place)
                    assert state(place / name) == new
        assert earlier != new
        assert set(seen) <= {"earlier", "new"}
        assert seen == sorted(seen), "what is new stays"
        assert seen[-1] == "new"

    @pytest.mark.usefixtures("several_shards")
    def test_quantize_checkpoint(self, disk: Disk, write: Callable[..., Path]) -> None:
        source, earlier = write(), disk.place / "output"
        earlier.mkdir()
        (earlier / "config.json").write_bytes(EARLIER["config.json"])

        def state(folder: Path) -> object:
            return {name: content for name, content in files(folder).items() if name != RUN_NAME}

        self.check(disk, lambda place: quantize_checkpoint(source, place / "output", configured()), "output", state, 6)

    def test_save_quantized(self, disk: Disk, quantized: Quantize) -> None:
        save_quantized(quantized(bit_width=4), disk.place / "output")
        self.check(disk, lambda place: save_quantized(quantized(), place / "output"), "output", files, 6)

    def test_study(self, disk: Disk, tiny: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
        def score(_: object, measured: grid.Point, __: object) -> grid.PointRow:
            return grid.PointRow(measured, [0.5], [0.5], [0.5], [0.5], None, None, 2.0)

        monkeypatch.setattr(grid, "score", score)
        monkeypatch.setattr(grid._Models, "build", lambda *_: None)
        monkeypatch.setattr(grid._Models, "suite", lambda *_: None)
        every = [point(seed, quantizer="rtn") for seed in range(3)]

        def study(place: Path, points: list[grid.Point] = every) -> None:
            Grid(place / "points.json", tiny, Inputs()).run(points, progress=False)

        study(disk.place, every[:1])
        counts = []

        def state(path: Path) -> object:
            counts.append(len(Grid(path, tiny, Inputs()).rows))  # which reads it whole, or raises
            return "all" if counts[-1] == 3 else "some"

        self.check(disk, study, "points.json", state, 6)
        assert min(counts) == 1
