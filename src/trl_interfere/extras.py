"""Packages that are not installed with this one."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import a package of an extra, or say how to install it."""
    _find(module, extra, what)
    return import_module(module)


def package_file(module: str, path: str, extra: str, what: str) -> Path:
    """A data file of a package of an extra. The package is not imported."""
    folder = Path(_find(module, extra, what).submodule_search_locations[0])
    if not (folder / path).is_file():
        raise ValueError(f"{what}: expected the file {path} in the package {module!r}, found none in {folder}")
    return folder / path


def _find(module: str, extra: str, what: str):
    spec = find_spec(module)
    if spec is None:
        raise ImportError(
            f"{what} needs the package {module!r}, which is not installed: pip install 'trl-interfere[{extra}]'"
        )
    return spec
