"""Rows are bound anew at each step, whatever the step before had at their address."""

import numpy as np
import pytest

import fastopt
from fastopt import functional

WHERE = [3, 0, 3, 3]  # as many as the table has rows
ONCE = np.array([-1.0, 0, 0, -3])


def test_values_in_the_memory_of_the_last_step_are_still_of_rows() -> None:
    table, values = np.zeros((4, 2)), np.ones((4, 2))
    opt = fastopt.SGD([table], lr=1.0)
    for _ in range(3):
        opt.step([fastopt.Rows(WHERE, values)])
    assert (table == 3 * ONCE[:, np.newaxis]).all()


def test_rows_in_the_memory_of_a_gradient_of_all_elements_are_of_rows() -> None:
    table, values = np.zeros((4, 2)), np.ones((4, 2))
    opt = fastopt.SGD([table], lr=1.0)
    opt.step([values])
    opt.step([fastopt.Rows(WHERE, values)])
    opt.step([values])
    assert (table == ONCE[:, np.newaxis] - 2).all()


def test_a_gradient_is_checked_that_begins_where_values_of_rows_began() -> None:
    memory = np.zeros(16)
    table, grad = memory[8:].reshape(4, 2), memory[4:12].reshape(4, 2)
    opt = fastopt.SGD([table], lr=1.0)
    opt.step([fastopt.Rows([0, 1], grad[:2])])
    with pytest.raises(ValueError, match="overlaps"):
        opt.step([grad])
    functional.sgd(table, grad[:2], lr=1.0, indices=[0, 1])
    with pytest.raises(ValueError, match="overlaps"):
        functional.sgd(table, grad, lr=1.0)


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        (np.zeros((3, 2000), np.int64), ValueError, r"indices: expected one axis, got .*2000"),
        (np.array([0.5, 1.7, 2.9]), TypeError, "indices: expected integers, got dtype float64"),
        (np.arange(4), ValueError, r"values of shape \(3, 2\), not \(4, 2\)"),
    ],
)
def test_indices_that_were_replaced_are_checked(
    indices: np.ndarray, error: type[Exception], match: str
) -> None:
    table = np.zeros((4, 2))
    opt = fastopt.SGD([table], lr=1.0)
    rows = fastopt.Rows([0, 1, 2], np.ones((3, 2)))
    rows.indices = indices
    with pytest.raises(error, match="gradient of parameter 0: " + match):
        opt.step([rows])
    assert not table.any()


@pytest.mark.parametrize("rows", ["lazy", "exact"])
@pytest.mark.parametrize("bad", [-1, 4, 2**63])
def test_refresh_names_a_row_that_does_not_exist_even_if_none_is_behind(
    rows: str, bad: int
) -> None:
    table = np.zeros((4, 2))
    opt = fastopt.Adam([table], rows=rows)
    with pytest.raises(ValueError, match=rf"rows\[1\] is {bad}, not the number of a row.* 0 to 3"):
        opt.refresh(table, np.array([0, bad], np.uint64 if bad > 4 else np.int64))


def test_no_step_zeroes_a_copy_of_a_sparse_matrix_in_place_of_it() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    table = np.zeros((4, 2))
    opt = fastopt.SGD([table], lr=1.0)
    with pytest.raises(ValueError, match="read-only, and zero_grad=True"):
        opt.step([sparse.csr_matrix(np.eye(4, 2))], zero_grad=True)
    assert not table.any()
