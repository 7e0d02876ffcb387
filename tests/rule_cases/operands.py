"""Operands that many cases share, by what they are: every one has a mean and something in common along each axis."""

import torch

from gainstage import testing
from gainstage.signal import apply
from gainstage.testing import correlated, positive

TOKENS = correlated((4, 6, 5), mean=0.3, shares={(0, 1): 0.2, (2,): 0.15, (0,): 0.1})
MORE_TOKENS = correlated((4, 6, 5), mean=-0.2, std=0.7, shares={(0, 2): 0.3})
CENTRED = correlated((4, 6, 5), shares={(0, 1): 0.2, (2,): 0.15})
AMOUNTS = apply(torch.exp, correlated((4, 6, 5), mean=0.2, std=0.4, shares={(0, 1): 0.2, (2,): 0.15}))
RECTIFIED = positive(CENTRED)
ROW = testing.entries(5, mean=0.4, std=0.6)
MAP = correlated((3, 4, 7, 7), mean=0.2, shares={(0, 1): 0.2, (0, 2, 3): 0.15, (1,): 0.1})
LINE = correlated((3, 4, 9), mean=0.2, shares={(0, 1): 0.2, (1,): 0.1})
VOLUME = correlated((2, 4, 4, 5, 4), mean=0.2, shares={(0, 1): 0.2})
