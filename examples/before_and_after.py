"""A class from somebody's code base before and after fastopt: what changes, and what it saves.

``Before`` is what many projects have: a model in NumPy with Adam written out below it. ``After`` is
the same class with fastopt in the place of those lines. Both are given the same gradients; at the
end stand the time of an update and the memory that it takes for a while, and how far the weights
have come apart (both round, not at the same places).
"""

import statistics
import tracemalloc
from time import perf_counter

import numpy as np

import fastopt


class Before:
    """Predicts demand from a shop, an article and the weather; trains with Adam."""

    def __init__(self, shops, articles, width=64, lr=1e-3, seed=0):
        rng = np.random.default_rng(seed)
        self.params = [
            0.1 * rng.standard_normal((shops, width), dtype=np.float32),
            0.1 * rng.standard_normal((articles, width), dtype=np.float32),
            0.1 * rng.standard_normal((2 * width + 8, 128), dtype=np.float32),
            np.zeros(128, np.float32),
            0.1 * rng.standard_normal((128, 1), dtype=np.float32),
            np.zeros(1, np.float32),
        ]
        self.make_optimizer(lr)

    def make_optimizer(self, lr):
        """Make what an update needs."""
        self.lr, self.beta1, self.beta2, self.eps = lr, 0.9, 0.999, 1e-8
        self.m = [np.zeros_like(p) for p in self.params]
        self.v = [np.zeros_like(p) for p in self.params]
        self.t = 0

    def update(self, grads):
        """Take a step of Adam."""
        self.t += 1
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * g
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * g * g
            m_hat = self.m[i] / (1 - self.beta1**self.t)
            v_hat = self.v[i] / (1 - self.beta2**self.t)
            p -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)

    def gradients(self, shop, article, weather, demand):
        """Return the squared error of a batch and its gradients."""
        shop_rows, article_rows, W1, b1, W2, b2 = self.params
        x = np.hstack([shop_rows[shop], article_rows[article], weather])
        hidden = np.maximum(x @ W1 + b1, 0)
        error = (hidden @ W2 + b2)[:, 0] - demand
        d_out = (2 / len(demand) * error)[:, None].astype(np.float32)
        d_hidden = (d_out @ W2.T) * (hidden > 0)
        d_x = d_hidden @ W1.T
        width = shop_rows.shape[1]
        d_shops, d_articles = np.zeros_like(shop_rows), np.zeros_like(article_rows)
        np.add.at(d_shops, shop, d_x[:, :width])
        np.add.at(d_articles, article, d_x[:, width : 2 * width])
        layers = [x.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_out, d_out.sum(axis=0)]
        return float((error * error).mean()), [d_shops, d_articles, *layers]


class After(Before):
    """The same model; Adam and its state are a line each."""

    def make_optimizer(self, lr):
        """Make what an update needs."""
        self.opt = fastopt.Adam(self.params, lr=lr)

    def update(self, grads):
        """Take a step of Adam."""
        self.opt.step(grads)


tracemalloc.start()
models = {"before": Before(2_000, 20_000), "after": After(2_000, 20_000)}
milliseconds, extra = {name: [] for name in models}, dict.fromkeys(models, 0)

rng = np.random.default_rng(1)
for step in range(1, 41):
    shop, article = rng.integers(0, 2_000, 256), rng.integers(0, 20_000, 256)
    weather = rng.standard_normal((256, 8), dtype=np.float32)
    demand = (weather[:, 0] * (shop % 3) + article % 2).astype(np.float32)
    loss, grads = models["before"].gradients(shop, article, weather, demand)
    for name, model in models.items():  # in turns, with the same gradients
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        begin = perf_counter()
        model.update(grads)
        milliseconds[name].append(1e3 * (perf_counter() - begin))
        extra[name] = max(extra[name], tracemalloc.get_traced_memory()[1] - held)
    if step % 10 == 0:
        print(f"Step [{step}/40], Loss: {loss:.4f}")

print(f"{sum(p.size for p in model.params) / 1e6:.2f} million parameters")
median = {name: statistics.median(times) for name, times in milliseconds.items()}
for name in models:
    print(f"{name + ':':<8}{median[name]:.3f} ms and {extra[name] / 1e6:.3f} MB an update")
apart = max(
    np.abs(a - b).max()
    for a, b in zip(models["before"].params, models["after"].params, strict=True)
)
print(
    f"An update takes 1/{median['before'] / median['after']:.0f} of the time, and the weights "
    f"differ by {apart:.0e} at most."
)
