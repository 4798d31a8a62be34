"""A multilayer perceptron by hand in NumPy: parameters and gradients as dicts, a schedule.

The data are scikit-learn's handwritten digits (pip install scikit-learn).
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastopt

rng = np.random.default_rng(0)
x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)

params = {
    "W1": (rng.standard_normal((64, 64)) * np.sqrt(2 / 64)).astype(np.float32),
    "b1": np.zeros(64, np.float32),
    "W2": np.zeros((64, 10), np.float32),
    "b2": np.zeros(10, np.float32),
}


def forward(x):
    """Return the hidden layer and the probabilities of the ten digits."""
    hidden = np.maximum(x @ params["W1"] + params["b1"], 0)
    logits = hidden @ params["W2"] + params["b2"]
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return hidden, exp / exp.sum(axis=1, keepdims=True)


def loss_and_grads(x, y):
    """Return the mean cross-entropy, and its gradients under the names of the parameters."""
    hidden, p = forward(x)
    rows = np.arange(len(y))
    loss = -np.log(p[rows, y]).mean()
    p[rows, y] -= 1
    d_logits = p / np.float32(len(y))
    d_hidden = (d_logits @ params["W2"].T) * (hidden > 0)
    grads = {
        "W1": x.T @ d_hidden,
        "b1": d_hidden.sum(axis=0),
        "W2": hidden.T @ d_logits,
        "b2": d_logits.sum(axis=0),
    }
    return loss, grads


epochs, size = 20, 64
steps = epochs * -(-len(x) // size)
warmup = steps // 10
schedule = fastopt.schedules.linear_warmup(
    fastopt.schedules.cosine(0.01, steps - warmup), steps=warmup
)
opt = fastopt.AdamW(params, lr=schedule, weight_decay=0.01)

for epoch in range(1, epochs + 1):
    order, total = rng.permutation(len(x)), 0.0
    for start in range(0, len(x), size):
        batch = order[start : start + size]
        loss, grads = loss_and_grads(x[batch], y[batch])
        opt.step(grads)
        total += loss * len(batch)
    if epoch % 5 == 0:
        print(f"Epoch [{epoch}/{epochs}], Loss: {total / len(x):.4f}")

_, p = forward(x_test)
print(f"Test accuracy: {(p.argmax(axis=1) == y_test).mean():.1%}")
