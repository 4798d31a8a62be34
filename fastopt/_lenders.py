"""Parameters in memory that something else lends, and that may move.

PyTorch moves a tensor's memory in place (``share_memory_()``, ``.data = ...``), and others do so in
ways of their own. So a lender is looked at in every step, before anything is read.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

from fastopt import _core
from fastopt._memory import Array


class Lenders:
    """What lends the memory of some parameters.

    Parameters
    ----------
    given : sequence
        The parameters as they were given: arrays, and what lends its memory.
    arrays : sequence of numpy.ndarray
        For each the array over its memory; the same object, if it is an array.
    before : Lenders, optional
        What looked after the first of them until now.

    Attributes
    ----------
    of : dict
        What lends its memory, by the number of its parameter.
    replaced : dict
        By the number of its parameter, the place in a module of PyTorch that has another by now.
    """

    def __init__(
        self, given: Sequence[Any], arrays: Sequence[Array], before: Lenders | None = None
    ) -> None:
        pairs = enumerate(zip(given, arrays, strict=True))
        self.of = {i: lender for i, (lender, array) in pairs if lender is not array}
        self.replaced: dict[int, str] = {} if before is None else dict(before.replaced)
        by_type: dict[type, list[Any]] = {}
        self._others: list[tuple[Any, Array]] = []
        for i, lender in self.of.items():
            if getattr(type(lender), "__dlpack_c_exchange_api__", None) is not None:
                by_type.setdefault(type(lender), []).append(lender)
            else:
                self._others.append((lender, arrays[i]))
        self._tensors = []
        if by_type:
            from fastopt._tensors import Tensors  # which may need Python's lock

            self._tensors = [Tensors(kind, tensors) for kind, tensors in by_type.items()]
            _watch_modules(self)

    def in_place(self) -> bool:
        """Tell whether all memory is where it was when this was made, and laid out as it was."""
        return all(tensors.in_place() for tensors in self._tensors) and all(
            _is_over(lender, array) for lender, array in self._others
        )


def _is_over(lender: Any, array: Array) -> bool:
    try:
        now = _core.array_over(lender, "")
        _core.check_lent(now, "")
    except (TypeError, ValueError):
        return False
    return (now.dtype, now.shape, now.strides, _core.address(now)) == (
        array.dtype,
        array.shape,
        array.strides,
        _core.address(array),
    )


# ---- modules of PyTorch that put another parameter in a parameter's place ------------------------

# As ``load_state_dict(assign=True)`` does. A step with a gradient for the old one would train what
# the module no longer has.

_watching: weakref.WeakSet[Lenders] = weakref.WeakSet()
_hooks: list[Any] = []


def _watch_modules(lenders: Lenders) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not any(isinstance(x, torch.nn.Parameter) for x in lenders.of.values()):
        return
    _watching.add(lenders)
    if not _hooks:
        register = torch.nn.modules.module.register_module_parameter_registration_hook
        _hooks.append(register(_note_registration))


def _note_registration(module: Any, name: str, param: Any) -> None:
    before = module._parameters.get(name)
    if before is None or before is param:
        return
    for lenders in tuple(_watching):
        for i, lender in lenders.of.items():
            if lender is before:
                lenders.replaced[i] = f"{type(module).__name__}.{name}"
