"""fastopt.keras beside Keras's own optimizers: the time of ``apply()``.

    [KERAS_BACKEND=torch] python benchmarks/adapter_keras.py [--classes Adam ...] [--most 1e7]
    python benchmarks/adapter_keras.py --table 200_000 64 1024 [--classes Adam ...]

On TensorFlow eagerly, in a traced function, and, for Keras alone, in one that XLA compiles; on
PyTorch eagerly. Float32, a number of variables of one size. All are timed in turns, in one process,
after a few steps that must give the same numbers; what is reported is the median turn.

With ``--table``, on TensorFlow alone, the variable is a table of so many rows of such a width; a
turn looks some of them up, no two the same, and has a sparse gradient of these.
"""

import argparse

import keras
import numpy as np
from turns import medians

import fastopt
import fastopt.keras

CLASSES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
CASES = [(2, 100), (6, 1000), (10, 100), (100, 100), (10, 10_000), (4, 1_000_000), (1, 10_000_000)]
BACKEND = keras.backend.backend()


def make(module, name, count, size, how):
    """Return the variables of an optimizer, and its step."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size, np.float32) for _ in range(2 * count)]
    tensors = [keras.ops.copy(array) for array in arrays]  # in memory of the backend's own
    variables, grads = [keras.Variable(t) for t in tensors[:count]], tensors[count:]
    opt = getattr(module, name)()
    opt.build(variables)

    def step():
        opt.apply(grads, variables)

    if how != "eager":
        import tensorflow as tf

        step = tf.function(step, jit_compile=how == "compiled")
    return variables, step


def candidates(name, count, size):
    """Return the steps, by who and how, after some that gave the same numbers."""
    ways = ["eager"] if BACKEND == "torch" else ["eager", "traced", "compiled"]
    made = {("Keras", how): make(keras.optimizers, name, count, size, how) for how in ways}
    made |= {("fastopt", how): make(fastopt.keras, name, count, size, how) for how in ways[:2]}
    for _, step in made.values():
        for _ in range(4):
            step()
    expected = made["Keras", "eager"][0]
    for who, (variables, _) in made.items():
        for variable, right in zip(variables, expected, strict=True):
            got, right = (keras.ops.convert_to_numpy(v.value) for v in (variable, right))
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6, err_msg=f"{name}, {who}")
    return {key: step for key, (_, step) in made.items()}


def look_ups(name, rows, width, looked_up):
    """Return the same for steps with a sparse gradient, each after a look-up."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    first = rng.standard_normal((rows, width), np.float32)
    numbers = tf.constant(rng.permutation(rows)[:looked_up])
    grads = tf.constant(rng.standard_normal((looked_up, width), np.float32))

    def make(module, options, how):
        table, opt = keras.Variable(first), getattr(module, name)(**options)
        opt.build([table])

        def step():
            found = tf.reduce_sum(keras.ops.take(table, numbers, axis=0))
            opt.apply([tf.IndexedSlices(grads, numbers, tf.constant((rows, width)))], [table])
            return found

        return table, tf.function(step) if how == "traced" else step

    made = {
        (who, how): make(module, options, how)
        for who, module, options in (
            ("Keras", keras.optimizers, {}),
            ("fastopt", fastopt.keras, {}),
            ("lazily", fastopt.keras, {"rows": "lazy"}),
        )
        for how in ("eager", "traced")
    }
    for _, step in made.values():
        for _ in range(4):
            step()
    expected = keras.ops.take(made["Keras", "eager"][0], numbers, axis=0)
    for (who, _), (table, _) in made.items():  # these rows are in each step, so lazily too
        got = keras.ops.take(table, numbers, axis=0)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=f"{name}, {who}")
    return {key: step for key, (_, step) in made.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", nargs="+", choices=CLASSES, default=["Adam", "SGD"])
    parser.add_argument("--most", type=float, default=1e7, help="elements (1e7)")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each row")
    parser.add_argument("--table", nargs=3, type=int, metavar=("ROWS", "WIDTH", "LOOKED_UP"))
    args = parser.parse_args()

    print(f"Keras {keras.__version__} on {BACKEND}, fastopt {fastopt.build_info()}; microseconds")
    for name in args.classes:
        cases = [case for case in CASES if case[0] * case[1] <= args.most]
        for case in [args.table] if args.table else cases:
            steps = (look_ups if args.table else candidates)(name, *case)
            found = zip(steps, medians(list(steps.values()), args.budget), strict=True)
            columns = [f"{who} {how} {s * 1e6:,.0f}" for (who, how), s in found]
            print(f"{name} {' x '.join(map(str, case))}: {'; '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
