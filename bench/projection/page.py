"""docs/projection.md."""


def page(calibration, progress) -> str:
    raise NotImplementedError
