"""The order in which a sweep's jobs start, so that no job waits on its GPU for what another one is making.

In: what every job still has to make. Out: waves, which run one after the other: first one job
for each calibration or dense evaluation that several jobs need, then all others, which find it in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence


def waves(to_make: Sequence[Collection[str]]) -> list[list[int]]:
    """Numbers of jobs, in the order in which they start. Every job is in one wave; an empty wave is left out.

    A job is in the first wave if it makes something that a later job needs and no earlier job makes.

    Args:
        to_make: for every job, ids of what is expensive and missing.
    """
    needed = Counter(made for ids in to_make for made in set(ids))
    first: list[int] = []
    taken: set[str] = set()
    for number, ids in enumerate(to_make):
        shared = {made for made in ids if needed[made] > 1}
        if shared - taken:
            first.append(number)
            taken |= shared
    others = [number for number in range(len(to_make)) if number not in first]
    return [wave for wave in (first, others) if wave]
