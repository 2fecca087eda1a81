"""The one error that the data pipeline raises for a user's mistake or a damaged file."""


class DataError(ValueError):
    """Says what was expected, what was found and what to do about it, in one line.

    Attributes: expected, got, fix (str), the three parts of the message.
    """

    def __init__(self, expected: str, got: str, fix: str):
        super().__init__(" ".join(f"expected {expected}, got {got}; fix: {fix}".splitlines()))
        self.expected, self.got, self.fix = expected, got, fix

    def __reduce__(self):  # an exception with three arguments does not survive pickling otherwise
        return type(self), (self.expected, self.got, self.fix)
