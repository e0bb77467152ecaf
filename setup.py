"""Three packages, one install: `pip install torch==2.13.0 && pip install -e .` (torch first, see README)."""

from setuptools import find_packages, setup

PACKAGE_DIR = {
    "megatron_keye": "megatron_keye",
    "keye_kernels": "kernels/keye_kernels",
    "keye_data": "data_pipeline/keye_data",
}
RAY = "ray>=2.60"  # shards built, clips decoded and rollouts made on many machines
packages = [
    name if sub is None else f"{name}.{sub}"
    for name, folder in PACKAGE_DIR.items()
    for sub in [None, *find_packages(folder)]
]

setup(
    name="megatron_keye",
    version="0.1.0",
    description="Megatron-Core training stack for Kwai Keye-VL-2.0-30B-A3B: sparse attention, video, recipes, conversion",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages,
    package_dir=PACKAGE_DIR,
    package_data={"": ["*.jinja", "*.md"]},
    install_requires=[
        "torch==2.13.0",  # the build (CPU or CUDA) is whatever was installed first
        "megatron-core>=0.16.1,<0.20",
        "megatron-energon==7.4.1",
        "nvidia-dali-cuda130==2.4.0",
        "webdataset==1.0.2",
        "av==18.1.0",
        "transformers==5.23.0",
        "safetensors",
        "omegaconf==2.4.0",
        "wandb==0.31.0",
        "numpy<2.4",  # Triton 3.6's interpreter breaks on 2.4
        "psutil",  # Megatron's checkpoint writer hangs without it
        "einops",
        "rich",
        "matplotlib",
        "pillow",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.8"],  # unverified: no machine of ours has built it
        "cluster": [RAY],
        "rollout": [RAY, "math-verify", "bm25s", "scipy"],
        "dev": [RAY, "pytest", "pytest-timeout", "ruff", "mypy", "types-PyYAML"],
    },
)
