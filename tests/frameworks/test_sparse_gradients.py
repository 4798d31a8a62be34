"""Sparse gradients of other libraries are gradients of some rows."""

import jax
import numpy as np
import pytest
import torch
from jax.experimental.sparse import BCOO
from scipy import sparse

import fastopt
from fastopt import SGD, Adam, Rows


def one_step(grad, shape=(6, 3), dtype=np.float32, cls=SGD):
    table = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    cls([table], lr=0.5).step([grad])
    return table


@pytest.mark.parametrize("coalesced", [False, True])
def test_a_sparse_tensor_of_torch_is_rows(coalesced):
    indices, values = torch.tensor([[4, 1, 4]]), torch.arange(9.0).reshape(3, 3)
    tensor = torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)
    tensor = tensor.coalesce() if coalesced else tensor
    expected = one_step(Rows([4, 1, 4], values.numpy()))
    assert one_step(tensor).tobytes() == expected.tobytes()
    wrong = torch.sparse_coo_tensor(indices, values, (7, 3), check_invariants=True)
    with pytest.raises(ValueError, match=r"shape \(7, 3\) is not the parameter's \(6, 3\)"):
        one_step(wrong)
    by_elements = torch.sparse_coo_tensor(
        [[1, 2], [0, 1]], [1.0, 2.0], (6, 3), check_invariants=True
    )
    with pytest.raises(TypeError, match="gradient of parameter 0"):
        one_step(by_elements)


@pytest.mark.parametrize("kind", ["csr_matrix", "csr_array", "coo_matrix", "csc_matrix"])
def test_a_sparse_matrix_of_scipy_is_its_rows_that_hold_something(kind):
    dense = np.zeros((6, 3), np.float32)
    dense[4], dense[1, 2] = [1, 0, 2], 3
    matrix = getattr(sparse, kind)(dense)
    for cls in (SGD, Adam):
        expected = one_step(Rows([1, 4], dense[[1, 4]]), cls=cls)
        assert one_step(matrix, cls=cls).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"shape \(6, 3\) is not the parameter's \(7, 3\)"):
        one_step(matrix, (7, 3))


def test_rows_catch_up_when_jax_has_computed_from_them():
    """As a step does, which JAX's gradient tells of it."""
    loss = jax.jit(lambda w: sum(jax.numpy.sum(jax.numpy.sin(w * k)) for k in range(1, 40)))
    flat, _ = fastopt.flatten([np.ones(400_000, np.float32)])  # so aligned, JAX reads it in place
    table = flat.reshape(-1, 100)
    opt, seen, expected = fastopt.Adam([table], lr=0.1, rows="exact"), [], []
    for i in range(5):
        opt.step([Rows(np.arange(4000), jax.numpy.ones((4000, 100)))])
        opt.step([Rows([i], jax.numpy.ones((1, 100)))])
        before, value = table.copy(), loss(table)
        opt.refresh()
        seen.append(float(value))
        expected.append(float(loss(before)))
        assert (before != table).any()
    assert seen == expected


def test_a_bcoo_of_jax_is_rows_without_what_fills_it_up():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    indices = np.array([[4], [1], [6], [4]])  # number 6 is beyond the end
    grad = BCOO((values, indices), shape=(6, 3))
    expected = one_step(Rows([4, 1, 4], values[[0, 1, 3]]))
    assert one_step(grad).tobytes() == expected.tobytes()
