"""PyTorch hears of what a step with gradients of rows writes to tensors."""

import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch")


def test_a_skipped_step_tells_of_rows_that_caught_up() -> None:
    table = torch.ones(4, 2)
    opt = fastopt.Adam([table], rows="exact", nonfinite="skip")
    for row in (0, 1):
        opt.step([fastopt.Rows([row], np.ones((1, 2), np.float32))])
    before, version = table.clone(), table._version
    assert opt.step([torch.full((4, 2), float("nan"))]).skipped
    assert (table != before).any()
    assert table._version > version


def test_a_step_tells_of_values_that_it_zeroes() -> None:
    table, values = torch.ones(4, 2), torch.ones(1, 2)
    version = values._version
    fastopt.SGD([table]).step([fastopt.Rows([1], values)], zero_grad=True)
    assert not values.any()
    assert values._version > version
