"""A multilayer perceptron in plain NumPy: the example of how to embed fastopt.

The model keeps its weights in one list of arrays and returns its gradients in another, in the same
order. That is all an optimizer needs::

    model = MLP((64, 128, 64, 10), np.random.default_rng(0))
    opt = fastopt.Adam(model.params, lr=1e-3)
    for x, labels in batches:
        loss, grads = model.loss_and_grads(x, labels)
        opt.step(grads)  # updates the arrays in model.params in place
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.intp]


class MLP:
    """Fully connected layers with ReLU between them, trained on softmax cross-entropy.

    Parameters
    ----------
    sizes : sequence of int
        Units of each layer, input first, classes last.
    rng : numpy.random.Generator
        Draws the initial weights: He's, a normal distribution of variance ``2 / inputs``
        (He et al., 2015, arXiv:1502.01852). Biases start at zero.

    Attributes
    ----------
    params : list of ndarray
        ``[W1, b1, W2, b2, ...]``, float32, ``W`` of shape ``(inputs, outputs)``.

    Examples
    --------
    >>> import fastopt
    >>> import numpy as np
    >>> from fastopt.compare.model import MLP
    >>> x, labels = np.eye(4, dtype=np.float32), np.arange(4)
    >>> model = MLP((4, 8, 4), np.random.default_rng(0))
    >>> opt = fastopt.SGD(model.params, lr=0.5)
    >>> for _ in range(100):
    ...     loss, grads = model.loss_and_grads(x, labels)
    ...     _ = opt.step(grads)
    >>> model.predict(x)
    array([0, 1, 2, 3])
    """

    def __init__(self, sizes: Sequence[int], rng: np.random.Generator) -> None:
        self.params: list[Array] = []
        for inputs, outputs in pairwise(sizes):
            weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
            self.params += [weights.astype(np.float32), np.zeros(outputs, np.float32)]

    def _forward(self, x: Array) -> list[Array]:
        """Return the input of every layer, then the logits."""
        values = [x]
        for weights, bias in zip(self.params[::2], self.params[1::2], strict=True):
            if len(values) > 1:
                np.maximum(values[-1], 0, out=values[-1])  # ReLU, before every layer but the first
            values.append(values[-1] @ weights + bias)
        return values

    def predict(self, x: Array) -> Labels:
        """Return the most likely class of each sample in ``x``, of shape ``(samples, inputs)``."""
        classes: Labels = self._forward(x)[-1].argmax(axis=1)
        return classes

    def loss_and_grads(self, x: Array, labels: Labels) -> tuple[float, list[Array]]:
        """Return the mean cross-entropy and its gradients.

        Parameters
        ----------
        x : ndarray of float32, shape (samples, inputs)
            The samples.
        labels : ndarray of int, shape (samples,)
            Their classes.

        Returns
        -------
        loss : float
            In nats.
        grads : list of ndarray
            One for each array of `params`, in the same order and of the same shapes.
        """
        *inputs, logits = self._forward(x)
        loss, delta = _cross_entropy(logits, labels)  # delta: d loss / d output of the layer
        grads: list[Array] = []
        for weights, values in zip(self.params[-2::-2], inputs[::-1], strict=True):
            grads += [delta.sum(axis=0), values.T @ delta]  # bias, weights: reversed at the end
            if values is not x:
                delta = (delta @ weights.T) * (values > 0)
        return loss, grads[::-1]


def _cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Return the mean of ``-log softmax(logits)[label]`` and its gradient by the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # the largest is 0: exp cannot overflow
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).mean())
    grad = exp / total
    grad[rows, labels] -= 1
    return loss, grad / np.float32(len(labels))
