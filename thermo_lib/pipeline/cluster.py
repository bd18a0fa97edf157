"""A ``dask.distributed`` cluster: how to connect to one, and what of it is lost while it works.

Its scheduler, workers and clients unpickle what the others send, so whoever reaches one of them runs code there.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from thermo_lib.extras import needs

if TYPE_CHECKING:
    from distributed import Client

_LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 20  # for a scheduler to take a client
_ANSWER_SECONDS = 15  # for a scheduler to say which workers it has
_ASK_SECONDS = 10  # from one such question to the next
_WORKER_SECONDS = 30  # for a worker to come, at first and after all were lost


@contextmanager
def cluster_client(address: str) -> Iterator["Client"]:
    """A client of the cluster at an address, or of a local one with a process for each core.

    A local one listens on the loopback interface only, its dashboard too.

    Raises:
        OSError: no scheduler answers there in time.
    """
    distributed = needs("distributed")
    if address == "local":
        where = {"host": _LOOPBACK, "dashboard_address": f"{_LOOPBACK}:0"}
        with distributed.LocalCluster(threads_per_worker=1, **where) as cluster, distributed.Client(cluster) as client:
            yield client
        return
    client = _connected(address)
    try:
        yield client
    finally:
        client.close(timeout=_ANSWER_SECONDS)


def _connected(address: str) -> "Client":
    """A client; in a thread of its own, since it waits for ever for what accepts a connection and says nothing."""
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(needs("distributed").Client(address, timeout=f"{_CONNECT_SECONDS / 2}s"))
        except Exception as error:  # of an address, or of what answers there, which may be anything
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    result = found[0] if found else TimeoutError(f"no answer in {_CONNECT_SECONDS} s")
    if isinstance(result, Exception):
        reason = " ".join(str(result).split())
        raise OSError(f"scheduler: found no dask scheduler at {address!r} ({reason:.300})") from result
    return result


def run_on(client: "Client", calls: Sequence[Callable[[], Any]], after: str) -> Iterator[tuple[int, Any]]:
    """Run calls on a cluster, and yield the number of each and what it returned as soon as it is done.

    Args:
        client: of the cluster.
        calls: they are pickled.
        after: what there is after an error, and what to do.

    Raises:
        OSError: no worker came or is left, every worker that tried a call was lost, or the scheduler was, or doesn't
            answer any more.
    """
    wait = needs("distributed").wait
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    futures: dict[Any, int] = {}
    step, asked, seen, answers = min(_ASK_SECONDS, _WORKER_SECONDS), None, time.monotonic(), True
    try:
        futures |= {client.submit(call, pure=False): number for number, call in enumerate(calls)}
        while futures:
            if asked is None or time.monotonic() - asked >= step:
                answers = False
                number = _workers(client, after)
                answers, asked = True, time.monotonic()
                seen = asked if number else seen
                if asked - seen >= _WORKER_SECONDS:
                    found = f"found no worker in {_WORKER_SECONDS} s"
                    raise OSError(f"scheduler: {found}, allowed is at least one; {after}")
            done: set[Any] = set()
            with suppress(TimeoutError):
                done = wait(list(futures), timeout=step, return_when="FIRST_COMPLETED").done
            for future in done:
                try:
                    result = future.result(timeout=_ANSWER_SECONDS)  # the scheduler is asked for it
                except TimeoutError as error:
                    answers, found = False, f"no answer in {_ANSWER_SECONDS} s"
                    raise OSError(f"scheduler: the scheduler was lost ({found}); {after}") from error
                yield futures.pop(future), result
    except KilledWorker as error:
        raise OSError(f"scheduler: every worker that tried a shard was lost ({error}); {after}") from error
    except (CancelledError, CommClosedError) as error:
        raise OSError(f"scheduler: the scheduler was lost ({error}); {after}") from error
    finally:
        if answers:  # one that doesn't would be waited for without end
            with suppress(CancelledError, OSError):
                client.cancel(list(futures))


def _workers(client: "Client", after: str) -> int:
    """How many workers there are; raises OSError where the scheduler doesn't say."""
    scheduler = client.scheduler
    if scheduler is None:  # a client that can't connect again closes itself
        raise OSError(f"scheduler: the scheduler was lost (its client is closed); {after}")
    try:
        return len(client.sync(scheduler.identity, callback_timeout=_ANSWER_SECONDS)["workers"])
    except TimeoutError as error:
        raise OSError(f"scheduler: the scheduler was lost (no answer in {_ANSWER_SECONDS} s); {after}") from error
    except OSError as error:
        raise OSError(f"scheduler: the scheduler was lost ({error}); {after}") from error
