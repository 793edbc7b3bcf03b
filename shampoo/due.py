"""Choose which blocks refresh their roots at each step."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

from .assignment import Cost, greedy

Stacks = tuple[tuple[int, ...], ...]  # shape (B, d1, ..., dk) of each stack


def due_blocks(stacks: Stacks, t: int, start: int, frequency: int, stagger: bool) -> Sequence[Sequence[int]]:
    """Return, for each stack, the blocks whose roots are due at step t >= 1; [] if nothing is due.

    Without `stagger`: all blocks, at `start` and at later multiples of the frequency. With it: each block once every
    `frequency` steps, beginning in the period that ends at `start`; a turn that would come before step 1 moves to `start`.
    """
    if not stagger:
        return [range(blocks) for blocks, *_ in stacks] if t == start or (t > start and t % frequency == 0) else []
    first = max(1, start - frequency + 1)
    if t < first:
        return []
    late = start - first if t == start else frequency - 1  # at `start`, all that had no turn from `first` on
    since = first if t == start else t - frequency + 1
    return [[b for b, phase in enumerate(row) if (phase - since) % frequency >= late] for row in phases(stacks, frequency)]


@lru_cache(maxsize=256)
def phases(stacks: Stacks, frequency: int) -> list[list[int]]:
    """Return each block's phase, t modulo the frequency at its refreshes, so that steps have equal work, d^3 per root."""
    costs = [Cost(float(sum(d**3 for d in block)), 0) for blocks, *block in stacks for _ in range(blocks)]
    owners = iter(greedy(costs, [Cost(0.0, 0)] * min(frequency, len(costs)), most=0.0)[0])
    return [list(islice(owners, blocks)) for blocks, *_ in stacks]
