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

Parameters may be of float32, float64, bfloat16 (of ml_dtypes) or float16. Arithmetic is in float32,
or in float64 for a float64 parameter, whose state has to be float64, too. Beside the others, arrays
say how they are stored, each for itself:

========================  =====================================================================
an array of state         the parameter's dtype, float32 or bfloat16
the same in 8 bits        in its place a tuple, ``(codes, scales)``: uint8, laid out as the
                          parameter; and uint8, a vector with one for each 64 elements in the
                          parameter's memory order, and one for the rest
`mu_products`, of NAdam   float64, 0-d: one number for each parameter, 1 before its first step
`master`, beside 16 bits  uint16 beside bfloat16, float32 beside float16, laid out alike
========================  =====================================================================

Zeros stand for zeros in all other arrays, and for a `master` that has nothing to add yet. Maxima
(`max_exp_avg_sqs`, `exp_infs`), `grad_avgs` and `sizes` may not be in 8 bits, which would break
them.

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

from collections.abc import Sequence
from math import inf
from typing import Any, Unpack

from fastopt._calls import ANY_NUMBER, Storage, step_of, takes_storage
from fastopt._hypers import check, check_order
from fastopt._memory import Array
from fastopt._options import flag, pair, real

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "lion",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
]

Arrays = Array | list[Array] | tuple[Array, ...]
_TORCH, _KERAS = 0, 1
_AT_LEAST_0, _UP_TO_1 = (0.0, inf), (0.0, 1.0)
_any_number = check(*ANY_NUMBER)

_sgd = step_of("sgd", "momentum_buffers", unnumbered=2)
_adagrad = step_of("adagrad", "sums", "sums")
_rmsprop = step_of("rmsprop", "square_avgs", "momentum_buffers", "grad_avgs")
_adam = step_of(
    "adam", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", beta1=_UP_TO_1, beta2=_UP_TO_1
)
_adamax = step_of("adamax", "exp_avgs", "exp_infs", unnumbered=0)
_adadelta = step_of("adadelta", "square_avgs", "acc_deltas")
_lion = step_of("lion", "exp_avgs")
_nadam = step_of("nadam", "exp_avgs", "exp_avg_sqs", "mu_products", unnumbered=0)
_radam = step_of("radam", "exp_avgs", "exp_avg_sqs", unnumbered=0)
_rprop = step_of("rprop", "prevs", "sizes", lr=_AT_LEAST_0)


@takes_storage
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
    **storage: Unpack[Storage],
) -> None:
    r"""Gradient descent, with momentum and Nesterov's look-ahead.

    Parameters
    ----------
    params : numpy.ndarray, or list or tuple of them
        The parameter, or several; float32, float64, bfloat16 or float16, updated in place. An index
        with a list or an array makes a copy: take it out, ``p = P[rows]``, and put it back,
        ``P[rows] = p``.
    grads : numpy.ndarray or None, or list or tuple of them
        A gradient for each, of the same shape; of the same dtype, or another of which float32
        (float64, for a float64 parameter) has all values. None leaves its parameter out.
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
        buffer. A list has a number for each parameter. `stochastic_rounding` needs it.
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
        rule uses, then those of `master`, if it is given. The arrays passed in then stay as they
        are, and may be read-only. One that is also in `out` is updated in place.
    master : numpy.ndarray or None, or list or tuple of them, optional
        Beside a parameter of 16 bits: what its elements lack of a float32, so that a step updates
        float32 weights, of which the parameter holds the rounding to nearest. Updated in place;
        begin with zeros. None rounds the parameter itself.
    stochastic_rounding : bool, optional
        Round what is stored in fewer bits up or down at random, so that it is right on average:
        rounding to nearest loses updates that are smaller than half a unit in the last place. It
        does not concern parameters with a master.
    seed : int, optional
        Random bits are a function of it, of `step`, of `index` and of the element's number.
    index : int or list of int, optional
        The parameter's number, from 0; the first one's, from which the others count on; or a list
        with that of each.
    indices : array_like of int, optional
        The gradient is of these rows alone, as in :class:`fastopt.Rows`: a row for each number, in
        any order, and the sum of those that have one number. Only these rows of the parameter and
        of its state are read and written. For a list of parameters, a list; None is all rows.

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

    Steps far below what float16 holds of a 1 are kept in its master:

    >>> w, master = np.ones(1, np.float16), np.zeros(1, np.float32)
    >>> for _ in range(1000):
    ...     functional.sgd(w, np.ones(1, np.float16), lr=2**-14, master=master)
    >>> w, 1 - 1000 * 2**-14
    (array([0.939], dtype=float16), 0.93896484375)
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
        step,
        zero_grad,
        num_threads,
        out,
        _KERAS if velocity is not False and flag("velocity", velocity) else _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
    )


@takes_storage
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
    rowwise: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
    **storage: Unpack[Storage],
) -> None:
    r"""Adagrad.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    sums : numpy.ndarray, or list or tuple of them
        Sums of squares of the gradients so far, or whatever else to start from; updated in place.
        With `rowwise`, one for each row: a vector of ``len(param)``, in float32 (float64 for a
        float64 parameter).
    lr : float
        Learning rate.
    step : int or list of int, optional
        The number of this step, or of each parameter's, from 1; `lr_decay` and
        `stochastic_rounding` need it, and nothing else.
    lr_decay : float, optional
        The rate is ``lr / (1 + (step - 1)*lr_decay)``.
    eps : float, optional
        Added to the root.
    eps_inside : bool, optional
        Add it under the root, :math:`\sqrt{s + \epsilon}`.
    rowwise : bool, optional
        Row-wise Adagrad: keep one sum for each row of the parameter, of the means of its squared
        gradients.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
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
    by_row = rowwise is not False and flag("rowwise", rowwise)
    _adagrad(
        params,
        grads,
        None if by_row else sums,
        sums if by_row else None,
        step,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_inside is not False and flag("eps_inside", eps_inside) else _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        lr_decay=lr_decay,
        eps=eps,
        rowwise=rowwise,
    )


