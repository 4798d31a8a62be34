r"""The update rules in plain NumPy: the oracle that the C core equals bit for bit.

One function a rule, written for reading. Each updates one array and its state in place, with the
operations, their order and their rounding exactly as in ``src_c/rules``: constants are formed in
double and rounded once to the array's type, and every operation on the array rounds once.

What all rules share comes first, in this order: the gradient is scaled and clipped, weight decay is
added to it or shrinks the parameter:

.. math:: g \leftarrow \min(\max(\pm s g, -c), c), \quad g \leftarrow g + \lambda \theta
    \quad\text{or}\quad \theta \leftarrow (1 - \gamma \lambda) \theta

Examples
--------
>>> import numpy as np
>>> w, state = np.array([3.0, -2.0]), {"sum": np.zeros(2)}
>>> adagrad(w, np.array([10.0, -0.1]), state, step=1, lr=1.0)
>>> w.round(6)
array([ 2., -1.])

The rules compute in float32 or float64. :data:`STORAGE` says how arrays are stored in fewer bits:
a step loads them as float32, and stores them again, rounded to nearest or by :func:`random_bits`.

>>> load, store = STORAGE["bfloat16"]
>>> codes, _ = store(np.array([3.14159274], np.float32), None)
>>> load(codes, None)
array([3.140625], dtype=float32)

:func:`stored_step` does all of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastopt._reference_storage import SLOTS, STORAGE, Storage, Stored, random_bits, stored_step

__all__ = [
    "SLOTS",
    "STORAGE",
    "Storage",
    "Stored",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "average",
    "average_length",
    "clip_factor",
    "grad_norm",
    "lion",
    "mean",
    "nadam",
    "nadam_momentum",
    "one_minus_power",
    "power_of_096",
    "radam",
    "random_bits",
    "rmsprop",
    "rprop",
    "sgd",
    "stored_step",
    "sum_of_squares",
]

Array = NDArray[Any]

BLOCK = 4096  # elements that are summed on their own
LANES = 16  # interleaved sums within a block


def sgd(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    fresh: bool = False,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Gradient descent, with momentum and Nesterov's look-ahead.

    Parameters
    ----------
    param, grad : numpy.ndarray
        The parameter, updated in place, and its gradient; float32 or float64.
    state : dict
        ``momentum_buffer`` if there is momentum; updated in place.
    step : int
        The number of this step; the first is 1.
    lr, momentum, dampening, nesterov, semantics
        As for :class:`fastopt.SGD`.
    fresh : bool
        Whether no step has used the buffer yet, although it is not the first.
    **common
        ``weight_decay``, ``decoupled_weight_decay``, ``maximize``; ``grad_scale``, which
        multiplies the gradient, and ``grad_limit``, to which its elements are clipped.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        if momentum == 0:
            param[...] = p - c(lr) * g
            return
        if semantics == "keras":  # the buffer is the velocity
            mu, into, out = momentum, -(lr * (1 - dampening)), -momentum if nesterov else -1.0
        elif step == 1 or fresh:  # the buffer starts as a copy of the gradient
            mu, into, out = 0.0, 1.0, lr * momentum if nesterov else lr
        else:
            mu, into, out = momentum, 1 - dampening, lr * momentum if nesterov else lr
        look = lr if nesterov else 0.0
        b = state["momentum_buffer"]
        b[...] = c(mu) * b + c(into) * g
        param[...] = p - (c(out) * b + c(look) * g)


def adagrad(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    rowwise: bool = False,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Adagrad. See :func:`sgd` for the arguments.

    ``state`` holds ``sum``; or row-wise ``row_sum``, with one value for each row.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        eps_in, eps_out = (eps, 0.0) if semantics == "keras" else (0.0, eps)
        rate = lr / (1 + (step - 1) * lr_decay)
        if not rowwise:
            s = state["sum"]
            s[...] = s + g * g
            param[...] = p - (c(rate) * g) / (np.sqrt(s + c(eps_in)) + c(eps_out))
            return
        sums = state["row_sum"]
        for row in np.ndindex(sums.shape):
            own = np.asarray(g[row])
            in_memory = _in_memory_order(own, np.asarray(param[row])).astype(np.float64)
            total = np.float64(sums[row]) + _squares_in_lanes(in_memory) / own.size
            sums[row] = total
            param[row] = p[row] - (c(rate) * own) / c(np.sqrt(total + eps_in) + eps_out)


def rmsprop(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """RMSprop. See :func:`sgd` for the arguments.

    ``state`` holds ``square_avg``, with momentum ``momentum_buffer``, and if centered ``grad_avg``.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        keras = semantics == "keras"
        eps_in, eps_out = (eps, 0.0) if keras else (0.0, eps)
        into, out = (lr, 1.0) if keras or momentum == 0 else (1.0, lr)
        v = state["square_avg"]
        v[...] = c(alpha) * v + c(1 - alpha) * (g * g)
        w: Any = v
        if centered:
            a = state["grad_avg"]
            a[...] = c(alpha) * a + c(1 - alpha) * g
            w = _maximum(v - a * a, c(-math.inf if keras else 0.0))
        u = (c(into) * g) / (np.sqrt(w + c(eps_in)) + c(eps_out))
        if momentum == 0:
            param[...] = p - u
            return
        b = state["momentum_buffer"]
        b[...] = c(momentum) * b + u
        param[...] = p - c(out) * b


