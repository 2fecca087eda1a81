"""Parameter counts from the configuration alone, by part. No torch here."""

from march.config import BlockConfig, ModelConfig, ResolvedConfig, resolve


def sublayer_parameters(config: ModelConfig, block: BlockConfig, kind: str) -> int:
    """Parameters of one sublayer, without its norm."""
    projection = config.dim_model * block.num_heads * block.dim_qkv
    if kind in ("self_attention", "unified_attention"):
        return 4 * projection
    if kind in ("cross_attention", "database_attention"):
        return 2 * projection
    matrices = 2 if config.feedforward == "plain" else 3
    return matrices * config.dim_model * config.dim_feedforward


def parameters(config: ModelConfig | ResolvedConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's."""
    resolved = config if isinstance(config, ResolvedConfig) else resolve(config)
    model = resolved.model
    parts = {
        "embedding (tied)": model.vocab_size * model.dim_model,
        "positions": model.max_length * model.dim_model,
    }
    if model.database_states:
        parts["database"] = 2 * model.database_states * resolved.encoder[0].dim_qkv
    for stack, blocks in (("encoder", resolved.encoder), ("decoder", resolved.decoder)):
        for block in blocks:
            for sublayer in block.sublayers:
                part = f"{stack} {sublayer.kind.replace('_', ' ')}"
                parts[part] = parts.get(part, 0) + sublayer_parameters(model, block, sublayer.kind)
        parts[f"{stack} norms"] = (sum(len(block.sublayers) for block in blocks) + 1) * model.dim_model
    return parts


def total_parameters(config: ModelConfig | ResolvedConfig) -> int:
    """Parameters of the model, tied ones once, dead ones included."""
    return sum(parameters(config).values())
