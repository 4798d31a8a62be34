"""Logistic regression by hand in NumPy: two arrays, two gradients, one ``opt.step``.

The data are scikit-learn's (pip install scikit-learn): 569 tumours, 30 measurements of each.
"""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import fastopt

x, y = load_breast_cancer(return_X_y=True)
x = (x - x.mean(axis=0)) / x.std(axis=0)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)


def probability(x):
    """Return the probability that a tumour is benign."""
    return 1 / (1 + np.exp(-(x @ w + b)))


w, b = np.zeros(x.shape[1]), np.zeros(())
opt = fastopt.SGD([w, b], lr=0.5, momentum=0.9, weight_decay=1e-3)

for step in range(1, 201):
    p = probability(x)
    loss = -np.log(np.where(y == 1, p, 1 - p)).mean()
    error = (p - y) / len(y)  # the gradient of the loss by x @ w + b
    opt.step([x.T @ error, error.sum()])  # w and b change in place
    if step % 50 == 0:
        print(f"Step [{step}/200], Loss: {loss:.4f}")

accuracy = ((probability(x_test) > 0.5) == y_test).mean()
print(f"Test accuracy: {accuracy:.1%}")
