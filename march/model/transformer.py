"""The encoder-decoder, from ids to loss.

Decoder block i attends to the keys and values that encoder block i's self-attention computed, so nobody reads the
encoder's output: after the last encoder block's keys and values the encoder stops (docs/deviations.md). With
cross_attention "encoder_output" the decoder reads that, as in Vaswani et al., 2017.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from kernels.portable import product_dtype as portable_dtype
from march import experiments
from march.config import BlockConfig, ModelConfig, ResolvedConfig
from march.experiments import own
from march.model import parts
from march.model.init import Rule, initialise, normal
from march.model.layers import Block
from march.model.modules import Axis, Dropout, ForwardContext, Norm, ResidualStream, zero_pad

# Below this width bfloat16 products gain nothing over float32 ones: the calls cost more than the arithmetic.
NARROW = 256


@dataclass
class Output:
    """loss: float32 scalar, the mean over labels other than -100, or None. logits [B, Ld, V], or None."""

    loss: Tensor | None
    logits: Tensor | None


class Stack(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, config: ModelConfig, blocks: tuple[BlockConfig, ...]):
        super().__init__()
        block = config.part("block", Block)
        self.token_dropout, self.position_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.blocks = nn.ModuleList(block(config, one) for one in blocks)
        self.final_norm = config.part("norm", Norm)(config.dim_model)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [B, L, D'] to the normalised output [B, L, D']."""
        return self.run(self.blocks, x, ctx).norm(self.final_norm)

    def run(self, blocks: Iterable[nn.Module], x: Tensor, ctx: ForwardContext) -> ResidualStream:
        """The stream x [B, L, D'] behind `blocks`."""
        stream = ResidualStream(x, ctx)
        for block in blocks:
            behind = block(stream, ctx)
            if behind is stream or not isinstance(behind, ResidualStream):
                raise TypeError(
                    f"{type(block).__name__}.forward: expected another stream than the one that was given, got "
                    f"{'the same' if behind is stream else behind}; add to stream.copy() and return it"
                )
            stream = behind
        return stream


class Encoder(Stack):
    """Its blocks leave keys and values in `ctx.encoder_kv`; where nobody reads its output the last stops there."""

    def __init__(self, config: ModelConfig, blocks: tuple[BlockConfig, ...]):
        super().__init__(config, blocks)
        self.stops_early = config.cross_attention == "encoder_block"

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor | None:  # type: ignore[override]
        if not self.stops_early:
            return super().forward(x, ctx)
        self.blocks[-1].project_kv(self.run(self.blocks[:-1], x, ctx), ctx)  # type: ignore[operator]
        return None


