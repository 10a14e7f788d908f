"""
Every import from this package, in any script or test and inside functions too, names something that is there.

Reads the sources and imports nothing: `python .ci/check_imports.py FOLDER ...`
"""

import ast
import sys
from functools import cache
from pathlib import Path


PACKAGE = "trl_interfere"
SOURCE = Path(__file__).parents[1] / "src"


@cache
def names(module: str) -> set[str] | None:
    """What a module of the package defines, or `None` if there is no such module."""
    path = SOURCE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return None
    found = {entry.stem for entry in path.glob("*")} if path.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def missing(code: str) -> list[tuple[int, str]]:
    """Lines and names of imports from the package that lead nowhere."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "trl_interfere"
            and not node.level
        ):
            known = names(node.module)
            wanted = [alias.name for alias in node.names if known is None or alias.name not in known]
            found += [(node.lineno, f"{node.module}.{name}") for name in wanted]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
            found += [(node.lineno, module) for module in modules if names(module) is None]
    return found


if __name__ == "__main__":
    files = [file for folder in sys.argv[1:] for file in sorted(Path(folder).rglob("*.py"))]
    lines = [f"{file}:{line}: no {name}" for file in files for line, name in missing(file.read_text(encoding="utf-8"))]
    print("\n".join(lines) or f"Imports of {len(files)} files lead somewhere")
    sys.exit(bool(lines))
