"""Several processes as `Ranks`: torch.distributed's collectives, and an orderly end if one of them fails.

In: the place of this process. Out: a `ProcessGroup` for as long as a context lasts. Tensors on a GPU go
through nccl, all else through gloo. Objects travel as JSON.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from heapr.errors import ConfigError, RankEnded
from heapr.lifelines import FAILED, SIGNALLED, WAKE, End, Lifelines, accept_all, call, end_hard_after, listen
from heapr.rank_environment import Place
from heapr.ranks import Ranks
from heapr.signals import INTERRUPTED, TERMINATED, Terminated
from heapr.words import first_line

T = TypeVar("T")
Number = TypeVar("Number", int, float)

MEETING_SECONDS = 180.0  # from the first rank's start to the last one's
# A rank may wait for an artifact that another job makes. Ranks that are gone are noticed otherwise.
COLLECTIVE = timedelta(days=30)
CAUSE_SECONDS = 5.0  # until the end of another rank is known that made a collective or torchrun end this one
# For rank 0 to find the same mistake, which is then told as by one process.
SAME_ERROR_SECONDS = 2.0
FORESEEN = (ConfigError, FloatingPointError)
BUCKET = 2**24  # elements that are added in one message
LIBRARIES = ("torch", "transformers")


class ProcessGroup(Ranks):
    """One of several processes; see `Ranks`.

    Args:
        place: of this process.
        hosts: of all.
        lifelines: to the others.
    """

    def __init__(self, place: Place, hosts: list[str], lifelines: Lifelines) -> None:
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self.hosts = hosts
        self.num_local = hosts.count(hosts[place.rank])
        self._lifelines = lifelines
        self._has_ended = False

    def in_order(self, found: Sequence[T]) -> list[T]:
        shares = self.gather(list(found))
        number = sum(map(len, shares))
        return [shares[place % self.size][place // self.size] for place in range(number)]

    def sum(self, tensors: Iterable[Tensor]) -> None:
        self._reduce(tensors, dist.ReduceOp.SUM)

    def maximum(self, tensors: Iterable[Tensor]) -> None:
        self._reduce(tensors, dist.ReduceOp.MAX)

    def total(self, number: Number) -> Number:
        tensor = torch.tensor(number, dtype=torch.float64)
        self.sum([tensor])
        return type(number)(tensor.item())

    def of_first(self, value: T) -> T:
        content = _encoded(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(len(content))
        _collective(dist.broadcast, size, src=0)
        if not self.is_first:
            content = torch.empty(int(size), dtype=torch.uint8)
        _collective(dist.broadcast, content, src=0)
        found: T = _decoded(content)
        return found

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            content = tensor.detach().contiguous()
            _collective(dist.broadcast, content, src=0)
            tensor.copy_(content)

    def gather(self, value: T) -> list[T]:
        content = _encoded(value)
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        _collective(dist.all_gather, sizes, torch.tensor(len(content)))
        most = max(int(size) for size in sizes)
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(content)] = content
        contents = [torch.empty_like(padded) for _ in range(self.size)]
        _collective(dist.all_gather, contents, padded)
        return [_decoded(content[: int(size)]) for content, size in zip(contents, sizes, strict=True)]

    def barrier(self) -> None:
        self.gather(None)

    def check_same(self, what: str, mine: Mapping[str, Any]) -> None:
        found = self.gather(dict(mine))
        for rank, theirs in enumerate(found):
            for name in sorted({*found[0], *theirs}):
                if found[0].get(name) != theirs.get(name):
                    raise ConfigError(
                        f"rank {rank} has another {what} than rank 0: {name} is {theirs.get(name)!r} and not"
                        f" {found[0].get(name)!r}; start all with the same command and the same code"
                    )

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            ending = self._ending(error)
            if ending is error:
                raise
            raise ending from error

    def _reduce(self, tensors: Iterable[Tensor], operation: Any) -> None:
        """Reduce tensors in float64, many small ones in one message."""
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].dtype == torch.float64 and bucket[0].is_contiguous():
                _collective(dist.all_reduce, bucket[0], op=operation)
                continue
            flattened = [tensor.detach().flatten().double() for tensor in bucket]
            flat = torch.cat(flattened)
            _collective(dist.all_reduce, flat, op=operation)
            sizes = [tensor.numel() for tensor in bucket]
            for tensor, reduced in zip(bucket, flat.split(sizes), strict=True):
                tensor.copy_(reduced.view_as(tensor))

    def _ending(self, error: BaseException) -> BaseException:
        """What to raise in place of an error that leaves this rank's work, after the others know of it."""
        if self._has_ended:
            return error
        self._has_ended = True
        seconds = 0.0
        if isinstance(error, _PeerLostError | KeyboardInterrupt):
            seconds = CAUSE_SECONDS
        elif isinstance(error, FORESEEN) and not self.is_first:
            seconds = SAME_ERROR_SECONDS
        end = self._lifelines.wait_for_end(seconds)
        code = 1 if end is None else end.code
        end_hard_after(3 * CAUSE_SECONDS, code, str)  # libraries may wait for lost ranks at exit
        if end is not None:
            return RankEnded(self._lifelines.line(), end.code)
        return self._own_end(error)

    def _own_end(self, error: BaseException) -> BaseException:
        """Tell the others about an error of this rank. Rank 0 speaks for all."""
        if isinstance(error, KeyboardInterrupt):
            is_term = isinstance(error, Terminated)
            code = TERMINATED if is_term else INTERRUPTED
            self._lifelines.tell(SIGNALLED, "terminated" if is_term else "interrupted", code)
            return error if self.is_first else RankEnded("", code)
        is_foreseen = isinstance(error, FORESEEN)
        text = first_line(error) if is_foreseen else f"{type(error).__name__}: {first_line(error)}"
        code = 2 if isinstance(error, ConfigError) else 1
        self._lifelines.tell(FAILED, text, code)
        if not is_foreseen:
            traceback.print_exception(error)
        elif self.is_first:
            return error
        end = End(self.rank, self.hosts[self.rank], FAILED, text, code)
        return RankEnded(str(end) if self.is_first else "", code)

    def part(self) -> None:
        """Wait for the others' work, and no longer for their ends."""
        self.barrier()
        self._lifelines.close()
        self.barrier()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """End the main thread's work, because of the end of another rank."""
        end = self._lifelines.end
        if end is not None and not self._has_ended:
            self._has_ended = True
            end_hard_after(3 * CAUSE_SECONDS, end.code, str)
            raise RankEnded(self._lifelines.line(), end.code)


