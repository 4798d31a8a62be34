"""Groups' hyperparameters: checked, in the rule's order, and what has changed.

A group is a dict, which its user may change at any time. A plan has a row of floats for each.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from fastopt import _core
from fastopt._options import flag, frozen, pair, real
from fastopt._trees import is_container

LearningRate = float | Callable[[int], float]

# The keys and the values of each group; None if a value may change in place, as a list can.
Seen = list[tuple[tuple[Any, ...], tuple[Any, ...]]] | None

Check = Callable[[str, Any], float]  # of a name and a value: returns that as a float, or raises

# The first number after each, but no subnormal, which a thread may take for 0.
ABOVE = {sys.float_info.min: 0.0, math.nextafter(1.0, math.inf): 1.0}
BELOW_1 = math.nextafter(1.0, 0.0)

# Options of a group that are pairs, and the two hyperparameters of the rule that each is.
PAIRS = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}


def checks(rule: _core.Rule) -> dict[str, Check]:
    """Return a check for each hyperparameter of a rule."""
    return {name: check(low, high) for name, (low, high) in rule.ranges.items()}


def check(low: float, high: float) -> Check:
    """Return a check for a range with both ends in it; a NaN as `high` says that it is a switch."""
    if math.isnan(high):
        return flag
    above = ABOVE.get(low)
    if high == BELOW_1:
        return partial(real, low=low, above=above, below=1.0)
    return partial(real, low=low, above=above, high=None if high == math.inf else high)


def checked_pairs(
    checks: Mapping[str, Check], group: Mapping[str, Any], where: str
) -> dict[str, float]:
    """Check the options that are pairs; return their values as the rule has them."""
    return {
        name: checks[name](f"{where}{option}[{index}]", value)
        for option, names in PAIRS.items()
        if option in group
        for index, (name, value) in enumerate(
            zip(names, pair(f"{where}{option}", group[option]), strict=True)
        )
    }


def check_order(where: str, smallest: float, largest: float) -> None:
    """Raise if the option ``step_sizes`` has the larger one first."""
    if smallest > largest:
        raise ValueError(
            f"{where}step_sizes must be the smallest and the largest, in this order, "
            f"got ({smallest!r}, {largest!r})"
        )


# ---- a group -------------------------------------------------------------------------------------


def check_names(group: Mapping[str, Any], names: Collection[str], where: str, owner: str) -> None:
    """Raise unless a group has all of an optimizer's hyperparameters, and nothing else."""
    unknown = group.keys() - names - {"params"}
    missing = set(names) - group.keys()
    if not unknown and not missing:
        return
    what = "unknown" if unknown else "missing"
    hint = ""
    if any(is_container(group[x]) or _core.lends_memory(group[x]) for x in unknown):
        hint = (
            "; in a list, a dict with 'params' is a parameter group, and a list of models "
            "that are such dicts is given as [{'params': models}]"
        )
    raise ValueError(
        f"{where}{what} options {sorted(map(str, unknown or missing))}; "
        f"{owner} has {sorted(names)}{hint}"
    )


def without_call(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose learning rate need not be evaluated where no step follows."""
    return {**group, "lr": 0.0} if callable(group.get("lr")) else group


def own_copies(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with copies of lists and arrays, so that no two groups share one."""
    return {
        name: value if frozen(value) is value else copy.deepcopy(value)
        for name, value in options.items()
    }


# ---- all groups ----------------------------------------------------------------------------------


def as_seen(groups: list[dict[str, Any]]) -> Seen:
    """Return the keys and values of groups, to see later whether they have changed."""
    options = (value for group in groups for name, value in group.items() if name != "params")
    if any(frozen(value) is not value for value in options):
        return None  # a list or an array may change in place
    return [(tuple(group), tuple(group.values())) for group in groups]


def scheduled_groups(groups: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the groups whose learning rate is evaluated at every step."""
    return [number for number, group in enumerate(groups) if callable(group.get("lr"))]


class Hypers:
    """What a plan was last told of its groups.

    To the plan, each group is followed by another like it but without weight decay, which has the
    group's parameters that are excluded from it.
    """

    __slots__ = ("excludes", "rows", "rule", "scheduled")

    def __init__(
        self, rule: _core.Rule, excludes: bool, rows: list[list[float]], scheduled: list[int]
    ) -> None:
        self.rule = rule
        self.excludes = excludes  # whether any parameter is excluded from weight decay
        self.rows = rows
        self.scheduled = scheduled

    def plan_rows(self) -> list[list[float]]:
        """Return the rows of all groups of the plan."""
        return [row for own in self.rows for row in (own, self._without_decay(own))]

    def tell(self, plan: _core.Plan, number: int, row: list[float]) -> None:
        """Set a group's row in the plan."""
        plan.set_hypers(2 * number, row)
        if self.excludes:
            plan.set_hypers(2 * number + 1, self._without_decay(row))

    def _without_decay(self, row: list[float]) -> list[float]:
        row = row.copy()
        row[self.rule.hypers.index("weight_decay")] = 0.0
        return row
