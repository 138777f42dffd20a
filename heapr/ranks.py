"""The processes that work on one experiment together: who does what, and how results come together.

In: items, numbers and tensors of one rank. Out: its share, or what all ranks have together. `Ranks` are
passed down to whoever shares work out. A process that works alone is rank 0 of 1; for it everything here does
nothing, and torch.distributed is not imported. Several processes are in heapr/process_group.py.

What is shared out are batches. Every batch is thus computed as one process computes it, and sums differ by
the order of additions alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Number = TypeVar("Number", int, float)


class Ranks:
    """One process that works alone.

    Every method but `share` and `number` is called by all ranks, in the same order.

    Attributes:
        rank: number of this process, from 0 on.
        size: number of processes.
        local_rank: number of this process among those of its machine.
        num_local: number of processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    num_local: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes, prints and tracks."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> list[T]:
        """The items that this rank works on: every `size`-th one, from number `rank` on."""
        return list(items)[self.rank :: self.size]

    def number(self, place: int) -> int:
        """The number that an item of this rank's share has among all items."""
        return self.rank + self.size * place

    def in_order(self, found: Sequence[T]) -> list[T]:
        """What all ranks found for the items of their shares (JSON types), in the order of all items."""
        return list(found)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, added in float64 and equal on all of them."""

    def maximum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its elementwise maximum over all ranks."""

    def total(self, number: Number) -> Number:
        """Sum of a number over all ranks; exact for integers below 2^53."""
        return number

    def of_first(self, value: T) -> T:
        """The value (JSON types) that rank 0 has."""
        return value

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""

    def gather(self, value: T) -> list[T]:
        """The values (JSON types) of all ranks, in their order."""
        return [value]

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def check_same(self, what: str, mine: Mapping[str, Any]) -> None:
        """Check that all ranks have the same values.

        Args:
            what: is compared, for the message.
            mine: JSON types by name.

        Raises:
            ConfigError: a rank has another value than rank 0; the message names rank and value.
        """

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 first, then all others: what rank 0 downloaded, they find."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an error of one rank ends all others.

        Raises:
            RankEnded: another rank ended; or this one, and rank 0 tells why.
        """
        yield


ONE_PROCESS = Ranks()