class Database(nn.Module):
    """A learned bank of keys and values, each [S, K], shared by all heads, blocks and both stacks."""

    def __init__(self, states: int, width: int):
        super().__init__()
        self.axis = Axis("heads", width)
        self.keys, self.values = (nn.Parameter(torch.empty(states, width)) for _ in range(2))
        self.init_rules: dict[str, Rule] = {"keys": normal(1.0), "values": normal(1.0)}

    def forward(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Keys and values, each [1, S, 1, K']."""
        columns = (self.axis.width, self.axis.padded(ctx))
        keys, values = (zero_pad(x.to(ctx.dtype), (1, 1), columns) for x in (self.keys, self.values))
        return keys[None, :, None], values[None, :, None]


class Transformer(nn.Module):
    """An experiment's model; float32 parameters, see `march.build_model`."""

    def __init__(self, resolved: ResolvedConfig, impl: kernels.Impl = "auto", seed: int | None = None):
        super().__init__()
        config = resolved.model
        parts.use(config.idea)
        self.config, self.resolved = config, resolved
        self.impl = kernels.validate(impl)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim_model))
        self.init_rules: dict[str, Rule] = {"embedding": normal(1.0)}
        self.positions: nn.Parameter | None = None
        if config.positions == "absolute":
            self.positions = nn.Parameter(torch.empty(config.max_length, config.dim_model))
            self.init_rules["positions"] = normal(1.0 if config.position_init == "unit" else config.dim_model**-0.5)
        if config.database_states:
            self.database = Database(config.database_states, resolved.encoder[0].dim_qkv)
        self.encoder = Encoder(config, resolved.encoder)
        self.decoder = Stack(config, resolved.decoder)
        # set by load_predecessor: where each stack's final norm stood in the checkpoint's list
        self.predecessor_final_norms: dict[str, int] = {}
        initialise(self, torch.initial_seed() if seed is None else seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spec": own.SPECS.get(self.config.idea)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if spec := state.pop("_spec", None):  # in another process the parts are not known yet
            experiments.configuration(spec)
            parts.use(state["config"].idea)
        super().__setstate__(state)

    def dead_parameters(self) -> set[str]:
        """Names of the parameters that cannot affect the loss (qkv of the last encoder block: its Wq rows only)."""
        if self.config.cross_attention == "encoder_output":
            return set()
        prefix = f"encoder.blocks.{len(self.encoder.blocks) - 1}."
        alive = {f"{prefix}self_attention.{name}" for name in ("qkv.weight", "norm.gain", "k_norm.gain")}
        names = {name for name, _ in self.named_parameters() if name.startswith(prefix)}
        return names - alive | {"encoder.final_norm.gain"}

    def _embed(self, ids: Tensor, stack: Stack, table: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        place = stack.position_dropout(ctx) if self.positions is not None else None
        drops = {"dropout": stack.token_dropout(ctx), "position_dropout": place}
        combine = self.config.embedding_combine
        # from the parameters themselves: a look-up is no product, and its gradient is added up in their type
        return kernels.embedding(ids, table, positions, combine=combine, **drops, impl=ctx.impl).to(ctx.dtype)

    def compute_dtype(self) -> torch.dtype | None:
        """What a forward pass converts float32 parameters to: None, or bfloat16 for `precision="bf16"` on a CPU.

        A trainer that owns the precision hands over parameters of the type it wants and nothing is converted. Plain
        torch keeps float32 parameters; there the portable path trains in bfloat16 where a measurement at first use
        found it faster (kernels.portable.product_dtype), with float32 softmax, loss and gradients of parameters.
        """
        weight = self.embedding
        wanted = self.training and self.config.precision == "bf16" and self.config.dim_model >= NARROW
        portable = self.impl in ("auto", "torch")
        if not wanted or not portable or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
        dtype = portable_dtype()
        return None if dtype == weight.dtype else dtype

    def _dropout_state(self, state: Tensor | None, device: torch.device) -> Tensor | None:
        if not self.training:
            return None
        if state is not None:
            # a copy: the caller may write the next step into its tensor before backward has drawn the masks again
            return state.clone()
        # from the CPU's generator on every device: manual_seed, fork_rng and activation checkpointing know it, the last
        # even where no tensor argument names a GPU
        words = torch.randint(1 << 32, (2,), device="cpu")
        return torch.cat([words, words.new_zeros(1)]).to(device)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_logits: bool = False,
        dropout_state: Tensor | None = None,
    ) -> Output:
        """Loss and logits of a batch.

        input_ids int64 [B, Le], decoder_input_ids int64 [B, Ld], labels int64 [B, Ld] with -100 where ignored,
        attention_mask bool [B, Le], True where a token is real. The loss is None without labels; the logits
        [B, Ld, V] are returned where asked for, or where there are no labels, else None. Lengths up to max_length.

        dropout_state: int64 [3], (seed, step, index of the first sequence in the global step), see
        `kernels.dropout_state`; in training the masks are a function of it. Without it a training forward draws seed
        and step from torch's CPU generator, to which numbers that agree in their last 32 bits are one `manual_seed`.
        """
        _check_inputs(self.config, input_ids, decoder_input_ids, labels, attention_mask)
        weight = self.embedding
        rng = self._dropout_state(dropout_state, input_ids.device)
        dtype = kernels.autocast_dtype(weight)
        if dtype == weight.dtype:
            dtype = self.compute_dtype() or dtype
        ctx = ForwardContext(self.impl, dtype, weight.device, rng, attention_mask)
        if self.config.database_states:
            ctx.database = self.database(ctx)
        width = Axis("stream", self.config.dim_model)
        columns = (width.width, width.padded(ctx))
        table, output = kernels.tied_table(zero_pad(weight, (1, 1), columns), ctx.dtype, impl=self.impl)
        if self.positions is not None:
            positions = zero_pad(self.positions, (1, 1), columns)
        else:  # a table of zeros: an average of tokens and nothing stays half of the tokens
            zero = torch.zeros(1, 1, dtype=weight.dtype, device=weight.device)
            positions = zero.expand(self.config.max_length, columns[1])
        ctx.encoder_output = self.encoder(self._embed(input_ids, self.encoder, table, positions, ctx), ctx)
        h = self.decoder(self._embed(decoder_input_ids, self.decoder, table, positions, ctx), ctx)
        scale = self.config.dim_model**-0.5
        loss = logits = None
        if labels is not None:
            options = {"scale": scale, "impl": self.impl}
            loss, _ = kernels.linear_cross_entropy(h, output, labels, return_per_token=True, **options)
        if labels is None or return_logits:
            logits = kernels.linear(h * scale, output, impl=self.impl)
        return Output(loss, logits)


def _check_inputs(config: ModelConfig, ids: Tensor, decoder_ids: Tensor, labels: Tensor | None, mask: Tensor | None):
    def require(ok: bool, name: str, expected: str, got: object, fix: str) -> None:
        if not ok:
            raise ValueError(f"{name}: expected {expected}, got {got}; {fix}")

    def described(x: Tensor) -> str:
        return f"{x.dtype} {list(x.shape)}"

    for name, x in (("input_ids", ids), ("decoder_input_ids", decoder_ids)):
        require(x.dim() == 2 and x.dtype == torch.int64, name, "int64 [B, L]", described(x), "convert with .long()")
        fix = f"shorten the sequences or build the model with max_length={x.shape[1]}"
        require(x.shape[1] <= config.max_length, name, f"at most {config.max_length} positions", x.shape[1], fix)
    sizes = (ids.shape[0], decoder_ids.shape[0])
    expected = f"{sizes[0]} sequences like input_ids"
    require(sizes[0] == sizes[1], "decoder_input_ids", expected, sizes[1], "both sides are one batch")
    if labels is not None:
        expected = f"{list(decoder_ids.shape)} like decoder_input_ids"
        fix = "one label a decoder position, -100 to ignore one"
        require(labels.shape == decoder_ids.shape, "labels", expected, list(labels.shape), fix)
    if mask is not None:
        expected = f"bool {list(ids.shape)}, True where a token is real"
        ok = mask.shape == ids.shape and mask.dtype == torch.bool
        require(ok, "attention_mask", expected, described(mask), "convert with .bool()")
