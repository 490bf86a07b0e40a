"""A DomainBed checkout: where it is, its modules, and what they need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from domainbed_sfp.core.errors import UserError, unknown_name

# Modules that DomainBed's code imports beyond our own requirements, and the packages that bring them.
REQUIREMENTS = {
    "backpack": "backpack-for-pytorch",
    "gdown": "gdown",
    "imageio": "imageio",
    "parameterized": "parameterized",
    "timm": "timm",
    "tqdm": "tqdm",
    "wilds": "wilds",
}


@dataclass(frozen=True)
class Checkout:
    """An imported DomainBed checkout."""

    root: Path
    algorithms: ModuleType
    command_launchers: ModuleType
    datasets: ModuleType
    hparams_registry: ModuleType


def find_checkout(domainbed_root: str | None) -> Path:
    """The absolute path of a checkout; a UserError if there is none at `domainbed_root`."""
    if not domainbed_root:
        raise UserError("which DomainBed? give its checkout with --domainbed_root or in DOMAINBED_ROOT")
    root = Path(domainbed_root).resolve()
    if not root.is_dir():
        raise UserError(f"--domainbed_root: there is no folder {domainbed_root!r}")
    if not _is_checkout(root):
        near = [place for place in (root.parent, *sorted(root.iterdir())) if _is_checkout(place)]
        hint = f"; did you mean {str(near[0])!r}?" if near else ""
        raise UserError(
            f"--domainbed_root: {domainbed_root!r} is no DomainBed checkout: "
            f"there is no domainbed/scripts/train.py in it{hint}"
        )
    return root


def _is_checkout(folder: Path) -> bool:
    return (folder / "domainbed" / "scripts" / "train.py").is_file()


def check_script(root: Path, script: str) -> None:
    """Raises UserError, naming the nearest one, unless the checkout has the script."""
    scripts = sorted(file.stem for file in (root / "domainbed" / "scripts").glob("*.py") if file.stem != "__init__")
    if script not in scripts:
        raise unknown_name("script of DomainBed", script, scripts)


@contextmanager
def opened(root: Path) -> Iterator[Checkout]:
    """The checkout's modules, imported; afterwards this process is as it was, and the checkout too.

    Raises UserError if a requirement of DomainBed is not installed, or another `domainbed` is in the way.
    """
    before = sys.path[:], sys.dont_write_bytecode, set(sys.modules)
    # The first place, since the current directory may hold another checkout.
    sys.path.insert(0, str(root))
    # No __pycache__ in a checkout that is not ours.
    sys.dont_write_bytecode = True
    try:
        yield _load(root)
    finally:
        sys.path[:], sys.dont_write_bytecode, names = before
        for name in set(sys.modules) - names:
            if name == "domainbed" or name.startswith("domainbed."):
                del sys.modules[name]


def _load(root: Path) -> Checkout:
    names = ("algorithms", "command_launchers", "datasets", "hparams_registry")
    try:
        modules = {name: importlib.import_module(f"domainbed.{name}") for name in names}
    except ModuleNotFoundError as error:
        if top_module(error) == "domainbed":
            raise UserError(f"--domainbed_root: the checkout {str(root)!r} is incomplete: {error}") from error
        raise missing_requirements(error) from error
    for name, module in modules.items():
        if Path(module.__file__ or "").resolve().parent != root / "domainbed":
            raise UserError(
                f"domainbed.{name} was imported from {module.__file__} before the checkout {str(root)!r} "
                "could be; an installed package with algorithms must not bring a DomainBed of its own"
            )
    return Checkout(root, **modules)


def missing_requirements(error: ModuleNotFoundError) -> UserError:
    """Names everything that DomainBed imports and is not installed, not only what `error` met first."""
    missing = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    packages = ["'domainbed_sfp[upstream]'"] if missing else []
    met = top_module(error)
    if met not in REQUIREMENTS:
        missing.append(met)
        packages.append(met)
    return UserError(
        f"DomainBed needs modules that are not installed: {', '.join(missing)}; pip install {' '.join(packages)}"
    )


def top_module(error: ModuleNotFoundError) -> str:
    """The package whose module is missing."""
    return (error.name or str(error)).partition(".")[0]