@takes_storage
def rmsprop(
    params: Arrays,
    grads: Any,
    square_avgs: Any,
    momentum_buffers: Any = None,
    grad_avgs: Any = None,
    *,
    lr: float,
    step: int | Sequence[int] | None = None,
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
    **storage: Unpack[Storage],
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
    step : int or list of int, optional
        The number of this step, or of each parameter's, from 1; `stochastic_rounding` needs it, and
        nothing else.
    eps_inside : bool, optional
        Add it under the root, :math:`\sqrt{v + \epsilon}`. As in Keras, the momentum buffer then
        holds the learning rate, and a difference :math:`v - a^2` that rounding has made negative
        stays so (its root may be NaN); otherwise it counts as 0.
    momentum : float, optional
        At least 0.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
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
        step,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_inside is not False and flag("eps_inside", eps_inside) else _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        alpha=alpha,
        eps=eps,
        momentum=momentum,
        centered=grad_avgs is not None,
    )


@takes_storage
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
    **storage: Unpack[Storage],
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
        it, and so does `stochastic_rounding`; without them you may omit it. To begin the correction
        at another step, add an offset: ``step=t + 1`` begins with the correction of the second one.
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
    master, stochastic_rounding, seed, index, indices
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
        step,
        zero_grad,
        num_threads,
        out,
        _KERAS if eps_hat is not False and flag("eps_hat", eps_hat) else _TORCH,
        storage,
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


@takes_storage
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
    **storage: Unpack[Storage],
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
    master, stochastic_rounding, seed, index, indices
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
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )


@takes_storage
def adadelta(
    params: Arrays,
    grads: Any,
    square_avgs: Any,
    acc_deltas: Any,
    *,
    lr: float,
    step: int | Sequence[int] | None = None,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
    **storage: Unpack[Storage],
) -> None:
    r"""Adadelta.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    square_avgs, acc_deltas : numpy.ndarray, or list or tuple of them
        Averages of the squared gradients, and of the squared steps; updated in place.
    lr : float
        Learning rate: 1 is Zeiler's rule.
    step : int or list of int, optional
        The number of this step, or of each parameter's, from 1; `stochastic_rounding` needs it, and
        nothing else.
    rho : float, optional
        What the averages keep of themselves, from 0 to 1.
    eps : float, optional
        Added under both roots.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.Adadelta : With state and checks of its own, and the formulas.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, v, a = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2)
    >>> functional.adadelta(w, np.array([10.0, -0.1]), v, a, lr=1.0)
    >>> w.round(6)
    array([ 2.996838, -1.996839])
    """
    _adadelta(
        params,
        grads,
        square_avgs,
        acc_deltas,
        step,
        zero_grad,
        num_threads,
        out,
        _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        rho=rho,
        eps=eps,
    )


@takes_storage
def lion(
    params: Arrays,
    grads: Any,
    exp_avgs: Any,
    *,
    lr: float,
    step: int | Sequence[int] | None = None,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
    **storage: Unpack[Storage],
) -> None:
    r"""Lion.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    exp_avgs : numpy.ndarray, or list or tuple of them
        The momentum: averages of the gradients; updated in place.
    lr : float
        Learning rate: the size of a step.
    step : int or list of int, optional
        The number of this step, or of each parameter's, from 1; `stochastic_rounding` needs it, and
        nothing else.
    betas : tuple of float, optional
        What the momentum weighs beside the gradient where the sign is taken, and what it keeps of
        itself, at least 0 and below 1.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.Lion : With state and checks of its own, and the formulas.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, m = np.array([3.0, -2.0]), np.zeros(2)
    >>> functional.lion(w, np.array([10.0, -0.1]), m, lr=0.25)
    >>> w
    array([ 2.75, -1.75])
    """
    beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else pair("betas", betas)
    _lion(
        params,
        grads,
        exp_avgs,
        step,
        zero_grad,
        num_threads,
        out,
        _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        beta1=beta1,
        beta2=beta2,
    )


