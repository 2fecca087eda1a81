"""The predecessor, the repository of the published runs: its checkpoints (weights), its model in eager PyTorch (eager),
how its runs ran (runs)."""
