"""What projects save that write their own rules: ``taskset -c 0 python benchmarks/clients.py``

For every project of docs/embedding.md that is installed: an update, or a short training, by the
project's own code and with the call of fastopt there instead. Both begin at the same state, and
their results are first held to each other, as tests/frameworks/test_clients_*.py does. Then they
take turns. A time is the best turn's, and the ratio that of these two.

Memory is what there is at most during an update over what there was before it (tracemalloc, to
which NumPy reports), in multiples of the parameters' bytes.
"""

import argparse
import os
import sys
import tracemalloc
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fastopt import build_info, functional
from fastopt.bench.measure import Interleaved

sys.path.append(str(Path(__file__).parents[1] / "tests/frameworks/clients"))

from rounding import assert_same_step

BETAS = 0.9, 0.999
ITERATIONS = 10  # where theirs is a whole loop, of which a time is divided
levels = []  # bytes before an update, and at most since the one before


def mark():
    """Begin an update; a loop calls this from its gradient."""
    if tracemalloc.is_tracing():
        levels.append(tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()


def allocated(update):
    """Return the most that an update adds; where it is a loop, that of one in the middle."""
    tracemalloc.start()
    update()  # so that the arrays that it replaces have been seen
    levels.clear()
    mark()
    update()
    mark()
    tracemalloc.stop()
    i = len(levels) // 2
    return levels[i][1] - levels[i - 1][0]


def same_bits(ours, theirs):
    assert [a.tobytes() for a in ours] == [a.tobytes() for a in theirs]


def close(rtol, atol, ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def case(what, size, theirs, ours, check, updates=1, begin=lambda: None):
    """Two functions without arguments do the same to `size` bytes and return arrays to check."""
    return SimpleNamespace(**locals())


def draw(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def nbytes(arrays):
    return sum(a.nbytes for a in arrays)


def scikit_learn():
    import with_sklearn
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier, _multilayer_perceptron, _stochastic_optimizers

    x, y = load_digits(return_X_y=True)

    def fit(module, **options):
        for name in ("SGDOptimizer", "AdamOptimizer"):
            setattr(_multilayer_perceptron, name, getattr(module, name))
        model = MLPClassifier(max_iter=ITERATIONS, random_state=0, **options).fit(x / 16, y)
        return model.coefs_ + model.intercepts_

    def update(optimizer, params, grads):
        optimizer.update_params(params, grads)
        return params

    modules = _stochastic_optimizers, with_sklearn
    for hidden in ((100,), (400, 200)):
        sizes = 64, *hidden, 10
        shapes = [*pairwise(sizes), *((n,) for n in sizes[1:])]
        for name in ("Adam", "SGD"):
            both, grads = [], draw(shapes, float, 1)
            for module in modules:
                params = draw(shapes, float, 0)
                optimizer = getattr(module, f"{name}Optimizer")(params)
                both.append(partial(update, optimizer, params, grads))
            what = f"{name}, hidden {' and '.join(map(str, hidden))}"
            yield case(f"{what}: an update", nbytes(grads), *both, same_bits)
            options = {"hidden_layer_sizes": hidden, "solver": name.lower()}
            both = [partial(fit, module, **options) for module in modules]
            yield case(f"{what}: {ITERATIONS} epochs of fit", None, *both, same_bits)


def thinc():
    import with_thinc
    from thinc.api import NumpyOps

    def update(adam, ops, arrays):
        adam(ops, *arrays, *BETAS, 1e-8, 1e-3)
        return arrays

    for power in (5, 6):
        size = 10**power
        grad, *states = draw([size] * 2, np.float32, 1)
        states.append(np.square(states[0]))
        both = [[*draw([size], np.float32, 0), grad.copy(), *map(np.copy, states)] for _ in "ab"]

        def begin(both=both, given=(grad, *states)):
            """Fill in the gradient, which an update leaves at zero, and the moments."""
            for arrays in both:
                for a, b in zip(arrays[1:], given, strict=True):
                    a[:] = b

        theirs, ours = (
            partial(update, adam, NumpyOps(), arrays)
            for adam, arrays in zip((with_thinc.theirs, with_thinc.adam), both, strict=True)
        )
        check = partial(close, 1e-4, 1e-6)
        yield case(f"NumpyOps.adam, 1e{power} float32", grad.nbytes, theirs, ours, check, 1, begin)


def pennylane():
    import with_pennylane
    from pennylane import AdamOptimizer
    from pennylane import numpy as pnp

    w, g = draw([100] * 2, float, 0)
    args = [pnp.array(w, requires_grad=True)]
    theirs, ours = (
        partial(function, AdamOptimizer(), [g], args)
        for function in (AdamOptimizer.apply_grad, with_pennylane.adam_apply_grad)
    )
    check = partial(close, 1e-11, 0)
    yield case("AdamOptimizer.apply_grad, 100 float64", w.nbytes, theirs, ours, check)


def flower():
    from flwr.app import ArrayRecord
    from flwr.common import Array
    from flwr.serverapp.strategy import FedAvg, fedadagrad, fedadam

    def aggregate(self, module, server_round):
        """What theirs does between the mean of the clients' models and the new model."""
        record, metrics = FedAvg.aggregate_train(self, server_round, [])
        model = self.current_arrays
        deltas = [record[k].numpy() - x for k, x in model.items()]
        arrays, m, v = [[*of.values()] for of in (model, self.m_t, self.v_t)]
        if module is fedadam:
            step, betas = server_round + 1, (self.beta_1, self.beta_2)
            options = {"step": step, "betas": betas, "eps": self.tau, "eps_hat": True}
            functional.adam(arrays, deltas, m, v, lr=-self.eta, **options)
        else:
            functional.adagrad(arrays, deltas, v, lr=-self.eta, eps=self.tau)
        return module.ArrayRecord({k: module.Array(x) for k, x in model.items()}), metrics

    def update(function):
        record, _ = function()
        return [x.numpy() if isinstance(x, Array) else x for x in record.values()]

    shapes, check = [(500, 500)] * 8, partial(close, 1e-4, 1e-6)
    sent = {str(i): x for i, x in enumerate(draw(shapes, np.float32, 1))}
    for encoded in (True, False):
        if encoded:
            record = ArrayRecord({k: Array(x) for k, x in sent.items()})
        else:  # the rule by itself
            record = {k: SimpleNamespace(numpy=partial(np.asarray, x)) for k, x in sent.items()}
            for module in (fedadagrad, fedadam):
                module.ArrayRecord, module.Array = dict, np.asarray
        FedAvg.aggregate_train = lambda *_, record=record: (record, None)
        for module, name in ((fedadam, "FedAdam"), (fedadagrad, "FedAdagrad")):
            theirs, own = getattr(module, name)(), getattr(module, name)()
            for strategy in (theirs, own):
                model = draw(shapes, np.float32, 0)
                strategy.current_arrays = dict(zip(sent, model, strict=True))
                strategy.m_t, strategy.v_t = (
                    {k: np.zeros_like(x) for k, x in sent.items()} for _ in "mv"
                )
            theirs = partial(update, partial(theirs.aggregate_train, 1, []))
            ours = partial(update, partial(aggregate, own, module, 1))
            what = f"{name}, 2e6 float32: {'a round' if encoded else 'the rule'}"
            yield case(what, nbytes(sent.values()), theirs, ours, check)


def autograd():
    from autograd.misc import optimizers

    @optimizers.unflatten_optimizer
    def adam(grad, x, callback=None, num_iters=100, step_size=0.001, eps=10**-8):
        x, m, v = x.copy(), np.zeros(len(x)), np.zeros(len(x))
        for i in range(num_iters):
            g = grad(x, i)
            functional.adam(x, g, m, v, step=i + 1, lr=step_size, betas=BETAS, eps=eps)
        return x

    start, g = draw([10**5] * 2, float, 0)

    def slope(*_):
        mark()
        return g

    theirs, ours = (
        lambda run=run: [run(slope, start, num_iters=ITERATIONS)] for run in (optimizers.adam, adam)
    )
    check = partial(close, 1e-10, 1e-12)
    yield case("adam, 1e5 float64: an iteration", g.nbytes, theirs, ours, check, ITERATIONS)


def qiskit_algorithms():
    from qiskit_algorithms.optimizers import ADAM

    def minimize(self, fun, x0, jac):
        """Step back and forth between two arrays, as theirs compares a point with the last."""
        params, new = x0.copy(), np.empty_like(x0)
        m, v = np.zeros_like(x0), np.zeros_like(x0)
        options = {"lr": self._lr, "betas": (self._beta_1, self._beta_2)}
        options |= {"eps": self._noise_factor, "eps_hat": True}
        for t in range(1, self._maxiter + 1):
            functional.adam(params, jac(params), m, v, step=t, out=(new, m, v), **options)
            if np.linalg.norm(params - new) < self._tol:
                break
            params, new = new, params
        return SimpleNamespace(x=params, fun=fun(params), nfev=t)

    start, g = draw([1000] * 2, float, 0)

    def slope(_):
        mark()
        return g

    theirs, ours = (
        lambda run=run: [run(ADAM(ITERATIONS), lambda x: 0.0, start, jac=slope).x]
        for run in (ADAM.minimize, minimize)
    )
    check = partial(close, 1e-10, 1e-12)
    yield case("ADAM, 1e3 float64: an iteration", g.nbytes, theirs, ours, check, ITERATIONS)


def quri_parts():
    from quri_parts.algo.optimizer import Adam, OptimizerStatus
    from quri_parts.core.utils.array import readonly_array

    class OnFastopt(Adam):
        def step(self, state, cost_function, grad_function):
            t = state.niter + 1
            before = cost_function(state.params) if t == 1 else state.cost
            new = tuple(np.empty_like(a) for a in (state.params, state.m, state.v))
            given = state.params, grad_function(state.params), state.m, state.v
            options = {"lr": self._lr, "betas": self._betas, "eps": self._eps}
            functional.adam(*given, step=t, **options, out=new)
            params, m, v = map(readonly_array, new)
            cost = cost_function(params)
            converged = self._ftol and self._ftol(cost, before)
            return replace(
                state,
                params=params,
                cost=cost,
                status=OptimizerStatus.CONVERGED if converged else OptimizerStatus.SUCCESS,
                niter=t,
                funcalls=state.funcalls + 1 + (t == 1),
                gradcalls=state.gradcalls + 1,
                m=m,
                v=v,
            )

    start, g = draw([1000] * 2, float, 0)
    g = readonly_array(g)

    def update(optimizer, state):
        return [optimizer.step(state, lambda x: 0.0, lambda x: g).params]

    theirs, ours = (partial(update, o, o.get_init_state(start)) for o in (Adam(), OnFastopt()))

    def check(ours, theirs):
        assert_same_step(ours[0], theirs[0], start, *BETAS)

    yield case("Adam.step, 1e3 float64", g.nbytes, theirs, ours, check)


def tequila():
    from tequila.optimizers.optimizer_gd import OptimizerGD

    def adam(self, gradients, step, v, moments, active_keys, **kwargs):
        grads = gradients(v, samples=self.samples)
        given = np.array([v[k] for k in active_keys]), grads, *moments
        new = tuple(np.empty_like(grads) for _ in range(3))  # theirs keeps all moments
        options = {"betas": (self.beta, self.rho), "eps": self.epsilon}
        functional.adam(*given, step=step + 1, lr=self.nextLearningRate(), **options, out=new)
        return dict(zip(active_keys, new[0], strict=True)), [*new[1:]], grads

    start, g = draw([1000] * 2, float, 0)
    point, optimizer = dict(enumerate(start)), OptimizerGD(method="adam")
    moments = [np.zeros(1000), np.zeros(1000)]

    def update(method):
        new, _, _ = method(optimizer, lambda *_, **__: g, 0, point, moments, point.keys())
        return new

    def check(ours, theirs):
        ours, theirs = (np.array([*values.values()]) for values in (ours, theirs))
        assert_same_step(ours, theirs, start, *BETAS)

    both = [partial(update, method) for method in (OptimizerGD._adam, adam)]
    yield case("OptimizerGD, Adam, 1e3 float64", g.nbytes, *both, check)


def t_sne():
    from sklearn.manifold import _t_sne

    def descend(objective, p, it, max_iter, momentum, learning_rate, min_gain, **_):
        p = p.copy()
        update, gains = np.zeros_like(p), np.ones_like(p)
        for _ in range(it, max_iter):
            _, grad = objective(p)
            inc = update * grad < 0.0  # the gains are theirs
            dec = np.invert(inc)
            gains[inc] += 0.2
            gains[dec] *= 0.8
            np.clip(gains, min_gain, np.inf, out=gains)
            grad *= gains
            functional.sgd(p, grad, update, lr=learning_rate, momentum=momentum, velocity=True)
        return p, 0.0, max_iter

    start, scale = draw([20000] * 2, np.float32, 0)
    scale = np.abs(scale)
    options = {"momentum": 0.8, "learning_rate": 0.5, "min_gain": 0.01, "n_iter_check": 1000}

    def objective(p, **_):
        mark()
        return 0.0, scale * p

    theirs, ours = (
        lambda run=run: [run(objective, start, 0, ITERATIONS, **options)[0]]
        for run in (_t_sne._gradient_descent, descend)
    )
    what = "_gradient_descent, 2e4 float32: an iteration"
    yield case(what, start.nbytes, theirs, ours, same_bits, ITERATIONS)


PROJECTS = {
    "scikit-learn": scikit_learn,
    "thinc": thinc,
    "PennyLane": pennylane,
    "Flower": flower,
    "autograd": autograd,
    "qiskit-algorithms": qiskit_algorithms,
    "quri-parts": quri_parts,
    "tequila": tequila,
    "t-SNE": t_sne,
}


def shown(seconds):
    unit, factor = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{seconds * factor:.{1 if seconds * factor < 100 else 0}f} {unit}"


def row(one, rounds):
    """Check and measure a case; return what the table tells of it."""
    both = {"theirs": one.theirs, "ours": one.ours}
    one.begin()
    results = {name: run() for name, run in both.items()}
    one.check(results["ours"], results["theirs"])
    del results
    interleaved = Interleaved(
        {name: SimpleNamespace(begin=one.begin, step=run) for name, run in both.items()}
    )
    for _ in range(rounds):
        interleaved.round()
    before, after = (interleaved.timing(name).best / one.updates for name in both)
    memory = [f"{allocated(run) / one.size:.1f}" if one.size else "" for run in both.values()]
    return shown(before), shown(after), f"{before / after:.2f}", *memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="(20)")
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # of trainings so short
    # glibc, once it has taken back so much, gives no smaller array's memory back to the system:
    # temporaries are then as cheap as they can be, whatever ran before.
    np.empty(31 << 20, np.uint8)
    isa, processors = build_info()["isa"]["active"], len(os.sched_getaffinity(0))
    print(
        f"{isa}, processors: {processors}, NumPy {np.__version__}, load {os.getloadavg()[0]:.1f}\n"
    )
    widths = 17, 44, 8, 8, 5, 13, 12
    columns = "| " + " | ".join(f"{{:<{width}}}" for width in widths) + " |"
    head = "project", "what", "before", "after", "ratio", "memory before", "memory after"
    print(columns.format(*head), "|".join(["", *("-" * (w + 2) for w in widths), ""]), sep="\n")
    for project, cases in PROJECTS.items():
        try:
            for one in cases():
                print(columns.format(project, one.what, *row(one, args.rounds)), flush=True)
        except ModuleNotFoundError as error:
            print(f"{project}: no module {error.name}")


if __name__ == "__main__":
    main()
