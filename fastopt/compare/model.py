"""A multilayer perceptron in plain NumPy: the example of how to embed fastopt.

The model keeps its weights in one list of arrays and returns its gradients in another, in the same
order. That is all an optimizer needs::

    model = MLP((64, 32, 10), cross_entropy, np.random.default_rng(0))
    opt = fastopt.Adam(model.params, lr=1e-3)
    for x, labels in batches:
        loss, grads = model.loss_and_grads(x, labels)
        opt.step(grads)  # updates the arrays in model.params in place
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.intp]

# Of the model's outputs and what they should be: the mean over the samples, and its gradient.
Loss = Callable[[Array, Any], tuple[float, Array]]


def cross_entropy(logits: Array, labels: Labels) -> tuple[float, Array]:
    """Return the mean of ``-log softmax(logits)[label]`` and its gradient by the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # the largest is 0: exp cannot overflow
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    loss = float((np.log(total[:, 0]) - shifted[rows, labels]).mean())
    grad = exp / total
    grad[rows, labels] -= 1
    return loss, grad / grad.dtype.type(len(labels))


def squared_error(outputs: Array, targets: Array) -> tuple[float, Array]:
    """Return the mean of ``(output - target)**2`` and its gradient by the outputs."""
    error = outputs - targets
    return float((error * error).mean()), error * error.dtype.type(2 / error.size)


class MLP:
    """Fully connected layers with ReLU between them; a linear model if there is only one.

    Parameters
    ----------
    sizes : sequence of int
        Units of each layer, the inputs first, the outputs last.
    loss : callable
        :func:`cross_entropy` or :func:`squared_error`.
    rng : numpy.random.Generator
        Draws the initial weights: He's, a normal distribution of variance ``2 / inputs``
        (He et al., 2015, arXiv:1502.01852). Biases and the last layer start at zero.
    dtype : dtype, optional
        Of the parameters, and of the samples to come: float32 or float64.

    Attributes
    ----------
    params : list of ndarray
        ``[W1, b1, W2, b2, ...]``, ``W`` of shape ``(inputs, outputs)``.

    Examples
    --------
    >>> import fastopt
    >>> import numpy as np
    >>> from fastopt.compare.model import MLP, cross_entropy
    >>> x, labels = np.eye(4, dtype=np.float32), np.arange(4)
    >>> model = MLP((4, 8, 4), cross_entropy, np.random.default_rng(0))
    >>> opt = fastopt.SGD(model.params, lr=0.5)
    >>> for _ in range(100):
    ...     loss, grads = model.loss_and_grads(x, labels)
    ...     _ = opt.step(grads)
    >>> model.outputs(x).argmax(axis=1)
    array([0, 1, 2, 3])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        loss: Loss,
        rng: np.random.Generator,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.loss = loss
        self.params: list[Array] = []
        for inputs, outputs in pairwise(sizes):
            weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
            self.params += [weights.astype(dtype), np.zeros(outputs, dtype)]
        self.params[-2][...] = 0  # so that it begins by saying the same of every sample

    def _forward(self, x: Array) -> list[Array]:
        """Return the input of every layer, then the outputs of the last."""
        values = [x]
        for weights, bias in zip(self.params[::2], self.params[1::2], strict=True):
            if len(values) > 1:
                np.maximum(values[-1], 0, out=values[-1])  # ReLU, before every layer but the first
            values.append(values[-1] @ weights + bias)
        return values

    def outputs(self, x: Array) -> Array:
        """Return what the model says of each sample in ``x``, of shape ``(samples, inputs)``."""
        return self._forward(x)[-1]

    def loss_and_grads(self, x: Array, y: Any) -> tuple[float, list[Array]]:
        """Return the mean loss and its gradients.

        Parameters
        ----------
        x : ndarray, shape (samples, inputs)
            The samples.
        y : ndarray
            Their classes, or targets of the shape of the outputs.

        Returns
        -------
        loss : float
            The mean over the samples.
        grads : list of ndarray
            One for each array of `params`, in the same order and of the same shapes.
        """
        *inputs, outputs = self._forward(x)
        loss, delta = self.loss(outputs, y)  # delta: d loss / d output of the layer
        grads: list[Array] = []
        for weights, values in zip(self.params[-2::-2], inputs[::-1], strict=True):
            grads += [delta.sum(axis=0), values.T @ delta]  # bias, weights: reversed at the end
            if values is not x:
                delta = (delta @ weights.T) * (values > 0)
        return loss, grads[::-1]
