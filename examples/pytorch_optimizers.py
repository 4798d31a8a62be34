"""PyTorch's optimizers on handwritten digits: the training loop of every tutorial.

    python examples/pytorch_optimizers.py                      with fastopt's kernels
    python examples/pytorch_optimizers.py --backend torch      with PyTorch's own
    python examples/pytorch_optimizers.py --check              both ways, from the same weights

The one line that differs is the import. The digits are scikit-learn's (1797 images of 8 by 8).
"""

import argparse
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BACKENDS = ("torch", "fastopt")

OPTIMIZERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Adam": {"lr": 0.001},
    "Adagrad": {"lr": 0.01},
    "RMSprop": {"lr": 0.01},
}

# In ulps of the largest weight. After a hundred steps on the same gradients, PyTorch itself stands
# up to 30 of them from the exact result; here each difference is in the next gradients, too.
TOLERANCE = 64


def digits():
    """Return the images, with values from 0 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)
    )


def epochs_of(backend, name, dataset, epochs):
    """Train; yield loss and weights after every epoch."""
    if backend == "torch":
        import torch.optim as optim
    else:
        import fastopt.torch as optim

    torch.manual_seed(0)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_size=32, shuffle=True, generator=order)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = getattr(optim, name)(model.parameters(), **OPTIMIZERS[name])

    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        yield total / len(dataset), [param.detach().clone() for param in model.parameters()]


def train(backend, name, dataset, epochs):
    """Train one way."""
    print(f"{name} ({backend})")
    for epoch, (loss, _) in enumerate(epochs_of(backend, name, dataset, epochs), 1):
        print(f"Epoch [{epoch}/{epochs}], Loss: {loss:.4f}")


def check(name, dataset, epochs):
    """Train both ways; tell whether they agree."""
    print(name)
    agree = True
    both = [epochs_of(backend, name, dataset, epochs) for backend in BACKENDS]
    for epoch in range(1, epochs + 1):
        (loss, weights), (other, others) = map(next, both)
        gap = max(abs(a - b).max().item() for a, b in zip(weights, others, strict=True))
        ulp = torch.finfo(torch.float32).eps * max(a.abs().max().item() for a in weights)
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

    dataset = digits()
    agree = True
    for name in [args.optimizer] if args.optimizer else OPTIMIZERS:
        if args.check:
            agree &= check(name, dataset, args.epochs)
        else:
            train(args.backend, name, dataset, args.epochs)
    if not agree:
        sys.exit("the two ways of training do not agree")


if __name__ == "__main__":
    main()
