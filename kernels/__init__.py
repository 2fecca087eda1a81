"""Fused operators for transformer experiments."""

__version__ = "0.0.1"
