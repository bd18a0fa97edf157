"""Several processes stream the files that one process streams, whichever of them dies."""

import asyncio
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import dask
import psutil
import pytest
from distributed import Client, LocalCluster, Scheduler, Worker
from distributed.utils import get_mp_context
from safetensors.torch import load_file, save_file
from streamed import EARLIER, configured, files, shard_of, states_of, unfinished

from thermo_lib.files.whole import replacing
from thermo_lib.pipeline import streaming
from thermo_lib.pipeline.cluster import cluster_client, run_on
from thermo_lib.pipeline.streaming import quantize_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("several_shards")]


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[BaseContext]:
    """Processes begin as copies of one that has imported the library: each would take seconds to import it anew."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        context = get_mp_context()
        context.set_forkserver_preload(["distributed", "thermo_lib.pipeline.streaming"])
        yield context


@pytest.fixture(scope="class")
def cluster(processes: BaseContext) -> Iterator[LocalCluster]:
    once = {"distributed.scheduler.allowed-failures": 1}  # other than 3, so that giving up takes less time
    with (
        dask.config.set(once),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
    ):
        yield cluster


class TestCluster:
    """The same files from several processes."""

    def test_the_files_are_those_of_one_process(
        self, cluster: LocalCluster, write: Callable[..., Path], tmp_path: Path, output: Path
    ) -> None:
        source, config = write(), configured(embedding_bits=8)
        quantize_checkpoint(source, tmp_path / "alone", config)
        with Client(cluster) as client:
            quantize_checkpoint(source, output, config, client=client)
        assert files(output) == files(tmp_path / "alone")
        assert not unfinished(output).exists()

    def test_a_killed_worker_costs_time_only(
        self,
        cluster: LocalCluster,
        write: Callable[..., Path],
        tmp_path: Path,
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The first worker that begins the second shard dies in the middle of it, with half a file written."""
        source, config = write(), configured()
        quantize_checkpoint(source, tmp_path / "alone", config)
        monkeypatch.setattr(streaming, "_write_shard", KillsOnce(tmp_path / "killed"))
        with Client(cluster) as client:
            quantize_checkpoint(source, output, config, client=client)
        assert (tmp_path / "killed").exists()
        assert files(output) == files(tmp_path / "alone")

    def test_a_shard_that_kills_every_worker_is_an_error(
        self, cluster: LocalCluster, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, config = write(), configured()
        with monkeypatch.context() as patch, Client(cluster) as client:
            patch.setattr(streaming, "_write_shard", KillsOnce(None))
            with pytest.raises(OSError, match="scheduler: every worker that tried a shard was lost"):
                quantize_checkpoint(source, output, config, client=client)
        assert files(output) == EARLIER
        quantize_checkpoint(source, output, config)  # goes on alone

    def test_an_error_of_a_worker_is_the_callers(
        self, cluster: LocalCluster, write: Callable[..., Path], output: Path
    ) -> None:
        source = write()
        path = shard_of(source, "model.norm.weight")
        tensors = load_file(path)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, path)
        with Client(cluster) as client, pytest.raises(ValueError, match=r"model\.norm\.weight: found NaN or infinity"):
            quantize_checkpoint(source, output, configured(), client=client)

    def test_a_cluster_without_workers_is_an_error(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("thermo_lib.pipeline.cluster._WORKER_SECONDS", 0.5)
        with (
            LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
            Client(empty) as client,
            pytest.raises(OSError, match=r"scheduler: found no worker in 0\.5 s, allowed is at least one"),
        ):
            quantize_checkpoint(write(), output, configured(), client=client)
        assert files(output) == EARLIER

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (signal.SIGKILL, "scheduler: the scheduler was lost"),
            (signal.SIGSTOP, r"scheduler: the scheduler was lost \(no answer in 3 s\); complete"),
        ],
        ids=["lost", "silent"],
    )
    def test_a_scheduler_that_dies_or_stops_is_an_error(
        self,
        processes: BaseContext,
        write: Callable[..., Path],
        output: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
        message: str,
    ) -> None:
        """It does so while the second shard is worked on."""
        source = write()
        monkeypatch.setattr("thermo_lib.pipeline.cluster._ASK_SECONDS", 1)
        monkeypatch.setattr("thermo_lib.pipeline.cluster._ANSWER_SECONDS", 3)
        with outside(processes) as (client, scheduler, _):
            monkeypatch.setattr(streaming, "_write_shard", Signals(scheduler, number))
            with pytest.raises(OSError, match=message):
                quantize_checkpoint(source, output, configured(), client=client)
            with suppress(ProcessLookupError):
                os.kill(scheduler, signal.SIGCONT)
        assert files(output) == EARLIER

    def test_a_last_worker_that_does_not_come_back_is_an_error(
        self, write: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At first there is one, as it seems, then none."""
        counts = itertools.chain([1], itertools.repeat(0))
        monkeypatch.setattr("thermo_lib.pipeline.cluster._workers", lambda *_: next(counts))
        monkeypatch.setattr("thermo_lib.pipeline.cluster._WORKER_SECONDS", 0.5)
        with (
            LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
            Client(empty) as client,
            pytest.raises(OSError, match=r"scheduler: found no worker in 0\.5 s, allowed is at least one"),
        ):
            quantize_checkpoint(write(), output, configured(), client=client)
        assert next(counts) == 0
        assert files(output) == EARLIER

    def test_with_calibration_it_is_refused(
        self, cluster: LocalCluster, write: Callable[..., Path], output: Path
    ) -> None:
        source = write()
        with Client(cluster) as client, pytest.raises(ValueError, match="client: found one, allowed is None"):
            quantize_checkpoint(
                source, output, configured(quantizer="gptq", timesteps=8), states_of(source), client=client
            )


def scheduler(connection: Connection) -> None:
    """Runs a scheduler, and sends its address."""

    async def run() -> None:
        async with Scheduler(port=0, dashboard=False) as running:
            connection.send(running.address)
            await running.finished()

    asyncio.run(run())


def worker(address: str) -> None:
    """Runs a worker of the scheduler at an address."""

    async def run() -> None:
        async with Worker(address, nthreads=1, dashboard=False) as running:
            await running.finished()

    asyncio.run(run())


class KillsOnce:
    """``_write_shard``, but the process dies at the second shard: the first time, or always if there is no marker."""

    def __init__(self, marker: Path | None):
        self.marker, self.write_shard = marker, streaming._write_shard

    def __call__(self, path: Path, *arguments: Any) -> str:
        if path.name.startswith("model-00002") and not (self.marker and self.marker.exists()):
            if self.marker:
                self.marker.touch()
            with replacing(path) as new:
                new.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        return self.write_shard(path, *arguments)


class Signals:
    """``_write_shard``, but at the second shard a process gets a signal, and the shard waits."""

    def __init__(self, process: int, number: signal.Signals):
        self.process, self.number, self.write_shard = process, number, streaming._write_shard

    def __call__(self, path: Path, *arguments: Any) -> str:
        if path.name.startswith("model-00002"):
            os.kill(self.process, self.number)
            time.sleep(5)
        return self.write_shard(path, *arguments)


@contextmanager
def outside(processes: BaseContext) -> Iterator[tuple[Client, int, int]]:
    """A client of a scheduler and a worker without a nanny, and their process numbers."""
    here, there = processes.Pipe()
    started = [processes.Process(target=scheduler, args=(there,))]
    started[0].start()
    address = here.recv()
    started.append(processes.Process(target=worker, args=(address,)))
    started[1].start()
    try:
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
            Client(address, timeout="30s") as client,
        ):
            yield client, *(process.pid for process in started)
    finally:
        for process in started:
            process.kill()
            process.join()


class TestConnecting:
    @pytest.mark.parametrize("said", [b"", b"\0", b"SSH-2.0-OpenSSH_9.6\r\n" * 3])
    def test_what_is_no_scheduler_is_an_error(self, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("thermo_lib.pipeline.cluster._CONNECT_SECONDS", 1)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"tcp://127.0.0.1:{server.getsockname()[1]}"

            def serve() -> None:
                with suppress(OSError):
                    while True:
                        held.append(server.accept()[0])
                        held[-1].sendall(said)

            held: list[socket.socket] = []
            threading.Thread(target=serve, daemon=True).start()
            message = rf"^scheduler: found no dask scheduler at '{address}' \([^\n]+\)$"
            with pytest.raises(OSError, match=message), cluster_client(address):
                pass
            assert held
        for peer in held:
            peer.close()

    def test_a_client_that_has_closed_itself_has_lost_its_scheduler(self) -> None:
        closed = Mock(Client, scheduler=None)  # as it is when the scheduler doesn't come back
        with pytest.raises(OSError, match=r"^scheduler: the scheduler was lost \([^\n]+\); call again$"):
            next(run_on(closed, [int], "call again"))

    def test_a_local_cluster_listens_on_loopback_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.cpu_count", lambda: 1)
        with cluster_client("local") as client:
            own = psutil.Process()
            sockets = [c for p in (own, *own.children(recursive=True)) for c in p.net_connections(kind="tcp")]
            assert {client.scheduler.address.split("/")[2].split(":")[0]} == {"127.0.0.1"}
            assert client.dashboard_link.startswith("http://127.0.0.1:")
        listening = {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
