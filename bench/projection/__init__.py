"""Projected seconds of a training step, from counted work and fitted efficiencies. A projection, never a measurement.

`predecessor` is the eager model as the published runs computed it; `collect` counts what a step dispatches and launches
and keeps the counts on disk; `model` gives each call its time; `fit` finds the efficiencies on the published seconds;
`table` prints. `python -m bench.projection` is the command.
"""
