"""The encoder-decoder: two stacks, one block loop.

Decoder block i attends to the keys and values that encoder block i's self-attention computed, so nobody reads the
encoder's output: after the last encoder block's keys and values the encoder stops (docs/deviations.md).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from kernels.portable import product_dtype as portable_dtype
from march.config import BlockConfig, ModelConfig, ResolvedConfig
from march.model.layers import Norm, Pass, SelfAttention, Sites, Sublayer, build_sublayer, fill

# Below this width bfloat16 products gain nothing over float32 ones: the calls cost more than the arithmetic.
NARROW = 256


@dataclass
class Output:
    """loss: float32 scalar, the mean over labels other than -100, or None. logits [B, Ld, V], or None."""

    loss: Tensor | None
    logits: Tensor | None


class Stack(nn.Module):
    """Blocks of sublayers, each behind its norm, and a final norm.

    The stream x and its normalised copy z travel together: `residual_norm` adds a sublayer's output to the stream
    and normalises for the next sublayer in one pass.
    """

    def __init__(self, config: ModelConfig, blocks: tuple[BlockConfig, ...], sites: Sites, *, decoder: bool):
        super().__init__()
        self.dropout, self.width = config.dropout, config.dim_model
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                build_sublayer(config, block, index, sublayer, sites, decoder=decoder) for sublayer in block.sublayers
            )
            for index, block in enumerate(blocks)
        )
        self.final_norm = Norm(config.dim_model)
        self.memory_only = not decoder

    def sublayers(self) -> list[Sublayer]:
        """All sublayers in order."""
        return [sublayer for block in self.blocks for sublayer in block]  # type: ignore[attr-defined, misc]

    def forward(self, x: Tensor, shared: Pass) -> Tensor | None:
        """x [B, L, D'] to the normalised output [B, L, D']; None of the encoder, which leaves `shared.memory`."""
        sublayers = self.sublayers()
        gains = [shared.cast(norm.gain) for norm in (*(sublayer.norm for sublayer in sublayers), self.final_norm)]
        if x.shape[-1] > self.width:
            gains = [fill(gain[None], 1, x.shape[-1])[0] for gain in gains]
        last_needed = self.blocks[-1][0] if self.memory_only else None  # type: ignore[index]
        stream: Tensor | None = x
        stream, z = kernels.residual_norm(stream, None, gains[0], features=self.width, impl=shared.impl)
        for sublayer, next_gain in zip(sublayers, gains[1:], strict=True):
            if sublayer is last_needed:
                assert isinstance(sublayer, SelfAttention)
                sublayer.remember(z, shared)
                return None
            s = sublayer(z, shared)
            stream, z = kernels.residual_norm(
                stream if sublayer.residual else None,
                s,
                next_gain,
                dropout=shared.dropout(self.dropout, sublayer.output_site),
                features=self.width,
                impl=shared.impl,
            )
        return z


class Transformer(nn.Module):
    """An experiment's model; float32 parameters, see `march.build_model`."""

    def __init__(self, resolved: ResolvedConfig, impl: kernels.Impl = "auto"):
        super().__init__()
        config = resolved.model
        self.config, self.resolved = config, resolved
        self.impl = kernels.validate(impl)
        sites = Sites()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.dim_model))
        self.positions = nn.Parameter(torch.empty(config.max_length, config.dim_model))
        self.embedding_sites = {"encoder": (sites(), sites()), "decoder": (sites(), sites())}
        if config.database_states:
            width = resolved.encoder[0].dim_qkv
            self.database_keys = nn.Parameter(torch.empty(config.database_states, width))
            self.database_values = nn.Parameter(torch.empty(config.database_states, width))
        self.encoder = Stack(config, resolved.encoder, sites, decoder=False)
        self.decoder = Stack(config, resolved.decoder, sites, decoder=True)
        # set by load_predecessor: where each stack's final norm stood in the checkpoint's list
        self.predecessor_final_norms: dict[str, int] = {}

    def dead_parameters(self) -> set[str]:
        """Names of the parameters that cannot affect the loss (w_qkv of the last encoder block: its Wq rows only)."""
        last = len(self.encoder.blocks) - 1
        prefix = f"encoder.blocks.{last}."
        alive = {f"{prefix}0.w_qkv", f"{prefix}0.norm.gain"}
        names = {name for name, _ in self.named_parameters() if name.startswith(prefix)}
        return names - alive | {"encoder.final_norm.gain"}

    def _embed(self, ids: Tensor, table: Tensor, stack: str, shared: Pass) -> Tensor:
        token_site, position_site = self.embedding_sites[stack]
        # from the parameters themselves: a look-up is no product, and its gradient is added up in their type
        x = kernels.embedding(
            ids,
            table,
            fill(self.positions, self.positions.shape[0], table.shape[1]),
            combine=self.config.embedding_combine,
            dropout=shared.dropout(self.config.dropout, token_site),
            position_dropout=shared.dropout(self.config.dropout, position_site),
            impl=shared.impl,
        )
        return shared.cast(x)

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

    def _stream_width(self, shared: Pass) -> int:
        """Columns of the stream: dim_model, or more, filled with zeros, where the kernels want rows of 16 bytes."""
        weight = self.embedding
        dtype = shared.dtype or weight.dtype
        return kernels.row_width("residual_norm", self.config.dim_model, dtype, weight.device, impl=self.impl)

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
        and step from torch's CPU generator.
        """
        _check_inputs(self.config, input_ids, decoder_input_ids, labels, attention_mask)
        state = self._dropout_state(dropout_state, input_ids.device)
        shared = Pass(self.impl, state, attention_mask, self.compute_dtype())
        if self.config.database_states:
            bank = (shared.cast(self.database_keys), shared.cast(self.database_values))
            shared.database = (bank[0][None, :, None], bank[1][None, :, None])
        stream = self._stream_width(shared)
        table = fill(self.embedding, self.embedding.shape[0], stream)
        table, output = kernels.tied_table(table, shared.dtype, impl=self.impl)
        self.encoder(self._embed(input_ids, table, "encoder", shared), shared)
        h = self.decoder(self._embed(decoder_input_ids, table, "decoder", shared), shared)
        scale = self.config.dim_model**-0.5
        loss = logits = None
        if labels is not None:
            loss, _ = kernels.linear_cross_entropy(
                h, output, labels, scale=scale, return_per_token=True, impl=self.impl
            )
        if labels is None or return_logits:
            logits = kernels.linear(h * scale, output, impl=self.impl)
        return Output(loss, logits)


def _check_inputs(
    config: ModelConfig, ids: Tensor, decoder_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None
) -> None:
    for name, x in (("input_ids", ids), ("decoder_input_ids", decoder_ids)):
        if x.dim() != 2 or x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64 [B, L], got {x.dtype} {list(x.shape)}; convert with .long()")
        if x.shape[1] > config.max_length:
            raise ValueError(
                f"{name}: expected at most {config.max_length} positions, got {x.shape[1]}; "
                f"shorten the sequences or build the model with max_length={x.shape[1]}"
            )
    if ids.shape[0] != decoder_ids.shape[0]:
        raise ValueError(
            f"decoder_input_ids: expected {ids.shape[0]} sequences like input_ids, got {decoder_ids.shape[0]}; "
            "both sides are one batch"
        )
    if labels is not None and labels.shape != decoder_ids.shape:
        raise ValueError(
            f"labels: expected {list(decoder_ids.shape)} like decoder_input_ids, got {list(labels.shape)}; "
            "one label a decoder position, -100 to ignore one"
        )
    if attention_mask is not None and (attention_mask.shape != ids.shape or attention_mask.dtype != torch.bool):
        raise ValueError(
            f"attention_mask: expected bool {list(ids.shape)}, True where a token is real, got "
            f"{attention_mask.dtype} {list(attention_mask.shape)}; convert with .bool()"
        )
