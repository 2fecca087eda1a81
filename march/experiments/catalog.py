"""The experiments. Data only: a name, the experiment it starts from, the fields it changes, what it is compared with.

To add one, add an entry: two changed fields are two lines.
"""

from typing import Any

from march.experiments.claims import BETTER, NOT_BETTER, SAME, WORSE, Claim
from march.experiments.experiment import Experiment

# Where the published text's claims are; what its runs show is computed from them, see march.experiments.published.
PUBLISHED = "published runs on 8 RTX A5000, see docs/deviations.md"

UNIT_POSITIONS = {"position_init": "unit"}
FEW_LAYERS = {"num_layers": 4}
GATED = {"feedforward": "gated", "dim_feedforward": 1365}
MIXED = {"feedforward": "mixed", "dim_feedforward": 1365}

NO_MATTER_WHICH_LAYER = Claim("no matter which layer", SAME)
GATES_WIN = Claim("slightly better, slightly more expensive", BETTER)
MIXED_LOSES = Claim("slightly worse", WORSE)
NO_BETTER_WITH_A_BANK = Claim("not better", NOT_BETTER)


def _published(
    name: str, base: str, changes: dict[str, Any], control: str, hypothesis: str, claim: Claim | None = None
) -> Experiment:
    return Experiment(name, base, changes, control, hypothesis, claim, PUBLISHED)


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("Baseline", None, {}, None, "The reference: 3 + 3 blocks, 8 heads of 64, ReLU feedforward."),
    _published(
        "BaselineFP32",
        "Baseline",
        {"precision": "fp32"},
        "Baseline",
        "float32 changes the loss by less than the noise of a seed.",
    ),
    Experiment(
        "Best",
        "Baseline",
        {"dim_model": 1024, "num_layers": 48, "num_heads": 16, "dim_feedforward": 4096},
        None,
        "The baseline's shape at 686M parameters: outside the budget, to see what scale buys.",
    ),
    _published(
        "MoreHeadsLessLayers",
        "Baseline",
        {"num_heads": 16, **FEW_LAYERS},
        "Baseline",
        "Heads are worth more than depth.",
        Claim("slightly better, slightly faster", BETTER),
    ),
    _published(
        "MoreHeadsLessQKVDim",
        "Baseline",
        {"dim_qkv": 32, "num_heads": 16},
        "Baseline",
        "More, narrower heads at equal parameters.",
    ),
    _published(
        "MoreHeadsLessQKVDimLessLayers",
        "Baseline",
        {"dim_qkv": 32, "num_heads": 24, **FEW_LAYERS, **UNIT_POSITIONS},
        "APEUnitVariance",
        "Narrow heads pay for fewer blocks.",
        Claim("on par with 4M fewer parameters", SAME),
    ),
    _published(
        "LessHeadsMoreQKVDim",
        "Baseline",
        {"dim_qkv": 128, "num_heads": 4},
        "Baseline",
        "Fewer, wider heads at equal parameters.",
        Claim("slightly worse, faster", WORSE),
    ),
    _published(
        "ScalingHeads",
        "Baseline",
        {"num_heads": (12, 8, 4)},
        "Baseline",
        "Heads belong in the early blocks.",
        NO_MATTER_WHICH_LAYER,
    ),
    _published(
        "InverseScalingHeads",
        "Baseline",
        {"num_heads": (4, 8, 12)},
        "Baseline",
        "Heads belong in the late blocks.",
        NO_MATTER_WHICH_LAYER,
    ),
    _published(
        "ScalingHeadsConstant",
        "Baseline",
        {"num_heads": (16, 8, 4), "dim_qkv": (32, 64, 128)},
        "Baseline",
        "Many narrow heads early, few wide ones late, equal parameters a block.",
        NO_MATTER_WHICH_LAYER,
    ),
    _published(
        "InverseScalingHeadsConstant",
        "Baseline",
        {"num_heads": (4, 8, 16), "dim_qkv": (128, 64, 32)},
        "Baseline",
        "Few wide heads early, many narrow ones late, equal parameters a block.",
        NO_MATTER_WHICH_LAYER,
    ),
    _published(
        "APESumOverAverage",
        "Baseline",
        {"embedding_combine": "sum"},
        "Baseline",
        "Token and position are summed, not averaged.",
        Claim("worse", WORSE),
    ),
    _published(
        "APEUnitVariance",
        "Baseline",
        UNIT_POSITIONS,
        "Baseline",
        "Positions start with the variance of tokens.",
        Claim("worse", WORSE),
    ),
    _published(
        "ReLUGatedLinearUnit",
        "Baseline",
        {**GATED, **UNIT_POSITIONS},
        "APEUnitVariance",
        "A ReLU gate is worth its third matrix (Shazeer, 2020).",
        GATES_WIN,
    ),
    _published(
        "GELUGatedLinearUnit",
        "Baseline",
        {**GATED, "activation": "gelu", **UNIT_POSITIONS},
        "APEUnitVariance",
        "A GELU gate is worth its third matrix (Shazeer, 2020).",
        GATES_WIN,
    ),
    _published(
        "SiLUGatedLinearUnit",
        "Baseline",
        {**GATED, "activation": "silu", **UNIT_POSITIONS},
        "APEUnitVariance",
        "A SiLU gate is worth its third matrix (Shazeer, 2020).",
        GATES_WIN,
    ),
    _published(
        "MixedAct",
        "Baseline",
        {**MIXED, **UNIT_POSITIONS},
        "APEUnitVariance",
        "A slow sigmoid and a fast ReLU branch, averaged.",
        MIXED_LOSES,
    ),
    _published(
        "MixedActSumOverMean",
        "Baseline",
        {**MIXED, "mixed_factor": 1.0, **UNIT_POSITIONS},
        "APEUnitVariance",
        "A slow sigmoid and a fast ReLU branch, summed.",
        MIXED_LOSES,
    ),
    _published(
        "MixedActSOMDropout",
        "Baseline",
        {**MIXED, "mixed_factor": 1.0, "slow_dropout": 0.5, **UNIT_POSITIONS},
        "APEUnitVariance",
        "Summed, the sigmoid branch dropped half of the time in training.",
        MIXED_LOSES,
    ),
    _published(
        "NoSelfAttentionResidual",
        "Baseline",
        {"self_attention_residual": False, **UNIT_POSITIONS},
        "APEUnitVariance",
        "Self-attention carries what it needs itself.",
        Claim("significantly worse", WORSE),
    ),
    _published(
        "Database",
        "Baseline",
        {"database_states": 512},
        "Baseline",
        "A learned bank of keys and values, shared by all heads and blocks.",
        NO_BETTER_WITH_A_BANK,
    ),
    _published(
        "DatabaseFromHeads",
        "Database",
        {"database_states": 1536, "num_heads": 4},
        "Baseline",
        "The bank replaces half of the heads.",
        NO_BETTER_WITH_A_BANK,
    ),
    _published(
        "DatabaseFromHeads2",
        "Database",
        {"num_heads": 7},
        "Baseline",
        "The bank replaces one head.",
        NO_BETTER_WITH_A_BANK,
    ),
    _published(
        "DatabaseFromLayers",
        "Database",
        {"database_states": 1024, **FEW_LAYERS},
        "Baseline",
        "The bank replaces a block of each stack.",
        NO_BETTER_WITH_A_BANK,
    ),
    _published(
        "DatabaseFromDim",
        "Database",
        {"database_states": 1344, "dim_model": 448, "num_heads": 7, "dim_feedforward": 1792},
        "Baseline",
        "The bank replaces an eighth of the width.",
        NO_BETTER_WITH_A_BANK,
    ),
    _published(
        "UnifiedAttention",
        "Baseline",
        {"num_heads": 12, "unified_attention": True},
        "Baseline",
        "One softmax over the decoder's own keys and the encoder's.",
        Claim("not very good, much less capacity", WORSE, "measured under the published mask, which is faulty"),
    ),
    _published(
        "UnifiedAttentionAsPublished",
        "UnifiedAttention",
        {"unified_mask": "as_published"},
        "UnifiedAttention",
        "The published mask, under which the decoder sees later tokens: what did the fault do?",
        Claim("not very good, much less capacity", WORSE, "under this mask", measured="UnifiedAttention"),
    ),
    Experiment(
        "BigHeads",
        "Baseline",
        {"dim_model": 448, "dim_qkv": 112, "dim_feedforward": 1792},
        "Baseline",
        "Width goes from the stream into the heads: K 112.",
    ),
    Experiment(
        "BigHeads2",
        "Baseline",
        {"dim_model": 380, "dim_qkv": 190, "dim_feedforward": 1520},
        "Baseline",
        "Further: K 190, half of the stream's width.",
    ),
    Experiment(
        "BigHeads3",
        "Baseline",
        {"dim_model": 380, "dim_qkv": 380, "dim_feedforward": 1520},
        "Baseline",
        "Every head as wide as the stream: K 380.",
    ),
    # What is asked first of a transformer: the parts that became common after the published runs, one at a time.
    Experiment(
        "StandardCrossAttention",
        "Baseline",
        {"cross_attention": "encoder_output"},
        "Baseline",
        "Keys and values of the encoder's output (Vaswani et al., 2017) are worth their own Wk and Wv.",
    ),
    Experiment(
        "SquaredReLU",
        "Baseline",
        {"activation": "relu2"},
        "Baseline",
        "relu(x)^2 learns faster than relu(x) (So et al., 2021).",
    ),
    Experiment(
        "QKNorm",
        "Baseline",
        {"qk_norm": True},
        "Baseline",
        "Normalised queries and keys, scores over sqrt(K), train more steadily (Henry et al., 2020).",
    ),
    Experiment(
        "RotaryPositions",
        "Baseline",
        {"positions": "rotary"},
        "Baseline",
        "Relative positions in self-attention (Su et al., 2021) do without a table; cross-attention has none.",
    ),
    Experiment(
        "NoPositions",
        "Baseline",
        {"positions": "none"},
        "Baseline",
        "The decoder's causal mask tells positions (Haviv et al., 2022), the encoder has none: what are they worth?",
    ),
    Experiment(
        "GroupedKeysValues",
        "Baseline",
        {"num_kv_heads": 2},
        "Baseline",
        "Four heads of queries share keys and values (Ainslie et al., 2023) at little loss.",
    ),
    Experiment(
        "SandwichNorm",
        "Baseline",
        {"norm_placement": "sandwich"},
        "Baseline",
        "A norm behind each sublayer too (Ding et al., 2021) keeps the stream's scale.",
    ),
)

# The eight published runs that changed the positions too, each with a twin that changes only what it says.
EXPERIMENTS += tuple(
    Experiment(
        f"{x.name}Controlled",
        "Baseline",
        {field: value for field, value in x.changes.items() if field not in UNIT_POSITIONS},
        "Baseline",
        f"{x.name} on Baseline's positions.",
    )
    for x in EXPERIMENTS
    if x.control == "APEUnitVariance"
)
