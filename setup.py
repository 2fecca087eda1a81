from pathlib import Path

from setuptools import find_packages, setup

# what bench/ computes and prints with; its tests run with the others
BENCH = ["markdown-it-py>=3"]

setup(
    name="march",
    version="0.1.0",
    description="A laboratory for transformer architectures with its own fused Triton kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels", "kernels.*", "march", "march.*"]),
    entry_points={"console_scripts": ["march = march.cli:main"]},
    # tiles that `python -m kernels.tune` measured are part of the kernels
    package_data={
        "march": ["py.typed", "recipes/*.toml", "compare/*.html", "experiments/*.json"],
        "kernels": ["py.typed", "fused/measured/*.json"],
    },
    install_requires=[
        # older: memory corruption in torch.load(weights_only=True), GHSA-63cw-57p8-fm3p
        "torch>=2.10",
        # the oldest that compiles a training step within its limits: 3.7 spills (16 registers of Baseline's), 3.6 and
        # 3.5 refuse the kernels
        "triton>=3.8; platform_system == 'Linux'",
        "deepspeed>=0.17",
        "numpy>=1.26",
        "networkx>=3",  # of torch's own requirements
        "pydantic>=2.5",
        "filelock>=3.12",
        "psutil>=5.9",
        "tokenizers>=0.20",
        "datasets>=3.2",
        "pyarrow>=15",
        "gensim>=4.3",  # carries the 107 Wikipedia articles of the embedded corpus
        "mwparserfromhell>=0.6.6",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "rich>=13",
        "scipy>=1.11",  # march compare: tests, tables, pages
        "pandas>=2.1",
        "jinja2>=3.1",
    ],
    extras_require={
        # built from source against CUDA; selectable implementations and yardsticks, never required
        "gpu": ["flash-attn>=2.6"],
        "slurm": ["submitit>=1.5"],  # march compare --slurm
        # libraries that bench/ compares with, and --benchmark-histogram
        "bench": [*BENCH, "transformers>=5", "x-transformers>=2", "pytest-benchmark[histogram]>=5"],
        "dev": [
            *BENCH,
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.13",
            "statsmodels>=0.14",  # the oracle of march.compare's statistics
            "submitit>=1.5",
        ],
    },
)