def adam(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    bias_correction: bool = True,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Adam, AMSGrad and (with decoupled weight decay) AdamW. See :func:`sgd` for the arguments.

    ``state`` holds ``exp_avg``, ``exp_avg_sq``, and with AMSGrad ``max_exp_avg_sq``.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        beta1, beta2 = betas
        c1 = one_minus_power(beta1, step) if bias_correction else 1.0
        c2 = one_minus_power(beta2, step) if bias_correction else 1.0
        if semantics == "torch":  # corrects the root before it adds eps
            eps = eps * math.sqrt(c2)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m[...] = c(beta1) * m + c(1 - beta1) * g
        v[...] = c(beta2) * v + c(1 - beta2) * (g * g)
        if amsgrad:
            largest = state["max_exp_avg_sq"]
            largest[...] = _maximum(largest, v)
            v = largest
        param[...] = p - (c(lr * math.sqrt(c2) / c1) * m) / (np.sqrt(v) + c(eps))


def adamax(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Adamax. See :func:`sgd` for the arguments; ``state`` holds ``exp_avg`` and ``exp_inf``."""
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        beta1, beta2 = betas
        eps_in, eps_out = (0.0, eps) if semantics == "keras" else (eps, 0.0)
        m, u = state["exp_avg"], state["exp_inf"]
        m[...] = c(beta1) * m + c(1 - beta1) * g
        u[...] = _maximum(c(beta2) * u, np.abs(g) + c(eps_in))
        param[...] = p - (c(lr / one_minus_power(beta1, step)) * m) / (u + c(eps_out))


def adadelta(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    rho: float = 0.9,
    eps: float = 1e-6,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Adadelta. See :func:`sgd` for the arguments.

    ``state`` holds ``square_avg`` and ``acc_delta``. It is the same under both semantics.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        v, a = state["square_avg"], state["acc_delta"]
        v[...] = c(rho) * v + c(1 - rho) * (g * g)
        delta = np.sqrt(a + c(eps)) / np.sqrt(v + c(eps)) * g
        a[...] = c(rho) * a + c(1 - rho) * (delta * delta)
        param[...] = p - c(lr) * delta


def lion(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Lion. See :func:`sgd` for the arguments; ``state`` holds ``exp_avg``.

    It is the same under both semantics.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        beta1, beta2 = map(c, betas)
        m = state["exp_avg"]
        x = beta1 * m + (c(1) - beta1) * g
        m[...] = beta2 * m + (c(1) - beta2) * g
        param[...] = p - np.where(x > 0, c(lr), np.where(x < 0, -c(lr), x))


def nadam(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """NAdam. See :func:`sgd` for the arguments.

    ``state`` holds ``exp_avg``, ``exp_avg_sq``, and ``mu_product``, a 0-d float64 array.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        beta1, beta2 = betas
        psi = 1.0 if semantics == "keras" else momentum_decay
        mu, following = (nadam_momentum(beta1, psi, t) for t in (step, step + 1))
        m, v, product = state["exp_avg"], state["exp_avg_sq"], state["mu_product"]
        product[...] = so_far = product.item() * mu
        root = math.sqrt(one_minus_power(beta2, step))
        into = lr * root * (1 - mu) / (1 - so_far)
        out = lr * root * following / (1 - so_far * following)
        m[...] = c(beta1) * m + c(1 - beta1) * g
        v[...] = c(beta2) * v + c(1 - beta2) * (g * g)
        param[...] = p - (c(into) * g + c(out) * m) / (np.sqrt(v) + c(eps * root))


def nadam_momentum(beta: float, psi: float, t: int) -> float:
    """Return ``beta * (1 - 0.96**(t*psi) / 2)``, from additions and multiplications alone.

    Examples
    --------
    >>> nadam_momentum(0.9, 0.0, 1)
    0.45
    """
    return beta * (1 - 0.5 * power_of_096(psi, t))


def power_of_096(psi: float, t: int) -> float:
    """Return ``0.96**(t*psi)``: 2 to a whole number, and Taylor's series for the rest.

    The exponent is a sum of two doubles: `t` times `psi`, and that times the logarithm.

    Examples
    --------
    >>> round(power_of_096(0.5, 4), 12)
    0.9216
    """
    log_upper, log_rest = (
        -float.fromhex("0x1.e275048da0ba1p-5"),
        float.fromhex("0x1.6ab55ad07cc86p-59"),
    )
    if not float(t) * psi < 20000:
        return 0.0
    x, x_rest = _product(float(t), psi)
    y, y_rest = _product(x, log_upper)
    y_rest = y_rest + (x * log_rest + x_rest * log_upper)
    n = int(y - 0.5)
    z = ((y - n) + y_rest) * float.fromhex("0x1.62e42fefa39efp-1")  # ln 2
    e = 1.0
    for k in range(16, 0, -1):
        e = 1 + z / k * e
    return math.ldexp(e, n)


def _product(x: float, y: float) -> tuple[float, float]:
    """Return a product as the sum of two doubles."""

    def upper_half(value: float) -> float:
        scaled = 134217729.0 * value  # 2**27 + 1
        return scaled - (scaled - value)

    product, a, b = x * y, upper_half(x), upper_half(y)
    a_rest, b_rest = x - a, y - b
    return product, ((a * b - product) + a * b_rest + a_rest * b) + a_rest * b_rest


def radam(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    semantics: str = "torch",
    **common: Any,
) -> None:
    """RAdam. See :func:`sgd` for the arguments; ``state`` holds ``exp_avg`` and ``exp_avg_sq``."""
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        beta1, beta2 = betas
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m[...] = c(beta1) * m + c(1 - beta1) * g
        v[...] = c(beta2) * v + c(1 - beta2) * (g * g)
        rho, limit = average_length(beta2, step), (1 + beta2) / (1 - beta2)
        r2, c2, divisor = 1.0, 1.0, c(1)
        if rho > 5:
            r2 = (rho - 4) / (limit - 4) * ((rho - 2) / (limit - 2)) * (limit / rho)
            c2 = one_minus_power(beta2, step)
            divisor = np.sqrt(v) + c(eps)
        rate = lr * math.sqrt(r2 * c2) / one_minus_power(beta1, step)
        param[...] = p - (c(rate) * m) / divisor


def rprop(
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    *,
    step: int,
    lr: float,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    semantics: str = "torch",
    **common: Any,
) -> None:
    """Rprop. See :func:`sgd` for the arguments.

    ``state`` holds ``prev`` and ``step_size``, of which 0 is one that has not begun. It is the same
    under both semantics.
    """
    with np.errstate(all="ignore"):
        c, p, g = _begin(param, grad, lr, **common)
        least = max(step_sizes[0], 2.0**-149 if lr > 0 else 0.0)  # the smallest float
        prev, s = state["prev"], state["step_size"]
        x = g * prev
        eta = np.where(x < 0, c(etas[0]), np.where(x > 0, c(etas[1]), c(1)))
        grown = np.where(s != 0, s, c(lr)) * eta
        large = np.where(grown < c(least), c(least), grown)
        s[...] = np.where(large > c(step_sizes[1]), c(step_sizes[1]), large)
        prev[...] = np.where(x < 0, c(0), g)
        param[...] = p - np.where(prev > 0, s, np.where(prev < 0, -s, c(0)))


def average_length(beta: float, t: int) -> float:
    """Return RAdam's ``rho``: how many gradients an average by `beta` is worth after `t` of them.

    That is ``(1 + beta)/(1 - beta) - 2*t*beta**t / (1 - beta**t)``, by doubling, without its
    cancellation.

    Examples
    --------
    >>> average_length(0.999, 1)
    1.0
    """
    rho, u, q = 1.0, 1 - beta, beta
    n = 1
    for bit in bin(t)[3:]:
        rho = rho + 2 * float(n) * (q / (1 + q))
        u = u * (2 - u)
        q = 1 - u if u < 0.5 else q * q
        n = 2 * n + int(bit)
        if bit == "1":
            following = (1 - beta) + beta * u
            rho = 1 + beta * (rho + 1) * (u / following)
            u = following
            q = 1 - u if u < 0.5 else beta * q
    return rho


def one_minus_power(beta: float, t: int) -> float:
    """Return ``1 - beta**t`` by doubling, without cancellation.

    At any `t` right to 4 ulp for a `beta` up to 0.9995, and to 6 at 0.9999, where subtraction
    loses up to 160 and 2200.

    Examples
    --------
    >>> one_minus_power(0.5, 3)
    0.875
    """
    u = 1 - beta
    for bit in bin(t)[3:]:
        u = u * (2 - u)
        if bit == "1":
            u = (1 - beta) + beta * u
    return u


def sum_of_squares(grad: Array, like: Array, loss_scale: float = 1.0) -> float:
    """Return the sum of squares of ``grad / loss_scale``, in double, in the order of the C core.

    `like` is the parameter, in whose memory order the elements are taken.
    """
    flat = _in_memory_order(grad, like)
    with np.errstate(all="ignore"):
        flat = (flat.dtype.type(1 / loss_scale) * flat).astype(np.float64)
        total = 0.0
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK]
            total += _squares_in_lanes(block)
    return total


def _in_memory_order(values: Array, like: Array) -> Array:
    """Return values as a vector, in the order in which the elements of another array lie."""
    axes = sorted(range(like.ndim), key=lambda axis: -like.strides[axis])
    return np.ascontiguousarray(values.transpose(axes)).reshape(-1)


def _squares_in_lanes(values: Array) -> float:
    """Return the sum of squares of a vector of float64, of every 16th element on its own first."""
    padded = np.zeros(max(-(-values.size // LANES), 1) * LANES)
    padded[: values.size] = values * values
    lanes = np.add.accumulate(padded.reshape(-1, LANES), axis=0)[-1]
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


def grad_norm(
    grads: Sequence[Array | None], params: Sequence[Array], loss_scale: float = 1.0
) -> float:
    """Return the common norm of the gradients that there are."""
    total = 0.0
    for grad, param in zip(grads, params, strict=True):
        if grad is not None:
            total += sum_of_squares(grad, param, loss_scale)
    return math.sqrt(total)


def clip_factor(
    norm: float, limit: float, semantics: str = "torch", *, of_all: bool = False
) -> float:
    """Return what a gradient of this norm is multiplied by; NaN for a NaN norm.

    `of_all` says that the norm is that of all gradients together, for which Keras has a formula of
    its own: NaN for an infinite norm, too.
    """
    if math.isnan(norm):
        return norm
    if math.isinf(limit):
        return 1.0
    if semantics == "keras" and of_all:
        inverse = 1 / norm if norm else math.inf
        return limit * min(inverse, 1 / limit) + (norm - norm)
    if semantics == "keras":
        return limit / max(norm, limit)
    return min(1.0, limit / (norm + 1e-6))


def mean(total: Array | None, grad: Array | None, k: int = 1, loss_scale: float = 1.0) -> Array:
    """Return ``(total + grad / loss_scale) / k``: what becomes of the gradients of micro-batches.

    With the default of `k` it is the next total. None counts as nothing.
    """
    some = total if grad is None else grad
    assert some is not None
    c = some.dtype.type
    with np.errstate(all="ignore"):
        if grad is not None:
            grad = c(1 / loss_scale) * grad
            total = grad if total is None else total + grad
        return np.asarray(total / c(k))


def average(ema: Array, param: Array, decay: float, *, first: bool) -> None:
    """Update a moving average of a parameter in place; the first is a copy."""
    c = param.dtype.type
    with np.errstate(all="ignore"):
        ema[...] = param if first else c(decay) * ema + c(1 - decay) * param


def _begin(
    param: Array,
    grad: Array,
    lr: float,
    *,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    grad_limit: float = math.inf,
) -> tuple[Any, Array, Array]:
    """Return the type that constants are rounded to, and parameter and gradient for the rule."""
    c = param.dtype.type
    g = c(-grad_scale if maximize else grad_scale) * grad
    g = _minimum(_maximum(g, c(-grad_limit)), c(grad_limit))
    if c(weight_decay) != 0 and not decoupled_weight_decay:
        g = g + c(weight_decay) * param
    keep = 1 - lr * weight_decay if decoupled_weight_decay and weight_decay else 1.0
    return c, c(keep) * param, g


def _maximum(a: Any, b: Any) -> Any:
    return np.where((a > b) | (a != a), a, b)


def _minimum(a: Any, b: Any) -> Any:
    return np.where((a < b) | (a != a), a, b)
