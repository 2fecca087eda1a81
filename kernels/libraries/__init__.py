"""Operators of optional libraries, selected by name: impl={"attention": "flash_attn", "residual_norm": "apex"}.

Neither is ever required. A module here imports its library when it is selected, recognises it by what it contains and
says how to install it where it is missing.
"""