@takes_storage
def nadam(
    params: Arrays,
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    mu_products: Any,
    *,
    step: int | Sequence[int],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    fast_warmup: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
    **storage: Unpack[Storage],
) -> None:
    r"""NAdam.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    exp_avgs, exp_avg_sqs : numpy.ndarray, or list or tuple of them
        Averages of the gradients and of their squares; updated in place.
    mu_products : numpy.ndarray, or list or tuple of them
        For each parameter the product of its momenta so far: one float64 number, in a 0-d array
        (``numpy.ones(())`` before the first step); updated in place.
    step : int or list of int
        The number :math:`t` of this step, or of each parameter's, from 1.
    lr : float
        Learning rate.
    betas : tuple of float, optional
        Decay of the averages, at least 0 and below 1.
    eps : float, optional
        Added to the corrected root.
    momentum_decay : float, optional
        The :math:`\psi` of :math:`\mu_t = \beta_1 (1 - 0.96^{t \psi} / 2)`; at least 0.
    fast_warmup : bool, optional
        Take 1 for it, as Keras does.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.NAdam : With state and checks of its own, and the formulas.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, m, v, product = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2), np.ones(())
    >>> functional.nadam(w, np.array([1e-3, 1e3]), m, v, product, step=1, lr=0.1)
    >>> w.round(4), round(product.item(), 4)
    (array([ 2.8944, -2.1056]), 0.4501)
    """
    beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else pair("betas", betas)
    _nadam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        mu_products,
        step,
        zero_grad,
        num_threads,
        out,
        _KERAS if fast_warmup is not False and flag("fast_warmup", fast_warmup) else _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        momentum_decay=momentum_decay,
    )


@takes_storage
def radam(
    params: Arrays,
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    *,
    step: int | Sequence[int],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
    **storage: Unpack[Storage],
) -> None:
    r"""RAdam.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    exp_avgs, exp_avg_sqs : numpy.ndarray, or list or tuple of them
        Averages of the gradients and of their squares; updated in place.
    step : int or list of int
        The number :math:`t` of this step, or of each parameter's, from 1.
    lr : float
        Learning rate.
    betas : tuple of float, optional
        Decay of the averages, at least 0 and below 1.
    eps : float, optional
        Added to the root.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.RAdam : With state and checks of its own, and the formulas.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, m, v = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2)
    >>> functional.radam(w, np.array([1.0, -5.0]), m, v, step=1, lr=0.1)
    >>> w.round(4)
    array([ 2.9, -1.5])
    """
    beta1, beta2 = betas if type(betas) is tuple and len(betas) == 2 else pair("betas", betas)
    _radam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step,
        zero_grad,
        num_threads,
        out,
        _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )


@takes_storage
def rprop(
    params: Arrays,
    grads: Any,
    prevs: Any,
    sizes: Any,
    *,
    lr: float,
    step: int | Sequence[int] | None = None,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    zero_grad: bool = False,
    num_threads: int | None = None,
    out: Any = None,
    **storage: Unpack[Storage],
) -> None:
    r"""Rprop.

    Parameters
    ----------
    params, grads
        As for :func:`sgd`.
    prevs : numpy.ndarray, or list or tuple of them
        The previous gradients, 0 where the last step has found another sign; updated in place.
    sizes : numpy.ndarray, or list or tuple of them
        The step size of each element, updated in place; 0 stands for `lr`. In float16, let
        `step_sizes` begin at 6e-8 or more, as smaller ones are stored as 0.
    lr : float
        The step size that an element begins with, at least 0.
    step : int or list of int, optional
        The number of this step, or of each parameter's, from 1; `stochastic_rounding` needs it, and
        nothing else.
    etas : tuple of float, optional
        What a step size is multiplied by where the gradient changes its sign, above 0 and below 1;
        and where it keeps it, above 1.
    step_sizes : tuple of float, optional
        The smallest step size and the largest; at least 0.
    weight_decay, decoupled_weight_decay, maximize, zero_grad, num_threads, out
        As for :func:`sgd`.
    master, stochastic_rounding, seed, index, indices
        As for :func:`sgd`.

    Raises
    ------
    TypeError, ValueError
        For what the classes refuse; nothing has then been written.

    See Also
    --------
    fastopt.Rprop : With state and checks of its own, and the formulas.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import functional
    >>> w, h, s = np.array([3.0, -2.0]), np.zeros(2), np.zeros(2)
    >>> for _ in range(2):
    ...     functional.rprop(w, np.array([1e-3, -1e3]), h, s, lr=0.5, etas=(0.5, 2.0))
    >>> w, s
    (array([ 1.5, -0.5]), array([1., 1.]))
    """
    etaminus, etaplus = pair("etas", etas)
    smallest, largest = pair("step_sizes", step_sizes)
    check_order("", real("step_size_min", smallest), real("step_size_max", largest))
    _rprop(
        params,
        grads,
        prevs,
        sizes,
        step,
        zero_grad,
        num_threads,
        out,
        _TORCH,
        storage,
        lr=lr,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        etaminus=etaminus,
        etaplus=etaplus,
        step_size_min=smallest,
        step_size_max=largest,
    )
