"""What a power cut has damaged in an unfinished folder is made anew, and the result is the same to the byte."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from small_runs import every_nth
from streamed import EARLIER, _stop_at_second, configured, files, states_of, unfinished

from thermo_lib.files.outputs import RUN_NAME
from thermo_lib.pipeline import streaming
from thermo_lib.pipeline.streaming import SNAPSHOTS_NAME, quantize_checkpoint

pytestmark = pytest.mark.usefixtures("several_shards")
# What a file may be after the disk has lost its last blocks, or all.
DAMAGE: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: content[: -len(content) // 4] + bytes(len(content) // 4),
    lambda content: bytes(len(content)),
    lambda content: b"",
)


def harm(paths: Iterable[Path]) -> None:
    """Damage each file in its own way."""
    for path, damage in zip(paths, DAMAGE, strict=False):
        path.write_bytes(damage(path.read_bytes()))


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were written, in their order."""
    write, found = streaming._write, []

    def noted(path: Path, *arguments: Any) -> str:
        found.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(streaming, "_write", noted)
    return found


def test_a_damaged_shard_is_written_again_and_no_other(
    write: Callable[..., Path],
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: list[str],
) -> None:
    source = write()
    quantize_checkpoint(source, tmp_path / "whole", configured())
    every = list(shards)
    with monkeypatch.context() as patch:
        stored = streaming._stored

        def stopped(*arguments: Any) -> Any:
            if len(shards) == len(every) + 4:
                raise KeyboardInterrupt
            return stored(*arguments)

        patch.setattr(streaming, "_stored", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, output, configured())
    harm(unfinished(output) / name for name in every[:3])
    shards.clear()
    quantize_checkpoint(source, output, configured())
    assert len(every) > 4
    assert shards == [*every[:3], *every[4:]]
    assert files(output) == files(tmp_path / "whole")


def test_a_damaged_run_begins_anew(
    write: Callable[..., Path],
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write()
    quantize_checkpoint(source, tmp_path / "whole", configured())
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_stored", _stop_at_second(streaming._stored))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, output, configured())
    harm([unfinished(output) / RUN_NAME])
    assert files(output) == EARLIER
    quantize_checkpoint(source, output, configured())
    assert files(output) == files(tmp_path / "whole")


def test_a_damaged_snapshot_is_made_anew(
    write: Callable[..., Path], tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = write(), configured(quantizer="gptq", timesteps=2)
    calibration = every_nth(states_of(source), 4)
    quantize_checkpoint(source, tmp_path / "whole", config, calibration)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_as_stored", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, output, config, calibration)
    snapshots = sorted((unfinished(output) / SNAPSHOTS_NAME).glob("*.safetensors"))
    assert len(snapshots) == 2
    harm(snapshots)
    (snapshots[0].parent / ".tmpAb3dEf").touch()
    quantize_checkpoint(source, output, config, calibration)
    assert files(output) == files(tmp_path / "whole")
    assert not unfinished(output).exists()


def test_an_unfinished_folder_shows_no_more_than_the_output_it_replaces(
    write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_stored", _stop_at_second(streaming._stored))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source := write(), output, configured())
    assert unfinished(output).stat().st_mode & 0o777 == 0o700
    quantize_checkpoint(source, output, configured())
    assert output.stat().st_mode & 0o777 == 0o700
