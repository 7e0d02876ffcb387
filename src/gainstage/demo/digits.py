"""The data of the demonstration: handwritten digits that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gainstage.errors import InputError

_TRAINED = 1437  # four in five of the 1797


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images [N, 1, 8, 8] of mean 0 and variance 1 over the training set, and their labels [N]."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits() -> Digits:
    """Optical recognition of handwritten digits (E. Alpaydin, C. Kaynak 1998), as it comes with scikit-learn.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InputError("The demonstration trains on data of scikit-learn: pip install 'gainstage[demo]'.") from error
    bunch = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.from_numpy(bunch.images[order]).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target[order]).long()
    seen = images[:_TRAINED]
    images = (images - seen.mean()) / seen.std()
    return Digits(
        images=images[:_TRAINED], labels=labels[:_TRAINED], test_images=images[_TRAINED:], test_labels=labels[_TRAINED:]
    )