@contextmanager
def process_group(place: Place) -> Iterator[Ranks]:
    """Meet the other ranks, and part from them at the end.

    Raises:
        ConfigError: they cannot meet, or run different versions of the code.
        RankEnded: see `Ranks.together`.
    """
    store = _meeting_point(place)
    ranks = _met(place, store)
    previous = signal.signal(WAKE, ranks.interrupt)
    try:
        with ranks.together():
            _check_versions(ranks)
            yield ranks
            ranks.part()
        dist.destroy_process_group()
    except BaseException as error:
        atexit.register(_leave, _exit_code(error))
        raise
    finally:
        signal.signal(WAKE, previous)


def _exit_code(error: BaseException) -> int:
    """The exit code of a rank that an error ends."""
    if isinstance(error, RankEnded):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 2 if isinstance(error, ConfigError) else 1


def _leave(code: int) -> None:
    """End the process without taking down the collectives, whose threads abort if their peers are gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _PeerLostError(Exception):
    """A collective failed, because another rank is gone."""


def _collective(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    try:
        function(*arguments, **options)
    except RuntimeError as error:
        raise _PeerLostError(first_line(error)) from error


def _meeting_point(place: Place) -> Any:
    """torch's key-value store, which rank 0 or torchrun serves.

    Raises:
        ConfigError: the port is in use, or nobody listens there.
    """
    is_server = place.rank == 0 and not place.has_listener
    where = f"port {place.port} of {place.host}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            place.host,
            place.port,
            world_size=place.size,
            is_master=is_server,
            timeout=timedelta(seconds=MEETING_SECONDS),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        if is_server:
            raise ConfigError(
                f"rank 0 cannot listen on {where} ({first_line(error)}); give a free one with torchrun"
                " --master-port=... or MASTER_PORT"
            ) from error
        raise ConfigError(
            f"rank {place.rank} on {socket.gethostname()} finds no rank 0 at {where}"
            f" ({first_line(error)}); check that rank 0 runs, and MASTER_ADDR and MASTER_PORT"
        ) from error
    return dist.PrefixStore(f"heapr/{place.attempt}", store)  # type: ignore[attr-defined]


def _met(place: Place, store: Any) -> ProcessGroup:
    """The group, once all ranks have come.

    Raises:
        ConfigError: one has not come in time.
    """
    try:
        sockets = _connected(place, store)
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
        if has_nccl:
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=COLLECTIVE
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"rank {place.rank} on {socket.gethostname()} did not meet the other {place.size - 1} ranks in"
            f" {MEETING_SECONDS:.0f} s ({first_line(error)}); check that all were started"
        ) from error
    lifelines = Lifelines(place.rank, [socket.gethostname()] * place.size, sockets)
    ranks = ProcessGroup(place, lifelines.hosts, lifelines)
    lifelines.watch()
    hosts = ranks.gather(socket.gethostname())
    lifelines.hosts = ranks.hosts = hosts
    ranks.num_local = hosts.count(hosts[place.rank])
    return ranks


def _connected(place: Place, store: Any) -> dict[int, socket.socket]:
    """Lifelines' sockets."""
    if place.rank == 0:
        server, word = listen()
        # Where torchrun listens, rank 0 may be on another machine than its agent's address says.
        host = place.host if not place.has_listener else socket.gethostname()
        store.set("lifelines", json.dumps([[host, place.host], server.getsockname()[1], word]))
        return accept_all(server, word, place.size, seconds=MEETING_SECONDS)
    hosts, port, word = json.loads(store.get("lifelines"))
    for host in hosts:
        with suppress(OSError):
            return call(host, port, word, place.rank, seconds=MEETING_SECONDS)
    raise OSError(f"rank 0 does not answer on port {port} of {hosts[0]}")


def _check_versions(ranks: Ranks) -> None:
    """Check that all ranks run the same code.

    Raises:
        ConfigError: they do not.
    """
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    mine = {library: version(library) for library in LIBRARIES}
    ranks.check_same("version", {"heapr": digest.hexdigest()[:12], **mine})


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one device, together at most `BUCKET` elements or one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(other.numel() for other in bucket) + tensor.numel()
        if bucket and (size > BUCKET or bucket[0].device != tensor.device):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(content: Tensor) -> Any:
    return json.loads(content.numpy().tobytes())
