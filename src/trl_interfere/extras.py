"""Packages that a domain needs and that are not installed with this one."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def require(module: str, extra: str, what: str) -> ModuleType:
    """
    Import a package of an extra.

    Args:
        module (`str`):
            Name to import.
        extra (`str`):
            Extra of this package that installs it.
        what (`str`):
            What needs it, for the message.

    Returns:
        `ModuleType`: The module.

    Raises:
        `ValueError`: If it is not installed.
    """
    _find(module, extra, what)
    return import_module(module)


def package_file(module: str, path: str, extra: str, what: str) -> Path:
    """
    A data file of a package of an extra. The package is not imported.

    Args:
        module (`str`):
            Name of the package.
        path (`str`):
            File, relative to the folder of the package.
        extra (`str`):
            Extra of this package that installs it.
        what (`str`):
            What needs it, for the message.

    Returns:
        `pathlib.Path`: The file.

    Raises:
        `ValueError`: If the package is not installed, or has no such file.
    """
    folder = Path(_find(module, extra, what).submodule_search_locations[0])
    if not (folder / path).is_file():
        raise ValueError(f"{what}: expected the file {path} in the package {module!r}, found none in {folder}")
    return folder / path


def _find(module: str, extra: str, what: str):
    spec = find_spec(module)
    if spec is None:
        raise ValueError(
            f"{what} needs the package {module!r}, which is not installed: pip install 'trl-interfere[{extra}]'"
        )
    return spec
