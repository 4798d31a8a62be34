"""What lazy and exact rows do to a weight: ``python benchmarks/rows_picture.py rows-exact.png``

A weight of a row that a batch in 40 looks up, over the steps: in a dense run, in one by rows that
is lazy, and in one that is exact, whose array has the dense run's weight as soon as it is asked
for. All get the same gradients. Says how far from the dense run the others end.
"""

import argparse

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt.bench.report import STYLES

STEPS, EVERY = 231, 40
ROWS, WIDTH = 2000, 4  # of which row 0 is the rare one; the others have a gradient in each step
RULES = {
    "Adam, lr=0.01": (fastopt.Adam, {"lr": 0.01}),
    "SGD, lr=0.02, momentum=0.9, weight_decay=0.1": (
        fastopt.SGD,
        {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
    ),
}


def weights(cls, options, how):
    """Return a weight of the rare row after each step, and what it is just before a gradient."""
    rng = np.random.default_rng(0)
    table = np.ones((ROWS, WIDTH), np.float32)
    opt = cls([table], rows="exact" if how == "exact" else "lazy", **options)
    after, read = [], []
    for step in range(STEPS):
        rows = np.arange(0 if step % EVERY == 0 else 1, ROWS)
        grad = np.zeros_like(table)
        grad[rows] = rng.uniform(0.5, 1.5, (ROWS, WIDTH))[rows]
        if rows[0] == 0:
            opt.refresh(table, rows)
            read.append((step, table[0, 0]))
        opt.step([grad if how == "dense" else fastopt.Rows(rows, grad[rows])])
        after.append(table[0, 0])
    opt.refresh()
    read.append((STEPS - 1, table[0, 0]))
    return np.array(after), read


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", help="the PNG to write")
    args = parser.parse_args()
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for axes, (title, rule) in zip(figure.subplots(1, 2), RULES.items(), strict=True):
        found = {how: weights(*rule, how) for how in ("dense", "lazy", "exact")}
        last = {how: read[-1][1] for how, (_, read) in found.items()}
        assert last["exact"] == last["dense"]
        assert [w for _, w in found["exact"][1]] == [w for _, w in found["dense"][1]]
        print(f"{title}: from 1 to {last['dense']:.3f}; lazy to {last['lazy']:.3f}")
        lines = {"dense": {"color": "0.7", "linewidth": 5}, "lazy": {"color": "#0072B2"}}
        lines["exact"] = {"color": STYLES["fastopt"]["color"], "linestyle": "--"}
        names = {"dense": "dense", "lazy": 'rows="lazy"', "exact": 'rows="exact", in the array'}
        for how, line in lines.items():
            axes.step(range(STEPS), found[how][0], where="post", label=names[how], **line)
        axes.plot(*zip(*found["exact"][1], strict=True), "o", color=lines["exact"]["color"],
                  label="after opt.refresh()", zorder=3)  # fmt: skip
        axes.set(xlabel="step", ylabel="a weight of the row")
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(args.picture, dpi=130)


if __name__ == "__main__":
    main()
