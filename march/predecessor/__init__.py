"""The predecessor, the repository of the published runs: its checkpoints (weights), its model in eager PyTorch (eager),
its runs' figures (published)."""
