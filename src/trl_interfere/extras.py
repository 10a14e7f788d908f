"""Packages that are not installed with this one."""

from importlib.util import find_spec
from pathlib import Path


def package_folder(module: str, extra: str, what: str) -> Path:
    """Folder of a package of an extra, which is not imported; where it is missing, how to install it."""
    spec = find_spec(module)
    if spec is None:
        raise ImportError(f"{what} needs the package {module!r}: pip install 'trl-interfere[{extra}]'")
    return Path(spec.submodule_search_locations[0])
