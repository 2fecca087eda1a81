"""Ideas with one fault each, as a user writes them; FAULTS says which question of `march check` finds it."""

import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels.activations import Activation, tl
from march.experiments import Experiment
from march.model import Block, CrossAttention, Dropout, FeedForward, Norm, SelfAttention
from march.model.init import ones

FAULTS: dict[str, str] = {}


def idea(question, place="feedforward"):
    """Declares the class or activation below as an experiment whose fault `question` finds."""

    def declare(part, name=None):
        name = name or part.__name__
        globals()[f"Own{name}"] = Experiment(name, "Baseline", {}, "Baseline", question, parts={place: part})
        FAULTS[f"Own{name}"] = question
        return part

    return declare


def changed(question, change, stack=None, gate=None):
    """A feedforward whose input is changed by `change(self, z, ctx)`, in a stack or both; gate: a parameter's rule."""

    def declare(name):
        def __init__(self, config, block):
            FeedForward.__init__(self, config, block)
            self.stack = block.stack
            if gate is not None:
                self.gate, self.init_rules = nn.Parameter(torch.empty(())), {"gate": gate}

        def forward(self, z, ctx):
            return FeedForward.forward(self, change(self, z, ctx) if stack in (None, self.stack) else z, ctx)

        idea(question)(type(name, (FeedForward,), {"__init__": __init__, "forward": forward}))

    return declare


# --- what later tokens reach
@idea("future tokens", "self_attention")
class LooseMask(SelfAttention):
    def options(self, ctx):
        return super().options(ctx) | {"causal": False}


def blockwise(self, z, ctx):
    padded = F.pad(z, (0, 0, 0, -z.shape[1] % 128)).unflatten(1, (-1, 128))
    return padded.cumsum(2).flip(2).flatten(1, 2)[:, : z.shape[1]] if z.shape[1] > 128 else z


changed("future tokens", lambda self, z, ctx: z - z.mean(1, keepdim=True), "decoder")("CentredPositions")
changed("future tokens", lambda self, z, ctx: z + z.roll(-1, 1) if self.training else z, "decoder")("NextInTraining")
changed("future tokens", lambda self, z, ctx: z + z.roll(-1, 1) if z.shape[1] > 16 else z, "decoder")("NextBeyond16")
changed("future tokens", blockwise, "decoder")("ReversedBlocks")
changed("future tokens", lambda self, z, ctx: torch.cat([z[:, :1] + 1e-3 * z[:, -1:], z[:, 1:]], 1), "decoder")(
    "FirstSeesLast"
)
changed("future tokens", lambda self, z, ctx: z + self.gate * z.flip(1), "decoder", gate=lambda x, g: x.zero_())(
    "Gated"
)

changed("future tokens", lambda self, z, ctx: z * (1 + 1 / z.shape[1]), "decoder")("CountsPositions")
KEPT: dict = {}
changed("future tokens", lambda self, z, ctx: z + KEPT.setdefault(z.shape, z.detach()), "decoder")("KeptByShape")


# --- what padding reaches
@idea("padding", "cross_attention")
class ReadsPadding(CrossAttention):
    def attend(self, q, ctx):
        mask, ctx.key_mask = ctx.key_mask, None
        mixed = super().attend(q, ctx)
        ctx.key_mask = mask
        return mixed


changed("padding", lambda self, z, ctx: z + z.mean(1, keepdim=True), "encoder")("PooledPadding")
changed("padding", lambda self, z, ctx: z * (1 + 1 / z.shape[1]), "encoder")("CountsPadding")
changed("padding", lambda self, z, ctx: z + z.roll(1, 1) if z.shape[1] > 256 else z, "encoder")("NeighbourBeyond256")
changed("padding", lambda self, z, ctx: z + z.amax((1, 2), keepdim=True) if self.training else z, "encoder")(
    "MaxTraining"
)

# --- what other sequences reach
changed("other sequences", lambda self, z, ctx: z - z.mean(0, keepdim=True))("CentredBatch")
changed("other sequences", lambda self, z, ctx: z / z.std() if self.training else z)("BatchStatistics")
changed("other sequences", lambda self, z, ctx: z + z.roll(1, 0) if len(z) > 4 else z, "encoder")("RolledBatch")
changed("other sequences", lambda self, z, ctx: z / len(z) ** 0.5)("CountsSequences")

# --- numbers from elsewhere
changed("generators", lambda self, z, ctx: F.dropout(z, 0.1, self.training))("TorchDropout")
changed("generators", lambda self, z, ctx: z + 0.01 * torch.randn_like(z))("Noise")
changed("generators", lambda self, z, ctx: z * (1 + 0.1 * np.random.rand()))("NumpyNoise")  # noqa: NPY002
changed("generators", lambda self, z, ctx: z * (1 + 0.1 * random.random()), "decoder")("PythonNoise")
changed("generators", lambda self, z, ctx: z * (1 + time.perf_counter_ns() % 97 / 97))("Clock")
changed("generators", lambda self, z, ctx: z * np.random.default_rng().random())("FreshGenerator")

# --- dropout
changed("dropout", lambda self, z, ctx: self.hidden_dropout.drop(z, ctx))("OneMaskTwice")
changed("dropout", lambda self, z, ctx: z * 1.1 if self.training else z)("ScaledInTraining")


