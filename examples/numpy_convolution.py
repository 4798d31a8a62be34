"""A convolutional network by hand in NumPy: any array is a parameter, of any shape.

Eight filters of 3 x 3 pixels, a ReLU, the largest of every 2 x 2 values, and a dense layer. The
data are scikit-learn's handwritten digits (pip install scikit-learn).
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastopt

rng = np.random.default_rng(0)
digits = load_digits()
images = np.pad((digits.images / 16).astype(np.float32), ((0, 0), (1, 1), (1, 1)))
split = train_test_split(
    images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
)
x, x_test, y, y_test = split

filters = (rng.standard_normal((8, 3, 3)) * np.sqrt(2 / 9)).astype(np.float32)
filter_bias = np.zeros(8, np.float32)
dense = np.zeros((8, 4, 4, 10), np.float32)
dense_bias = np.zeros(10, np.float32)


def forward(x):
    """Return what the backward pass needs of each layer, and the logits."""
    patches = sliding_window_view(x, (3, 3), axis=(1, 2))  # image, row, column, 3, 3
    maps = np.einsum("nijab,fab->nfij", patches, filters, optimize=True)
    maps = np.maximum(maps + filter_bias[:, None, None], 0)
    squares = maps.reshape(len(x), 8, 4, 2, 4, 2)
    pooled = squares.max(axis=(3, 5))  # image, filter, 4, 4
    return patches, squares, pooled, np.tensordot(pooled, dense, 3) + dense_bias


def loss_and_grads(x, y):
    """Return the mean cross-entropy and its gradients, in the order of the parameters."""
    patches, squares, pooled, logits = forward(x)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = exp / exp.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = -np.log(p[rows, y]).mean()

    p[rows, y] -= 1
    d_logits = p / np.float32(len(y))
    d_pooled = np.tensordot(d_logits, dense, (1, 3))
    largest = (squares == pooled[:, :, :, None, :, None]).astype(np.float32)
    largest /= largest.sum(axis=(3, 5), keepdims=True)  # equal ones, as in the margins, share
    d_squares = d_pooled[:, :, :, None, :, None] * largest * (squares > 0)
    d_maps = d_squares.reshape(len(x), 8, 8, 8)
    return loss, [
        np.einsum("nijab,nfij->fab", patches, d_maps, optimize=True),
        d_maps.sum(axis=(0, 2, 3)),
        np.tensordot(pooled, d_logits, (0, 0)),
        d_logits.sum(axis=0),
    ]


opt = fastopt.Adam([filters, filter_bias, dense, dense_bias], lr=0.01)
epochs, size = 8, 64
for epoch in range(1, epochs + 1):
    order, total = rng.permutation(len(x)), 0.0
    for start in range(0, len(x), size):
        batch = order[start : start + size]
        loss, grads = loss_and_grads(x[batch], y[batch])
        opt.step(grads)
        total += loss * len(batch)
    print(f"Epoch [{epoch}/{epochs}], Loss: {total / len(x):.4f}")

logits = forward(x_test)[-1]
print(f"Test accuracy: {(logits.argmax(axis=1) == y_test).mean():.1%}")
