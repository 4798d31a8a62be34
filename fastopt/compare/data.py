"""The data of the comparison: scikit-learn's bundled handwritten digits, split once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Images of shape ``(samples, 64)``, float32 in [0, 1], and their labels 0 to 9."""

    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.intp]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.intp]


def load(seed: int) -> Digits:
    """Load the 1797 digits and split them, a fifth for the test, each digit in proportion.

    Parameters
    ----------
    seed : int
        Chooses the split, 0 to 2**32 - 1. Nothing is downloaded.

    Returns
    -------
    Digits
        1437 training and 360 test samples.
    """
    pixels, labels = load_digits(return_X_y=True)  # 8x8 images, pixel values 0 to 16
    x_train, x_test, y_train, y_test = train_test_split(
        (pixels / 16).astype(np.float32),
        labels.astype(np.intp),
        test_size=0.2,
        stratify=labels,
        random_state=seed,
    )
    return Digits(x_train, y_train, x_test, y_test)
