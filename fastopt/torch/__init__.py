"""PyTorch's optimizers on fastopt's kernels: ``import fastopt.torch as optim``.

Each class is a subclass of its namesake in ``torch.optim``, with the same signature, defaults,
errors and state; only the update differs. Dense float32, float64, bfloat16 and float16 tensors in
the CPU's memory are updated in place by fastopt's kernels, all of them in one call; for every other
parameter the namesake's own update runs. Sparse gradients update the rows that they are of, where
they do so in PyTorch, or where ``rows=``, another keyword of every class, says so.

State lives where PyTorch keeps it, in ``optimizer.state``, under PyTorch's names, and as PyTorch
stores it, unless one of these keywords of every class says otherwise:

- ``master_weights=True``: train float32 weights, of which 16-bit parameters hold the rounding;
- ``state_dtype="float32"``, ``"bfloat16"`` or ``"8bit"``: what state is stored in;
- ``stochastic_rounding=True``: what is stored in fewer bits is rounded at random, by ``seed``
  (as with ``state_dtype="bfloat16"`` or ``"8bit"`` unless this is False).

Whatever else is in ``torch.optim`` is here, too, and is PyTorch's own: its other optimizers
(``Adafactor``, ``LBFGS``, ...), ``lr_scheduler``, ``swa_utils``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils

from fastopt import _core
from fastopt.torch._fitness import DENSE
from fastopt.torch._optimizer import KernelOptimizer
from fastopt.torch._storage import form_of

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "lr_scheduler",
    "swa_utils",
]

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"fastopt.torch needs PyTorch 2.13 or newer, this is {torch.__version__}")


class SGD(KernelOptimizer, torch.optim.SGD):
    """:class:`torch.optim.SGD`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.SGD` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.SGD([w], lr=0.1, momentum=0.9)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.4000, -1.6000])
    """

    _rule = _core.Rule("sgd")
    _namesake = torch.optim.SGD
    _counts = False

    def _make_state(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        # The namesake's first step makes the buffer, of the gradient: so does the rule's.
        buffer = torch.zeros_like(param, memory_format=torch.preserve_format)
        self.state[param]["momentum_buffer"] = buffer

    def _namesake_goes_by_rows(self, group: Mapping[str, Any]) -> bool:
        return not group["momentum"] and not group["weight_decay"]


class Adagrad(KernelOptimizer, torch.optim.Adagrad):
    """:class:`torch.optim.Adagrad`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Adagrad` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Adagrad([w], lr=1.0)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2., -1.])
    """

    _rule = _core.Rule("adagrad")
    _namesake = torch.optim.Adagrad
    _state_lists = 4

    def _namesake_goes_by_rows(self, group: Mapping[str, Any]) -> bool:
        return not group["weight_decay"]


class RMSprop(KernelOptimizer, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.RMSprop` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.RMSprop([w], lr=0.1)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.0000, -1.0000])
    """

    _rule = _core.Rule("rmsprop")
    _namesake = torch.optim.RMSprop
    _state_lists = 6

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        # The namesake takes a momentum below 0, which only a group can have, for none.
        return super()._row({**group, "momentum": max(float(group["momentum"]), 0.0)})


class Adam(KernelOptimizer, torch.optim.Adam):
    """:class:`torch.optim.Adam`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Adam` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Adam([w], lr=1.0)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2., -1.])
    """

    _rule = _core.Rule("adam")
    _namesake: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam
    _state_lists = 6
    _fixed: ClassVar[dict[str, bool]] = {"bias_correction": True}


