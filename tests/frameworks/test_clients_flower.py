"""What Flower's servers compute, and the calls of fastopt that compute it."""

import warnings

import numpy as np
import pytest

with warnings.catch_warnings(action="ignore"):  # what its own imports warn of
    from flwr.app import ArrayRecord
    from flwr.common import Array
    from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg

from fastopt import functional

SHAPES = {"w": (30, 7), "b": (7,), "scale": ()}


def models(dtype):
    rng = np.random.default_rng(0)
    while True:
        yield {k: np.asarray(rng.standard_normal(shape), dtype) for k, shape in SHAPES.items()}


def rounds(monkeypatch, strategy, dtype):
    """Yield for some rounds the number, what clients sent, and the strategy's new model."""
    draw = models(dtype)
    strategy.current_arrays = next(draw)
    for number in range(1, 6):
        sent = next(draw)
        record = ArrayRecord({k: Array(x) for k, x in sent.items()})
        monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_, record=record: (record, None))
        before = {k: x.copy() for k, x in strategy.current_arrays.items()}
        after, _ = strategy.aggregate_train(number, [])
        after = {k: x.numpy() for k, x in after.items()}
        yield number, before, sent, after
        strategy.current_arrays = {k: x.astype(dtype) for k, x in after.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adam_on_the_server(monkeypatch, dtype):
    strategy = FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    m, v = ({k: np.zeros(shape, dtype) for k, shape in SHAPES.items()} for _ in range(2))
    for number, model, sent, after in rounds(monkeypatch, strategy, dtype):
        delta = [np.asarray(sent[k] - model[k]) for k in SHAPES]
        functional.adam(
            [*model.values()],
            delta,
            [*m.values()],
            [*v.values()],
            step=number + 1,  # theirs corrects the first round as the second step
            lr=-0.1,  # up, towards what the clients found
            betas=(0.9, 0.99),
            eps=1e-3,
            eps_hat=True,
        )
        for k in SHAPES:
            assert model[k].dtype == m[k].dtype == dtype
            rtol = 1e-12 if dtype == np.float64 else 1e-4
            np.testing.assert_allclose(model[k], after[k], rtol=rtol, atol=rtol / 100)
            np.testing.assert_allclose(m[k], strategy.m_t[k], rtol=rtol, atol=rtol / 100)
            np.testing.assert_allclose(v[k], strategy.v_t[k], rtol=rtol, atol=rtol / 100)


def test_adagrad_on_the_server_to_the_bit(monkeypatch):
    strategy = FedAdagrad(eta=0.1, tau=1e-3)
    sums = {k: np.zeros(shape) for k, shape in SHAPES.items()}
    for _, model, sent, after in rounds(monkeypatch, strategy, np.float64):
        delta = [np.asarray(sent[k] - model[k]) for k in SHAPES]
        functional.adagrad([*model.values()], delta, [*sums.values()], lr=-0.1, eps=1e-3)
        for k in SHAPES:
            assert model[k].tobytes() == after[k].tobytes()
            assert sums[k].tobytes() == np.asarray(strategy.v_t[k]).tobytes()
