"""Which blocks refresh their roots at which step."""

from collections.abc import Sequence
from functools import cache
from itertools import islice

from .assignment import Cost, greedy

Stacks = tuple[tuple[int, ...], ...]  # (B, d1, ..., dk) of each


def due_blocks(stacks: Stacks, t: int, start: int, frequency: int, stagger: bool) -> Sequence[Sequence[int]]:
    """Return the blocks of each stack whose roots are due at step t = 1, 2, ...; [] if no stack has any.

    All at `start`, and at later multiples of the frequency. With `stagger` each block at its own step modulo the frequency,
    from start - frequency + 1 on, so that all have roots at `start`; those whose first turn would come before step 1, at
    `start`.
    """
    if not stagger:
        return [range(blocks) for blocks, *_ in stacks] if t == start or (t > start and t % frequency == 0) else []
    first = max(1, start - frequency + 1)
    if t < first:
        return []
    due = {t % frequency} if t != start else {step % frequency for step in range(start, first + frequency)}
    return [[b for b, phase in enumerate(of_stack) if phase in due] for of_stack in phases(stacks, frequency)]


@cache
def phases(stacks: Stacks, frequency: int) -> list[list[int]]:
    """Return for each block of each stack the step modulo the frequency at which its roots are due.

    Each step gets about the same work, d^3 for a root of size d.
    """
    costs = [Cost(float(sum(d**3 for d in block)), 0) for blocks, *block in stacks for _ in range(blocks)]
    owners = iter(greedy(costs, [Cost(0.0, 0)] * frequency, most=0.0)[0])
    return [list(islice(owners, blocks)) for blocks, *_ in stacks]
