"""What a backend of Keras has to have for fastopt's optimizers: a module with these functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fastopt.keras._step import Settings, Unfit

Pair = tuple[Any, Any]  # a gradient and its variable


class Updates(Protocol):
    """How an optimizer's variables are updated; each optimizer has one."""

    def find(
        self, settings: Settings, variables: list[Any], grads: list[Any]
    ) -> Callable[..., None]:
        """Return a function that updates: of the learning rate and the iterations so far.

        And of the rule's number before the step, if it has one.

        `variables` are the model's, then what each has beside it. Raises RefusedError, with
        everything as it was, if the kernels cannot take their memory.
        """
        ...


class Backend(Protocol):
    """The module ``fastopt.keras._NAME`` of Keras's backend NAME."""

    @property
    def Updates(self) -> Callable[[], Updates]:  # noqa: N802
        """Makes what one optimizer updates its variables with."""
        ...

    def native(self, variable: Any) -> Any:
        """Return what stands for a variable in a step: itself, or what it really is."""
        ...

    def by_itself(self) -> bool:
        """Tell whether variables are what they seem, and no stand-ins."""
        ...

    def unfit_step(self) -> Unfit | None:
        """Return why no kernel can run where this is called."""
        ...

    def unfit(self, variable: Any, grad: Any) -> Unfit | None:
        """Return why the kernels cannot update a variable; without a gradient, with a dense one."""
        ...

    def is_sparse(self, grad: Any) -> bool:
        """Tell whether a gradient is of some rows, and zero everywhere else."""
        ...

    def clipped(self, grads: list[Any], clip: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Return gradients as Keras clips them, if the sparse ones were dense."""
        ...

    def share_memory(self, some: list[Pair], others: list[Pair]) -> bool:
        """Tell whether the order in which these and those are updated may matter."""
        ...

    def size(self, variable: Any) -> int:
        """Return the number of a variable's elements."""
        ...

    def rounded(self, value: Any) -> float:
        """Return a hyperparameter as this backend keeps it."""
        ...
