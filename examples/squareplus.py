"""squareplus(x) = (x + sqrt(x^2 + 4)) / 2, a smooth ReLU without an exponential (Barron, 2021).

    deepspeed train.py --exp examples/squareplus.py:Squareplus

An activation: its formula and derivative in torch, and the same as the code that the fused kernels compile.
"""

import torch

from kernels.activations import Activation, tl
from march.experiments import Experiment


def formula(x):
    return (x + torch.sqrt(x * x + 4)) / 2


def backward(d_out, x):
    return d_out * (1 + x / torch.sqrt(x * x + 4)) / 2


def value(a):
    return 0.5 * (a + tl.sqrt(a * a + 4.0))


def slope(a):
    return 0.5 * (1.0 + a / tl.sqrt(a * a + 4.0))


Squareplus = Experiment(
    "Squareplus",
    base="Baseline",
    changes={},
    control="Baseline",
    hypothesis="A gradient everywhere is worth more than exact zeros.",
    parts={"activation": Activation(formula, backward, value, slope)},
)
