"""Keras's optimizers on handwritten digits: the training loop of every TensorFlow tutorial.

    python examples/tensorflow_optimizers.py                      with fastopt's kernels
    python examples/tensorflow_optimizers.py --backend keras      with Keras's own
    python examples/tensorflow_optimizers.py --check              both ways, from the same weights

The one line that differs is the import. The digits are scikit-learn's (1797 images of 8 by 8).
"""

import argparse
import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

BACKENDS = ("keras", "fastopt")

OPTIMIZERS = {
    "SGD": ("SGD", {"learning_rate": 0.001}),
    "Momentum": ("SGD", {"learning_rate": 0.001, "momentum": 0.9}),
    "Adagrad": ("Adagrad", {"learning_rate": 0.001}),
    "RMSprop": ("RMSprop", {"learning_rate": 0.001}),
    "Adam": ("Adam", {"learning_rate": 0.001}),
}

# In ulps of the largest weight. On the same gradients fastopt stays within 16 ulps of Keras; here
# each difference finds its way into the next gradients too.
TOLERANCE = 64


def digits():
    """Return the images, with values from 0 to 1, and their labels, in batches."""
    images, labels = load_digits(return_X_y=True)
    dataset = tf.data.Dataset.from_tensor_slices(((images / 16).astype(np.float32), labels))
    return dataset.shuffle(len(labels), seed=0).batch(32), len(labels)


def epochs_of(backend, name, epochs):
    """Train; yield loss and weights after every epoch."""
    if backend == "keras":
        from keras import optimizers
    else:
        import fastopt.keras as optimizers

    keras.utils.set_random_seed(0)
    dataset, size = digits()
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    cls, options = OPTIMIZERS[name]
    optimizer = getattr(optimizers, cls)(**options)

    for _ in range(epochs):
        total = 0.0
        for images, labels in dataset:
            with tf.GradientTape() as tape:
                loss = loss_fn(labels, model(images, training=True))
            grads = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
            total += float(loss) * len(labels)
        yield total / size, model.get_weights()


def train(backend, name, epochs):
    """Train one way."""
    print(f"{name} ({backend})")
    for epoch, (loss, _) in enumerate(epochs_of(backend, name, epochs), 1):
        print(f"Epoch [{epoch}/{epochs}], Loss: {loss:.4f}")


def check(name, epochs):
    """Train both ways; tell whether they agree."""
    print(name)
    agree = True
    both = [epochs_of(backend, name, epochs) for backend in BACKENDS]
    for epoch in range(1, epochs + 1):
        (loss, weights), (other, others) = map(next, both)
        gap = max(float(np.abs(a - b).max()) for a, b in zip(weights, others, strict=True))
        ulp = float(np.finfo(np.float32).eps * max(np.abs(a).max() for a in weights))
        agree &= f"{loss:.4f}" == f"{other:.4f}" and gap <= TOLERANCE * ulp
        print(
            f"Epoch [{epoch}/{epochs}], Loss: {loss:.4f} and {other:.4f}, largest difference: "
            f"loss {abs(loss - other):.1e}, weights {gap:.1e} ({gap / ulp:.1f} ulp)"
        )
    return agree


def main():
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, default="fastopt")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="one of them; otherwise, each")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="train both ways, and compare")
    args = parser.parse_args()

    agree = True
    for name in [args.optimizer] if args.optimizer else OPTIMIZERS:
        if args.check:
            agree &= check(name, args.epochs)
        else:
            train(args.backend, name, args.epochs)
    if not agree:
        sys.exit("the two ways of training do not agree")


if __name__ == "__main__":
    main()