class AdamW(Adam, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.AdamW` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.AdamW([w], lr=1.0, weight_decay=0.5)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.5000, 0.0000])
    """

    _namesake = torch.optim.AdamW


class Adamax(KernelOptimizer, torch.optim.Adamax):
    """:class:`torch.optim.Adamax`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Adamax` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Adamax([w], lr=1.0)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2., -1.])
    """

    _rule = _core.Rule("adamax")
    _namesake = torch.optim.Adamax
    _state_lists = 5


class Adadelta(KernelOptimizer, torch.optim.Adadelta):
    """:class:`torch.optim.Adadelta`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Adadelta` has the
    mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Adadelta([w], lr=100.0)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.6838, -1.6838])
    """

    _rule = _core.Rule("adadelta")
    _namesake = torch.optim.Adadelta
    _state_lists = 5


class NAdam(KernelOptimizer, torch.optim.NAdam):
    """:class:`torch.optim.NAdam`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.NAdam` has the mathematics.
    ``mu_product`` is of float64 beside a parameter of float64, for which PyTorch, too, rounds it to
    float32 at every step.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.NAdam([w], lr=0.25)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.7359, -1.7359])
    """

    _rule = _core.Rule("nadam")
    _namesake = torch.optim.NAdam
    _state_lists = 6
    _fixed: ClassVar[dict[str, bool]] = {}

    def _init_group(self, group: Any, params_with_grad: Any, *lists: Any) -> Any:
        has_complex = super()._init_group(group, params_with_grad, *lists)
        products = lists[3]
        for i, param in enumerate(params_with_grad):
            if param.dtype == torch.float64:
                products[i] = self.state[param]["mu_product"] = products[i].double()
        return has_complex


class RAdam(KernelOptimizer, torch.optim.RAdam):
    """:class:`torch.optim.RAdam`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.RAdam` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.RAdam([w], lr=0.25)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 1.5000, -1.0000])
    """

    _rule = _core.Rule("radam")
    _namesake = torch.optim.RAdam
    _state_lists = 5
    _fixed: ClassVar[dict[str, bool]] = {}


class Rprop(KernelOptimizer, torch.optim.Rprop):
    """:class:`torch.optim.Rprop`, updated by fastopt.

    Signature, defaults and errors are the namesake's; :class:`fastopt.Rprop` has the mathematics.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> w = torch.tensor([3.0, -2.0], requires_grad=True)
    >>> optimizer = optim.Rprop([w], lr=0.5)
    >>> (w**2).sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 2.5000, -1.5000])
    """

    _rule = _core.Rule("rprop")
    _namesake = torch.optim.Rprop
    _state_lists = 5

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        # State has begun when it is made: where a step size is 0, none begins at a rate again.
        return super()._row({**group, "lr": 0.0, "weight_decay": 0.0})

    def _make_state(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        super()._make_state(param, group)
        dtype = form_of(self._storage_of(param), "step_size")
        # The namesake's are of the gradient's type, and lie in memory as that does.
        sizes = torch.full_like(
            param, float(group["lr"]), dtype=dtype, memory_format=torch.preserve_format
        )
        self.state[param]["step_size"] = sizes


class SparseAdam(KernelOptimizer, torch.optim.SparseAdam):
    """:class:`torch.optim.SparseAdam`, updated by fastopt.

    Signature, defaults and errors are the namesake's. It is Adam for parameters of which each
    gradient is that of some rows: it updates these rows, of parameters and state, alone.

    Examples
    --------
    >>> import torch, fastopt.torch as optim
    >>> table = torch.nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)
    >>> optimizer = optim.SparseAdam(table.parameters(), lr=0.5)
    >>> table(torch.tensor([2, 0, 2])).sum().backward()
    >>> optimizer.step()
    >>> table.weight.detach()[:, 0]
    tensor([0.5000, 1.0000, 0.5000, 1.0000])
    """

    _rule = _core.Rule("adam")
    _namesake = torch.optim.SparseAdam
    _semantics = 1  # Keras's: eps is added to the root of what is not corrected
    _counts_in_ints = True
    _takes_rows_alone = True

    def _row(self, group: Mapping[str, Any]) -> list[float]:
        return super()._row({"maximize": False, **group, "weight_decay": 0.0, "amsgrad": False})

    def _make_state(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        zeros = {
            slot: torch.zeros_like(param, memory_format=torch.preserve_format)
            for slot in ("exp_avg", "exp_avg_sq")
        }
        self.state[param].update({"step": 0, **zeros})

    def _namesake_goes_by_rows(self, group: Mapping[str, Any]) -> bool:
        return True

    def _warn(self, left: list[tuple[torch.Tensor, str]], size: int) -> None:
        if all(why != DENSE for _, why in left):  # which PyTorch is about to refuse
            super()._warn(left, size)


# All else that scripts look for in ``torch.optim``, whichever version of PyTorch this is.
_TORCHS = [name for name in torch.optim.__all__ if name not in __all__]
globals().update({name: getattr(torch.optim, name) for name in _TORCHS})
__all__ += _TORCHS
# ``from torch.optim.lr_scheduler import StepLR`` goes on with the import changed.
for _name in ("lr_scheduler", "optimizer", "swa_utils"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[f"torch.optim.{_name}"]
