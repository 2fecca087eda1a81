"""Parameter counts from the configuration alone, by part. No torch here."""

from march.config import BlockConfig, ModelConfig, ResolvedConfig, resolve


def sublayer_parameters(config: ModelConfig, block: BlockConfig, kind: str) -> int:
    """Parameters of one sublayer, without the norms before and behind it."""
    if kind == "feedforward":
        return (2 if config.feedforward == "plain" else 3) * config.dim_model * config.dim_feedforward
    own = kind in ("self_attention", "unified_attention")
    outer = kind in ("cross_attention", "unified_attention") and config.cross_attention == "encoder_output"
    heads = 2 * block.num_heads + 2 * block.num_kv_heads * (own + outer)
    gains = config.qk_norm * (1 + (own or outer)) * block.dim_qkv
    return config.dim_model * heads * block.dim_qkv + gains


def parameters(config: ModelConfig | ResolvedConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's."""
    resolved = config if isinstance(config, ResolvedConfig) else resolve(config)
    model = resolved.model
    parts = {
        "embedding (tied)": model.vocab_size * model.dim_model,
    }
    if model.positions == "absolute":
        parts["positions"] = model.max_length * model.dim_model
    if model.database_states:
        parts["database"] = 2 * model.database_states * resolved.encoder[0].dim_qkv
    for stack, blocks in (("encoder", resolved.encoder), ("decoder", resolved.decoder)):
        for block in blocks:
            for sublayer in block.sublayers:
                part = f"{stack} {sublayer.kind.replace('_', ' ')}"
                parts[part] = parts.get(part, 0) + sublayer_parameters(model, block, sublayer.kind)
        norms = (2 if model.norm_placement == "sandwich" else 1) * sum(len(block.sublayers) for block in blocks) + 1
        parts[f"{stack} norms"] = norms * model.dim_model
    return parts


def total_parameters(config: ModelConfig | ResolvedConfig) -> int:
    """Parameters of the model, tied ones once, dead ones included."""
    return sum(parameters(config).values())
