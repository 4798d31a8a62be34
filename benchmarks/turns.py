"""Steps that are timed in turns, one right after the other, as in a training that never rests."""

import statistics
import time

TURN_S = 0.005


def seconds(step, count):
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def medians(steps, budget):
    """Return the median time of each, of the turns that fit into about `budget` seconds."""
    once = [seconds(step, 1) for step in steps]
    counts = [max(1, int(TURN_S / s)) for s in once]
    round_s = sum(count * s for count, s in zip(counts, once, strict=True))
    rounds = max(5, min(201, int(budget / round_s)))
    times = [[seconds(*turn) for turn in zip(steps, counts, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]
