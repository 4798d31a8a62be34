r"""The rules as functions of arrays that the caller keeps: one call, one step, in place.

These functions are for code that keeps parameters, state and the number of the step itself. Each
function updates one array, or a list of arrays, from its gradient, with exactly the bits of the
class of that name. It checks everything before it writes anything. Hyperparameters are keywords,
and so is every choice in which programs with a rule of the same name differ:

=====================================  ========================================================
where eps is added                     ``eps_hat``, ``eps_inside``, ``eps_outside``
how and from when a bias is corrected  ``bias_correction``, ``step``; or correct `lr` yourself
whether momentum holds the rate        ``velocity``
how a gradient enters the momentum     ``dampening``: it is multiplied by ``1 - dampening``
what an accumulator starts from        the array that you pass
up or down                             ``maximize``, or a negative `lr`
=====================================  ========================================================

Examples
--------
>>> import numpy as np
>>> from fastopt import functional
>>> w, g = np.array([3.0, -2.0]), np.array([1e-3, 1e3])
>>> m, v = np.zeros(2), np.zeros(2)
>>> functional.adam(w, g, m, v, step=1, lr=0.1)
>>> w.round(4)
array([ 2.9, -2.1])
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isnan
from typing import Any

import numpy as np

from fastopt import _core
from fastopt._hypers import check
from fastopt._memory import Array
from fastopt._options import flag, pair, real
from fastopt.threads import checked_threads

__all__ = ["adagrad", "adam", "adamax", "rmsprop", "sgd"]

Arrays = Array | list[Array] | tuple[Array, ...]
_TORCH, _KERAS = 0, 1
_ANY_NUMBER, _UP_TO_1 = (-inf, inf), (0.0, 1.0)
_any_number = check(*_ANY_NUMBER)


def _step_of(name: str, *slots: str, **ranges: tuple[float, float]) -> Callable[..., None]:
    """Return a rule as a function, with its ranges of hyperparameters but for these."""
    rule = _core.Rule(name)
    checks = {
        hyper: (check(low, high), low, 0.0 if isnan(high) else high)
        for hyper, (low, high) in (rule.ranges | {"lr": _ANY_NUMBER} | ranges).items()
    }
    options = (_number, partial(flag, "zero_grad"), partial(checked_threads, name="num_threads"))
    return _core.FunctionalStep(rule, checks, ("params", "grads", *slots), options).function()


def _number(step: Any) -> int | list[int]:
    """Check the number of a step, or that of each parameter."""
    return [_whole(number) for number in step] if isinstance(step, (list, tuple)) else _whole(step)


_sgd = _step_of("sgd", "momentum_buffers")
_adagrad = _step_of("adagrad", "sums")
_rmsprop = _step_of("rmsprop", "square_avgs", "momentum_buffers", "grad_avgs")
_adam = _step_of(
    "adam", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", beta1=_UP_TO_1, beta2=_UP_TO_1
)
_adamax = _step_of("adamax", "exp_avgs", "exp_infs")


def sgd(
    params: Arrays,
    grads: Any,
    momentum_buffers: Any = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    velocity: bool = False,
    step: int | Sequence[int] | None = None,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
) -> None:
    r"""Gradient descent, with momentum and Nesterov's look-ahead.

    Parameters
    ----------
    params : numpy.ndarray, or list or tuple of them
        The parameter, or several; float32 or float64, updated in place. An index with a list or an
        array makes a copy: take it out, ``p = P[rows]``, and put it back, ``P[rows] = p``.
    grads : numpy.ndarray or None, or list or tuple of them
        A gradient for each, of the same shape and dtype; None leaves its parameter out.
    momentum_buffers : numpy.ndarray, or list or tuple of them, optional
        State, laid out as the parameters and updated in place; used if `momentum` is not 0.
    lr : float
        Learning rate. A negative one ascends, and the state is that of the gradients as they are;
        weight decay then makes the weights grow.
    momentum, dampening : float, optional
        The buffer becomes :math:`\mu b + (1 - d) g`.
    nesterov : bool, optional
        Step along :math:`g + \mu b` instead of :math:`b`.
    velocity : bool, optional
        The buffer holds the learning rate and points where the step goes:
        :math:`v = \mu v - \gamma (1 - d) g`, :math:`\theta = \theta + v`, with Nesterov
        :math:`\theta = \theta + \mu v - \gamma g`.
    step : int or list of int, optional
        With 1, for a buffer's first use, the buffer becomes a copy of the gradient, undamped, as
        PyTorch does it. Otherwise, and always with `velocity`, the step starts from what is in the
        buffer. A list has a number for each parameter.
    weight_decay : float, optional
        Added to the gradient, times the parameter; or, if decoupled, the parameter is first
        multiplied by ``1 - lr*weight_decay``.
    decoupled_weight_decay, maximize : bool, optional
        As for :class:`fastopt.SGD`; `maximize` negates the gradient before everything else.
    zero_grad : bool, optional
        Whether to zero the gradients afterwards.
    num_threads : int, optional
        Upper bound on threads. Results do not depend on it.
    out : tuple, optional
        Arrays for the results: first those of the parameters, then those of each state that the
        rule uses. The arrays passed in then stay as they are, and may be read-only. One that is
        also in `out` is updated in place.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.SGD : With state and checks of its own.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, v = np.array([3.0]), np.zeros(1)
    >>> for _ in range(2):
    ...     functional.sgd(w, np.ones(1), v, lr=0.5, momentum=0.5, velocity=True)
    >>> w, v
    (array([1.75]), array([-0.75]))
    """
    if nesterov is not False and flag("nesterov", nesterov):
        mu, damping = real("momentum", momentum), _any_number("dampening", dampening)
        if damping != 0 or (mu == 0 and not velocity):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening = 0, got "
                f"momentum={momentum!r} and dampening={dampening!r}"
            )
    _sgd(
        params,
        grads,
        momentum_buffers,
        2 if step is None else step,
        zero_grad,
        num_threads,
        out,
        _KERAS if velocity is not False and flag("velocity", velocity) else _TORCH,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
    )


def adagrad(
    params: Arrays,
    grads: Any,
    sums: Any,
    *,
    lr: float,
    step: int | Sequence[int] | None = None,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    eps_inside: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
) -> None:
    r"""Adagrad.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    sums : numpy.ndarray, or list or tuple of them
        Sums of squares of the gradients so far, or whatever else to start from; updated in place.
    lr : float
        Learning rate.
    step : int or list of int, optional
        The number of this step, or of each parameter's, from 1; `lr_decay` needs it, and nothing
        else.
    lr_decay : float, optional
        The rate is ``lr / (1 + (step - 1)*lr_decay)``.
    eps : float, optional
        Added to the root.
    eps_inside : bool, optional
        Add it under the root, :math:`\sqrt{s + \epsilon}`.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, s = np.array([3.0, -2.0]), np.zeros(2)
    >>> functional.adagrad(w, np.array([10.0, -0.1]), s, lr=1.0)
    >>> w.round(6)
    array([ 2., -1.])
    """
    plain = type(lr_decay) is float and lr_decay == 0
    if step is None and not plain and real("lr_decay", lr_decay) != 0:
        raise TypeError(
            "step is required where lr_decay is not 0: this step's number, from 1 (step=t)"
        )
    _adagrad(
        params,
        grads,
        sums,
        1 if step is None else step,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_inside is not False and flag("eps_inside", eps_inside) else _TORCH,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        lr_decay=lr_decay,
        eps=eps,
    )


def rmsprop(
    params: Arrays,
    grads: Any,
    square_avgs: Any,
    momentum_buffers: Any = None,
    grad_avgs: Any = None,
    *,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    eps_inside: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
) -> None:
    r"""RMSprop, with momentum, and centered if `grad_avgs` are given.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    square_avgs : numpy.ndarray, or list or tuple of them
        Averages of the squared gradients so far; updated in place. Some programs start from 1.
    momentum_buffers : numpy.ndarray, or list or tuple of them, optional
        State, updated in place; used if `momentum` is not 0.
    grad_avgs : numpy.ndarray, or list or tuple of them, optional
        Averages of the gradients, updated in place. They make it centered:
        :math:`v - a^2` takes the place of :math:`v`.
    lr, alpha : float
        Learning rate, and what the averages keep of themselves.
    eps : float, optional
        Added to the root.
    eps_inside : bool, optional
        Add it under the root, :math:`\sqrt{v + \epsilon}`. As in Keras, the momentum buffer then
        holds the learning rate, and a difference :math:`v - a^2` that rounding has made negative
        stays so (its root may be NaN); otherwise it counts as 0.
    momentum : float, optional
        At least 0.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, v = np.array([3.0, -2.0]), np.ones(2)
    >>> functional.rmsprop(w, np.array([1.0, -1.0]), v, lr=0.5, alpha=0.9)
    >>> w.round(6)
    array([ 2.5, -1.5])
    """
    _rmsprop(
        params,
        grads,
        square_avgs,
        momentum_buffers,
        grad_avgs,
        1,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_inside is not False and flag("eps_inside", eps_inside) else _TORCH,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        alpha=alpha,
        eps=eps,
        momentum=momentum,
        centered=grad_avgs is not None,
    )


def adam(
    params: Arrays,
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    max_exp_avg_sqs: Any = None,
    *,
    step: int | Sequence[int] | None = None,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_hat: bool = False,
    bias_correction: bool = True,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
) -> None:
    r"""Adam; AdamW with decoupled weight decay, and AMSGrad if `max_exp_avg_sqs` are given.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    exp_avgs, exp_avg_sqs : numpy.ndarray, or list or tuple of them
        Averages of the gradients and of their squares; updated in place.
    max_exp_avg_sqs : numpy.ndarray, or list or tuple of them, optional
        The largest of `exp_avg_sqs` so far, updated in place and used in their place.
    step : int or list of int
        The number :math:`t` of this step, or of each parameter's, from 1. The bias correction needs
        it; without the correction you may omit it. To begin the correction at another step, add an
        offset: ``step=t + 1`` begins with the correction of the second step.
    lr : float
        Learning rate. A negative one ascends, and the state is that of the gradients as they are;
        weight decay then makes the weights grow.
    betas : tuple of float, optional
        Decay of the averages, at least 0 and below 1; without bias correction, 1 is allowed.
    eps : float, optional
        Added to the corrected root, :math:`\sqrt{\hat v} + \epsilon`.
    eps_hat : bool, optional
        Add it to the uncorrected root: :math:`\gamma_t m / (\sqrt v + \epsilon)` with
        :math:`\gamma_t = \gamma \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`.
    bias_correction : bool, optional
        False leaves the averages as they are; also for an `lr` that has been corrected already.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.Adam : With state and checks of its own, and the formulas.

    Examples
    --------
    Arrays that are read-only need others to write to:

    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, m, v = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2)
    >>> w.flags.writeable = False
    >>> new = np.empty(2), np.empty(2), np.empty(2)
    >>> functional.adam(w, np.array([1e-3, 1e3]), m, v, step=1, lr=0.1, out=new)
    >>> new[0].round(4)
    array([ 2.9, -2.1])
    """
    beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else pair("betas", betas)
    if type(beta1) is not float or type(beta2) is not float:
        beta1, beta2 = real("beta1", beta1), real("beta2", beta2)
    if (beta1 == 1 or beta2 == 1) and flag("bias_correction", bias_correction):
        raise ValueError(f"betas must be < 1 where the bias is corrected, got {betas!r}")
    if step is None and flag("bias_correction", bias_correction):
        raise TypeError(
            "step is required where the bias is corrected: this step's number, from 1 (step=t); "
            "bias_correction=False needs none"
        )
    _adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        1 if step is None else step,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_hat is not False and flag("eps_hat", eps_hat) else _TORCH,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        amsgrad=max_exp_avg_sqs is not None,
        bias_correction=bias_correction,
    )


def adamax(
    params: Arrays,
    grads: Any,
    exp_avgs: Any,
    exp_infs: Any,
    *,
    step: int | Sequence[int],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_outside: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
) -> None:
    r"""Adamax.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    exp_avgs, exp_infs : numpy.ndarray, or list or tuple of them
        Averages of the gradients, and their largest magnitudes, which fade; updated in place.
    step : int or list of int
        The number :math:`t` of this step, or of each parameter's, from 1.
    lr : float
        Learning rate.
    betas : tuple of float, optional
        Decay of the average and of the largest magnitude, at least 0 and below 1.
    eps : float, optional
        Added to the gradient's magnitude, :math:`u = \max(\beta_2 u, |g| + \epsilon)`.
    eps_outside : bool, optional
        Add it to the divisor instead, :math:`u + \epsilon`, as Keras does.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.Adamax : With state and checks of its own, and the formulas.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, m, u = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2)
    >>> functional.adamax(w, np.array([1e-3, 1e3]), m, u, step=1, lr=0.1)
    >>> w.round(4)
    array([ 2.9, -2.1])
    """
    beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else pair("betas", betas)
    _adamax(
        params,
        grads,
        exp_avgs,
        exp_infs,
        step,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_outside is not False and flag("eps_outside", eps_outside) else _TORCH,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )


def _whole(step: Any) -> int:
    try:
        if isinstance(step, (bool, np.bool_)):
            raise TypeError
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be an integer, got {step!r} ({type(step).__name__})") from None
    if not 0 < number < 2**62:
        raise ValueError(f"step must be >= 1 and < 2**62, got {step!r}")
    return number
