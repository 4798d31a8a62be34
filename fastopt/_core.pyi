"""Types of the compiled module."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

BLOCK: int
TORN: str
_C_API: object

def isa() -> dict[str, Any]: ...
def select_isa(name: str) -> None: ...
def compiler() -> str: ...
def has_openmp() -> bool: ...
def set_threads(limit: int) -> None: ...
def get_threads() -> int: ...
def force_threads(team: int, *, openmp: bool = False) -> None: ...
def rule_names() -> list[str]: ...
def note_fork() -> None: ...
def set_items(dicts: list[dict[str, Any]], items: list[dict[str, Any]]) -> None: ...
def address(array: NDArray[Any]) -> int: ...
def lends_memory(given: Any) -> bool: ...
def from_dlpack(given: Any) -> NDArray[Any]: ...
def array_over(given: Any, name: str, *, keep: bool = False) -> Any: ...
def check_parameter(array: Any, name: str) -> None: ...
def unchanged(groups: Any, seen: list[tuple[tuple[Any, ...], tuple[Any, ...]]] | None) -> bool: ...

class Lock:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

class Rule:
    name: str
    hypers: tuple[str, ...]
    slots: tuple[str, ...]
    def __init__(self, name: str) -> None: ...
    def used_slots(self, row: Sequence[float]) -> tuple[str, ...]: ...

class StepResult:
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def threads(self) -> int: ...

def step_result(grad_norm: float | None, skipped: bool, threads: int) -> StepResult: ...

class Plan:
    names: tuple[str, ...]
    owned: tuple[NDArray[Any], ...]
    owners: tuple[int, ...]
    num_threads: int
    pool: int
    settled: list[tuple[tuple[Any, ...], tuple[Any, ...]]] | None
    completed_steps: int
    accumulated_steps: int
    def __init__(
        self,
        rule: Rule,
        params: list[NDArray[Any]],
        slots: list[tuple[NDArray[Any] | None, ...]],
        ema: list[NDArray[Any]] | None,
        steps: list[NDArray[Any]],
        groups: list[int],
        rows: list[list[float]],
        names: list[str],
        *,
        semantics: int,
        clip: int,
        clip_limit: float,
        nonfinite: int,
        ema_decay: float,
        num_threads: int,
        completed_steps: int,
        sums: list[NDArray[Any]] | None = None,
        accumulate: int = 1,
        accumulated_steps: int = 0,
        summed: Sequence[bool] | None = None,
    ) -> None: ...
    def summed(self) -> list[bool]: ...
    def check(self) -> None: ...
    def set_hypers(self, group: int, row: Sequence[float]) -> None: ...
    @property
    def torn(self) -> bool: ...
    @property
    def busy(self) -> bool: ...
    def take_over_tear(self, other: Plan) -> None: ...
    def restore(
        self,
        to: list[NDArray[Any]],
        values: list[NDArray[Any]],
        completed_steps: int,
        done: list[bool],
        accumulated_steps: int = 0,
        summed: Sequence[bool] | None = None,
    ) -> None: ...
    def settle(
        self, groups: list[tuple[tuple[Any, ...], tuple[Any, ...]]] | None, direct: bool = ...
    ) -> None: ...
    def step_settled(
        self,
        lock: Lock,
        groups: Any,
        grads: Any,
        loss_scale: Any,
        zero_grad: Any,
    ) -> StepResult | None: ...
    def step(
        self, grads: Sequence[NDArray[Any] | None], loss_scale: float, zero_grad: bool
    ) -> StepResult: ...

class Update:
    def __init__(
        self, rule: Rule, checks: dict[str, tuple[Any, float, float]], arguments: tuple[str, ...]
    ) -> None: ...
    def __call__(
        self,
        row: tuple[Any, ...],
        semantics: int,
        step: int,
        params: Any,
        grads: Any,
        slots: tuple[Any, ...],
        zero_grad: bool,
        num_threads: int,
        out: Any,
    ) -> None: ...

class Limit:
    def __init__(
        self,
        updated: Sequence[Sequence[NDArray[Any]]],
        read: Sequence[NDArray[Any]],
        num_threads: int,
        taken: int = ...,
    ) -> None: ...
    def run(self) -> None: ...
