"""What do fewer bytes cost a training? ``python benchmarks/training.py training.json``

Three trainings that people know, with five seeds each: handwritten digits (scikit-learn's), the
characters of Python's own manual with a transformer of a million weights, and a matrix
factorisation of ratings. Each optimizer is Adam, and starts from the same weights and sees the same
batches; only what weights and state are stored in differs. All computes in float32, from the
weights as they are stored.

For each: bytes of a weight and its state together; the loss on held-out data at the end; and how
far the weights have ended from those that float32 gives with the same seed, as a share of how far
these have gone. Needs PyTorch and scikit-learn; bitsandbytes and torchao take part if they are
installed.
``--plot training.png`` draws them, and measures nothing if the JSON file is there.
"""

import argparse
import collections
import importlib.util
import json
import statistics
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import fastopt.torch

THREADS = 1
SEEDS = range(5)
BF16 = torch.bfloat16


class Digits:
    """A perceptron with two hidden layers."""

    title, steps, lr = "handwritten digits", 600, 1e-3

    def __init__(self):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.x = torch.tensor(x, dtype=torch.float32)[order] / 16
        self.y = torch.tensor(y)[order]
        self.held_out = slice(1400, None)

    def model(self):
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*layers)

    def batch(self, generator):
        chosen = torch.randint(self.held_out.start, (64,), generator=generator)
        return self.x[chosen], self.y[chosen]

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def held_out_batches(self):
        yield self.x[self.held_out], self.y[self.held_out]


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.between(x))))


class Transformer(nn.Module):
    def __init__(self, symbols, length, width=144, layers=4, heads=4):
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        for table in (self.symbol, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x):
        x = self.symbol(x) + self.place.weight[: x.shape[1]]
        return self.head(self.last(self.blocks(x)))


class Characters:
    """A transformer that predicts the next character of the manual that Python brings."""

    title, steps, lr = "characters, a transformer", 250, 1e-3
    length = 64

    def __init__(self):
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))
        symbols = sorted(set(text))
        number = {symbol: i for i, symbol in enumerate(symbols)}
        self.text = torch.tensor([number[symbol] for symbol in text])
        self.symbols = len(symbols)
        self.held_out = len(text) * 9 // 10

    def model(self):
        return Transformer(self.symbols, self.length)

    def windows(self, starts):
        windows = self.text[starts[:, None] + torch.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def batch(self, generator):
        last = self.held_out - self.length - 1
        return self.windows(torch.randint(last, (16,), generator=generator))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def held_out_batches(self):
        starts = torch.arange(self.held_out, len(self.text) - self.length - 1, 2 * self.length)
        for part in starts.split(64):
            yield self.windows(part)


class Factors(nn.Module):
    def __init__(self, users, items, rank):
        super().__init__()
        self.users, self.items = nn.Embedding(users, rank), nn.Embedding(items, rank)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, users, items):
        return (self.users(users) * self.items(items)).sum(-1)


class Ratings:
    """Ratings that are products of known factors, and noise of variance 0.01."""

    title, steps, lr = "matrix factorisation", 3000, 1e-2
    users, items, rank = 2000, 1500, 16

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.randn(n, self.rank, generator=generator) for n in (self.users, self.items))
        n = 200_000
        self.user = torch.randint(self.users, (n,), generator=generator)
        self.item = torch.randint(self.items, (n,), generator=generator)
        exact = (u[self.user] * v[self.item]).sum(-1) / self.rank**0.5
        self.rating = exact + 0.1 * torch.randn(n, generator=generator)
        self.held_out = n * 9 // 10

    def model(self):
        return Factors(self.users, self.items, self.rank)

    def of(self, chosen):
        return self.user[chosen], self.item[chosen], self.rating[chosen]

    def batch(self, generator):
        return self.of(torch.randint(self.held_out, (1024,), generator=generator))

    def loss(self, model, batch):
        return functional.mse_loss(model(*batch[:2]), batch[2])

    def held_out_batches(self):
        yield self.of(torch.arange(self.held_out, len(self.user)))


TASKS = {"digits": Digits, "characters": Characters, "ratings": Ratings}


def ours(**options):
    return lambda params, lr: fastopt.torch.Adam(params, lr=lr, **options)


def bitsandbytes(params, lr):
    import bitsandbytes

    return bitsandbytes.optim.Adam8bit(params, lr=lr, min_8bit_size=1)


def torchao(params, lr):
    import torchao.optim

    return torchao.optim.Adam8bit(params, lr=lr)


# What is compared: whose, the weights' type, how the optimizer is made, and its bytes of state.
VARIANTS = {
    "float32": ("fastopt", torch.float32, ours(), 8),
    "bfloat16 state": ("fastopt", torch.float32,
                       ours(state_dtype="bfloat16", stochastic_rounding=True), 4),
    "8-bit state": ("fastopt", torch.float32, ours(state_dtype="8bit"), 2 + 2 / 64),
    "bfloat16 with master": ("fastopt", BF16, ours(master_weights=True), 10),
    "bfloat16 with master, 8-bit state": ("fastopt", BF16,
                                          ours(master_weights=True, state_dtype="8bit"),
                                          4 + 2 / 64),
    "all bfloat16": ("fastopt", BF16, ours(stochastic_rounding=True), 4),
    "bfloat16, 8-bit state": ("fastopt", BF16, ours(state_dtype="8bit"), 2 + 2 / 64),
    "torch, all bfloat16": ("torch", BF16,
                            lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True), 4),
    "bitsandbytes, 8-bit state": ("bitsandbytes", torch.float32, bitsandbytes, 2 + 8 / 256),
    "torchao, 8-bit state": ("torchao", torch.float32, torchao, 2 + 8 / 256),
}  # fmt: skip


