"""A model larger than memory, in files: ``python benchmarks/memory_map.py FOLDER --gigabytes 22``

Parameters, gradients and Adam's two moments are four memory maps in a new folder in FOLDER, of so
many gigabytes (1e9 bytes) together, and ``fastopt.functional.adam`` updates them in place. Then the
files are read block by block, and each block held, bit for bit, to the same steps by plain NumPy in
memory. The exit status is 1 if one differs.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from fastopt import functional, reference

BLOCK = 1 << 22  # elements that are drawn, and compared, at a time
MAPS = "params", "grads", "exp_avgs", "exp_avg_sqs"
LR = 0.01


def status(file, name):
    """Return one of the gigabytes that the kernel tells in a file of lines."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise LookupError(name)


def draw(number, start, size):
    """Return a block of the first parameters (0), or of the gradients of a step (from 1)."""
    rng = np.random.default_rng([number, start])
    return rng.random(min(BLOCK, size - start), np.float32) - np.float32(0.5)


def fill(mapped, number):
    """Write all blocks of a map."""
    for start in range(0, mapped.size, BLOCK):
        block = draw(number, start, mapped.size)
        mapped[start : start + block.size] = block


def differing(folder, size, steps):
    """Return how many blocks are not those of plain NumPy."""
    count = 0
    for start in range(0, size, BLOCK):
        param = draw(0, start, size)
        state = {name: np.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        for step in range(1, steps + 1):
            grad = draw(step, start, size)
            reference.adam(param, grad, state, step=step, lr=LR)
        for name, own in zip(MAPS, (param, grad, *state.values()), strict=True):
            there = np.fromfile(folder / name, np.float32, param.size, offset=4 * start)
            count += there.tobytes() != own.tobytes()
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="on a disk with so much space")
    parser.add_argument("--gigabytes", type=float, default=0.2, help="of the four maps (0.2)")
    parser.add_argument("--steps", type=int, default=3, help="(3)")
    args = parser.parse_args()

    size = int(args.gigabytes * 1e9 / 4 / len(MAPS))
    available = status("meminfo", "MemAvailable")
    print(f"{size:,} parameters, {16 * size / 1e9:.2f} GB in maps, {available:.2f} GB available")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        maps = [np.memmap(folder / name, np.float32, "w+", shape=size) for name in MAPS]
        fill(maps[0], 0)
        for step in range(1, args.steps + 1):
            begin = perf_counter()
            fill(maps[1], step)
            filled = perf_counter()
            functional.adam(*maps, step=step, lr=LR)
            end = perf_counter()
            print(
                f"step {step}: {end - filled:.2f} s, {28 * size / 1e9 / (end - filled):.2f} GB/s; "
                f"gradients written in {filled - begin:.2f} s; "
                f"resident {status('self/status', 'VmRSS'):.2f} GB, "
                f"of which not in files {status('self/status', 'RssAnon'):.3f} GB",
                flush=True,
            )
        begin = perf_counter()
        for mapped in maps:
            mapped.flush()
        print(f"flushed in {perf_counter() - begin:.2f} s")
        del maps, mapped
        peak = status("self/status", "VmHWM")
        wrong = differing(folder, size, args.steps)
    print(f"peak RSS {peak:.2f} GB, maps included; blocks that differ from plain NumPy: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