@idea("dropout", "block")
class DroppedByNobody(Block):
    places: tuple = (Dropout(0.5), Dropout(0.5))

    def forward(self, stream, ctx):
        for place in self.places:
            place.dropout_id = 5
        stream = super().forward(stream, ctx)
        stream.x = self.places[1].drop(self.places[0].drop(stream.x, ctx), ctx)
        return stream


# --- state
class Remembering(FeedForward):
    def __init__(self, config, block):
        super().__init__(config, block)
        self.register_buffer("mean", torch.zeros(()))
        self.seen = 0


@idea("state")
class RunningMean(Remembering):
    def forward(self, z, ctx):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * z.detach().mean()
        return super().forward(z - self.mean, ctx)


@idea("state")
class Warmup(Remembering):
    def forward(self, z, ctx):
        self.seen += self.training
        return super().forward(z * (1 + 1 / (1 + self.seen)), ctx)


@idea("state")
class LateParameter(FeedForward):
    def forward(self, z, ctx):
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.ones(z.shape[-1], dtype=z.dtype))
        return super().forward(z * self.late.to(z.dtype), ctx)


@idea("state")
class ListedModules(FeedForward):
    def __init__(self, config, block):
        super().__init__(config, block)
        self.more = [nn.Linear(config.dim_model, config.dim_model, dtype=torch.float64)]

    def forward(self, z, ctx):
        return super().forward(self.more[0](z.double()).to(z.dtype), ctx)


@idea("state")
class PlainTensor(FeedForward):
    def __init__(self, config, block):
        super().__init__(config, block)
        self.scale = torch.ones(config.dim_model)

    def forward(self, z, ctx):
        return super().forward(z * self.scale.to(z.dtype), ctx)


@idea("state")
class WeightsClipped(FeedForward):
    def forward(self, z, ctx):
        with torch.no_grad():
            self.up.weight.clamp_(-0.01, 0.01)
        return super().forward(z, ctx)


# --- initial values
def with_gain(rule, trained=True):
    class Gained(FeedForward):
        def __init__(self, config, block):
            super().__init__(config, block)
            self.gain = nn.Parameter(torch.empty(config.dim_model), requires_grad=trained)
            self.init_rules = {} if rule is None else {"gain": rule}

        def forward(self, z, ctx):
            return super().forward(z * self.gain.to(z.dtype), ctx)

    return Gained


idea("build")(with_gain(None), "NoRule")
idea("initial values")(with_gain(lambda x, g: None), "EmptyRule")
idea("initial values")(with_gain(lambda x, g: x.copy_(torch.randn_like(x))), "GlobalDraw")
idea("initial values")(with_gain(lambda x, g: x.fill_(float("inf"))), "InfiniteStart")
idea("initial values")(with_gain(ones, trained=False), "Frozen")


# --- gradients
class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, d):
        return d * 0.5


@idea("gradients")
class Unused(with_gain(ones)):
    def forward(self, z, ctx):
        return FeedForward.forward(self, z, ctx)


changed("gradients", lambda self, z, ctx: z.detach())("Detached")
changed("gradients", lambda self, z, ctx: HalfGradient.apply(z))("WrongBackward")
changed("gradients", lambda self, z, ctx: z + (z - z).square().sum(-1, keepdim=True).sqrt(), "encoder")("RootOfZero")

changed("20 steps", lambda self, z, ctx: z * ctx.key_mask[:, :, None], "encoder")("NeedsAMask")


# --- activations: the formula, its derivative, and both as Triton code
IDENTITY = (lambda x: x * 1.0, lambda d, x: d * 1.0)


def slope(a):
    return tl.full(a.shape, 1.0, tl.float32)


def half(a):
    return tl.full(a.shape, 0.5, tl.float32)


def value(a):
    return a


def torch_value(a):
    return torch.sqrt(a)


idea("torch path", "activation")(
    Activation(lambda x: x**3 / 9, lambda d, x: d * x * x, value, slope), "WrongDerivative"
)
idea("torch path", "activation")(Activation(lambda x: x.mul_(0.5), lambda d, x: d * x, value, slope), "InPlace")
idea("fused kernels", "activation")(Activation(*IDENTITY, value, half), "WrongSlope")
idea("fused kernels", "activation")(Activation(*IDENTITY, half, slope), "WrongValue")
idea("fused kernels", "activation")(Activation(*IDENTITY, torch_value, slope), "TorchInTriton")

# --- numbers
changed("bfloat16", lambda self, z, ctx: z * torch.ones(z.shape[-1]) if z.dtype == torch.bfloat16 else z)(
    "Float32Constant"
)


@idea("bfloat16")
class Float32Gain(with_gain(ones)):
    def forward(self, z, ctx):
        return FeedForward.forward(self, z * self.gain.to(self.up.weight.dtype), ctx)


@idea("20 steps")
class NotANumber(FeedForward):
    def forward(self, z, ctx):
        return super().forward(torch.log(z), ctx)


@idea("padding", "norm")
class CentredNorm(Norm):
    def formula(self, x):
        x = x - x.mean(dim=(1, -1), keepdim=True) if x.dim() == 3 and x.shape[1] in (19, 32) else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain.to(x.dtype)