def values(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


class InFloat32:
    """A model that computes in float32, from its weights as they are stored."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *inputs):
        weights = {name: p.float() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, weights, inputs)


def train(task, variant, seed):
    """Return the held-out loss and the weights at the end, and how far they have gone."""
    _, dtype, make, _ = VARIANTS[variant]
    torch.manual_seed(seed)
    model = task.model()
    start = values(model)
    model.to(dtype)
    compute = InFloat32(model)
    optimizer = make(list(model.parameters()), task.lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        optimizer.zero_grad()
        task.loss(compute, task.batch(generator)).backward()
        optimizer.step()
    with torch.no_grad():
        losses = [(len(b[0]), float(task.loss(compute, b))) for b in task.held_out_batches()]
    loss = sum(n * value for n, value in losses) / sum(n for n, _ in losses)
    return loss, values(model), start


def run(tasks, variants, seeds):
    for name in tasks:
        task = TASKS[name]()
        for seed in seeds:
            reference = None
            for variant in variants:
                loss, weights, start = train(task, variant, seed)
                if reference is None:
                    reference = weights  # float32's
                gone = torch.linalg.vector_norm(reference - start)
                distance = float(torch.linalg.vector_norm(weights - reference) / gone)
                print(f"{name}, seed {seed}, {variant}: {loss:.5f}, {distance:.4f}", flush=True)
                yield {"task": name, "seed": seed, "variant": variant, "loss": loss,
                       "distance": distance}  # fmt: skip


def table(results):
    """Return the table of docs: means over seeds, with the standard deviation."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    lines = ["| weights and state | bytes |" + "".join(f" {TASKS[t].title} |" for t in tasks)]
    lines.append("|---|---|" + "---|" * len(tasks))
    for variant in dict.fromkeys(r["variant"] for r in results):
        _, dtype, _, state = VARIANTS[variant]
        line = f"| {variant} | {dtype.itemsize + state:.2f} |"
        for task in tasks:
            mine = [r for r in results if (r["task"], r["variant"]) == (task, variant)]
            loss, distance = ([r[key] for r in mine] for key in ("loss", "distance"))
            spread = statistics.stdev(loss) if len(loss) > 1 else 0
            line += (
                f" {statistics.mean(loss):.4f} ± {spread:.4f}, {statistics.mean(distance):.3f} |"
            )
        lines.append(line)
    return "\n".join(lines)


def plot(results, path):
    from matplotlib.figure import Figure

    marks = {"fastopt": ("#D55E00", "o"), "torch": ("#0072B2", "s"),
             "bitsandbytes": ("#009E73", "^"), "torchao": ("#CC79A7", "D")}  # fmt: skip
    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure = Figure(figsize=(3.6 * len(tasks) + 2, 6.4), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, task in enumerate(tasks):
        top, bottom = axes[:, column]
        exact = {r["seed"]: r["loss"] for r in results
                 if (r["task"], r["variant"]) == (task, "float32")}  # fmt: skip
        mean = statistics.mean(exact.values())
        beside = collections.Counter()
        top.axhspan(min(exact.values()), max(exact.values()), color="0.9", zorder=0)
        top.axhline(mean, color="0.6", linewidth=1, zorder=0)
        for variant, (whose, dtype, _, state) in VARIANTS.items():
            mine = [r for r in results if (r["task"], r["variant"]) == (task, variant)]
            if not mine:
                continue
            color, marker = marks[whose]
            look = {"color": color, "marker": marker, "markersize": 7, "markeredgecolor": "white"}
            nbytes = dtype.itemsize + state
            x = nbytes + 0.22 * beside[round(nbytes)]  # those of the same bytes lie side by side
            beside[round(nbytes)] += 1
            loss = [r["loss"] for r in mine]
            middle = statistics.mean(loss)
            ends = [[middle - min(loss)], [max(loss) - middle]]
            top.errorbar(x, middle, yerr=ends, elinewidth=1, **look)
            if variant != "float32":
                bottom.plot(x, statistics.mean(r["distance"] for r in mine), linestyle="", **look)
        top.set_title(TASKS[task].title)
        top.set_ylabel("loss on held-out data" if column == 0 else "")
        bottom.set_ylabel("distance from float32's weights" if column == 0 else "")
        bottom.set_xlabel("bytes of a weight and its state")
        bottom.set_yscale("log")
        for each in (top, bottom):
            each.grid(color="0.93")
            each.set_axisbelow(True)
    shown = [w for w in marks if any(VARIANTS[r["variant"]][0] == w for r in results)]
    handles = [axes[0, 0].plot([], [], linestyle="", color=marks[w][0], marker=marks[w][1])[0]
               for w in shown]  # fmt: skip
    figure.legend(handles, shown, loc="outside upper center", ncols=len(shown), frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the JSON file to write")
    parser.add_argument("--task", choices=TASKS, action="append", help="one of them (all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many (5)")
    parser.add_argument("--plot", type=Path, help="draw them, as this PNG")
    args = parser.parse_args()
    if not (args.plot and args.results.exists()):
        torch.set_num_threads(THREADS)
        warnings.filterwarnings("ignore")
        torch._dynamo.config.cache_size_limit = 1000  # torchao compiles for each shape
        peers = {"bitsandbytes", "torchao"}
        missing = {name for name in peers if importlib.util.find_spec(name) is None}
        variants = [v for v, (whose, *_) in VARIANTS.items() if whose not in missing]
        results = []
        for result in run(args.task or TASKS, variants, range(args.seeds)):
            results.append(result)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(args.results.read_text())
    if args.plot:
        plot(results, args.plot)
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
