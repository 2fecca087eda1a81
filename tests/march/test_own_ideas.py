"""Ideas as a user writes them, in a few lines. That implementations agree and nothing leaks: test_model.py."""

import pytest
import torch
from models import small_model

import kernels
import march
from march.model.layers import Block, FeedForward, SelfAttention
from march.model.modules import Norm


class NormalisedAttention(SelfAttention):
    """Queries and keys are normalised (Henry et al., 2020)."""

    def __init__(self, config, block):
        super().__init__(config, block)
        self.query_norm, self.key_norm, self.scale = Norm(block.dim_qkv), Norm(block.dim_qkv), 0.5

    def forward(self, z, ctx):
        q, k, v = self.qkv.split(z, ctx)
        q, k = self.query_norm(q, ctx), self.key_norm(k, ctx)
        if not self.causal:
            self.give_decoder(torch.stack([k, v], 2), ctx)
        return self.o(self.attend(q, k, v, ctx).flatten(2), ctx)


class SquaredReLU(FeedForward):
    """So et al., 2021."""

    def forward(self, z, ctx):
        return self.down(self.hidden_dropout.drop(torch.relu(self.up(z, ctx)).square(), ctx), ctx)


class QKNorm(Block):
    classes = Block.classes | {"self_attention": NormalisedAttention}


class Squared(Block):
    classes = Block.classes | {"feedforward": SquaredReLU}


class Sandwich(Block):
    """A norm behind each sublayer too (Ding et al., 2021)."""

    def __init__(self, config, block):
        super().__init__(config, block)
        self.after = torch.nn.ModuleDict({name: Norm(config.dim_model) for name in self.names})

    def forward(self, stream, ctx):
        stream = stream.copy()
        for layer, after in zip(self.layers, self.after.values(), strict=True):
            stream.add(after(layer(stream.norm(layer.norm), ctx), ctx), dropout=layer.dropout(ctx))
        return stream


class Parallel(Block):
    """All sublayers read one norm (Wang and Komatsuzaki, 2021): additions without a norm between them."""

    def forward(self, stream, ctx):
        stream = stream.copy()
        z = stream.norm(self.layers[0].norm)
        for layer in self.layers:
            stream.add(layer(z, ctx), dropout=layer.dropout(ctx))
        return stream


class PostNorm(Block):
    """norm(x + f(x)), as in Vaswani et al., 2017."""

    def forward(self, stream, ctx):
        stream = stream.copy()
        for layer in self.layers:
            stream.add(layer(stream.x, ctx), dropout=layer.dropout(ctx))
            stream.x = stream.norm(layer.norm)
        return stream


IDEAS = [QKNorm, Squared, Sandwich, Parallel, PostNorm]


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_shares_its_controls_values_and_masks(idea):
    model, control = small_model(idea), small_model("Baseline")
    values, places = model.state_dict(), dict(model.named_modules())
    assert all(torch.equal(values[name], value) for name, value in control.state_dict().items())
    ids = {name: x.dropout_id for name, x in control.named_modules() if hasattr(x, "dropout_id")}
    assert all(places[name].dropout_id == number for name, number in ids.items())


def test_a_residual_free_addition_and_one_without_a_norm_behind_it():
    """The stream by itself is what the norm reads."""
    from march.model.modules import Dropout, ForwardContext, ResidualStream

    x, s, gain = torch.randn(2, 5, 8), torch.randn(2, 5, 8), Norm(8)
    torch.nn.init.ones_(gain.gain)
    ctx = ForwardContext("torch", x.dtype, x.device, kernels.dropout_state(1, 2))
    place = Dropout(0.5)
    place.dropout_id = 7
    for residual in (True, False):
        read, normed = ResidualStream(x, ctx), ResidualStream(x, ctx)
        read.add(s, place(ctx), residual)
        normed.add(s, place(ctx), residual)
        alone = read.x
        z = normed.norm(gain)
        torch.testing.assert_close(normed.x, alone)
        torch.testing.assert_close(z, gain(alone, ctx))
        assert torch.equal(read.x, alone)  # added once


def test_a_plain_module_in_a_block_is_asked_for_its_rule():
    class Untold(Block):
        def __init__(self, config, block):
            super().__init__(config, block)
            self.extra = torch.nn.Linear(4, 4, bias=False)

    with pytest.raises(RuntimeError, match=r"^encoder\.blocks\.0\.extra\.weight: .* got no rule; in Linear"):
        march.build_model("Baseline", parts={"block": Untold}, vocab_size=9, max_length=4)
