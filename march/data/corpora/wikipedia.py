"""English Wikipedia (or another language) as cleaned by Wikimedia, through Hugging Face datasets."""

import re
from dataclasses import dataclass
from typing import Any

from march.data.corpora.huggingface import Streamed
from march.data.errors import DataError


@dataclass(frozen=True)
class Wikipedia(Streamed):
    """snapshot: a configuration of the dataset; dataset: its name on the hub, or a folder with a copy of it."""

    source = "wikipedia"
    note = "Wikipedia, as cleaned by the Wikimedia Foundation (CC BY-SA)"
    vocab_size = 30_000

    dataset: str = "wikimedia/wikipedia"
    snapshot: str = "20231101.en"

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[\w.-]+", self.snapshot):  # it is part of a folder's name
            raise DataError("a snapshot such as 20231101.en", repr(self.snapshot), "choose one of the dataset's")

    @property
    def name(self) -> str:
        copy = "" if self.dataset == Wikipedia.dataset else f"-{self.digest(self.dataset)}"
        return f"wikipedia-{self.snapshot}{copy}" + (f"-first{self.limit}" if self.limit else "")

    def fingerprint(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "snapshot": self.snapshot}

    def place(self) -> dict[str, Any]:
        return {"name": self.snapshot}

    def attribution(self) -> str:
        return (
            f"The tokens beside this file were made from the articles of Wikipedia, snapshot {self.snapshot}, by\n"
            "their contributors, licensed CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/) and GFDL,\n"
            f"as cleaned and published by the Wikimedia Foundation (dataset {self.dataset}). Changes: tokenised.\n"
            "The result is under the same licence.\n"
        )
