"""Inputs of the operators and the paper's sizes, shared by tests and bench."""

from kernels.operators import OPERATORS
from kernels.operators.record import DECODER_LENGTH, ENCODER_LENGTH, MICRO_BATCH, POSITIONS, VOCABULARY

__all__ = ["DECODER_LENGTH", "ENCODER_LENGTH", "FACTORIES", "MICRO_BATCH", "POSITIONS", "VOCABULARY"]

FACTORIES = {name: record.inputs for name, record in OPERATORS.items()}
attention_inputs = FACTORIES["attention"]
glu_inputs, residual_norm_inputs = FACTORIES["glu"], FACTORIES["residual_norm"]
linear_cross_entropy_inputs, embedding_inputs = FACTORIES["linear_cross_entropy"], FACTORIES["embedding"]
