"""What looks at all of each parameter, where a rank steps over a part of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastopt import _core
from fastopt._given import label
from fastopt._members import Members, Part
from fastopt._memory import Array, in_memory_order, memory_order
from fastopt._settings import Settings
from fastopt.mpi._exchange import Route
from fastopt.mpi._gradients import Blocks, blocks_of


class Watch(NamedTuple):
    """What looks at all of each parameter, as long as it is the same memory."""

    wholes: list[Array]
    plan: _core.Plan  # checks gradients, sums micro-batches
    means: list[Array]  # of all ranks' gradients: this rank's share
    parts: list[Part]
    blocks: Blocks
    orders: list[tuple[int, ...]]  # of axes in memory
    vectors: list[Array]  # the parameters' elements in that order
    addresses: Array  # of these
    itemsizes: Array  # of these, in bytes
    arithmetic: Array  # what rules compute in, as the core numbers types
    routes: dict[bytes, Route]  # what was asked for last


def watch_over(members: Members, settings: Settings, ranks: int, before: Watch | None) -> Watch:
    """Return what looks at all of these parameters, and has the counts of `before`."""
    n = len(members.wholes)
    summed = [] if before is None else before.plan.summed()
    rule = _core.Rule("sgd")
    plan = _core.Plan(
        rule,
        members.wholes,
        [(None,) * len(rule.slots)] * n,
        None,
        [np.zeros((), np.int64) for _ in range(n)],
        [0] * n,
        [[0.0] * len(rule.hypers)],
        list(map(label, members.keys)),
        semantics=0,
        clip=0,
        clip_limit=0.0,
        nonfinite=0,
        ema_decay=0.0,
        num_threads=settings.num_threads or 0,
        completed_steps=0,
        sums=members.sums,
        # One micro-batch more than there are, so that it never updates.
        accumulate=1 if members.sums is None else settings.accumulate + 1,
        accumulated_steps=0 if before is None else before.plan.accumulated_steps,
        summed=summed + [False] * (n - len(summed)),
        lent=members.lent,
    )
    means = [
        np.zeros(param.size, storage.arithmetic)
        for param, storage in zip(members.params, members.storage, strict=True)
    ]
    parts = list(members.parts or ())
    blocks = blocks_of([part.bounds for part in parts], ranks)
    orders = list(map(memory_order, members.wholes))
    vectors = list(map(in_memory_order, members.wholes))
    return Watch(
        members.wholes,
        plan,
        means,
        parts,
        blocks,
        orders,
        vectors,
        np.array(list(map(_core.address, vectors)), np.int64),
        np.array([vector.itemsize for vector in vectors], np.int64),
        np.array([_core.STORAGES[mean.dtype.name] for mean in means], np.uint8),
        {},
    )
