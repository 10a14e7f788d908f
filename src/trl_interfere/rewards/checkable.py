"""Which tests of functions can be run without showing a program what is expected of it."""

import ast
import sys
import threading
from collections.abc import Iterator
from importlib import import_module

from .calls import free_names


_LOCK = threading.Lock()  # CPython 3.11 fails when two threads make syntax trees at the same time
# Modules of which tests may import all names.
_WHOLE_MODULES = "typing collections functools itertools heapq bisect math operator string statistics".split()
_PYTEST = {"raises", "approx", "fail", "main", "mark", "mark.parametrize", "mark.timeout"}
_SET_UPS = {"setup_module", "setup_function", "setup_class", "setUpModule"}
# What only an exception of the program itself could be, or what it prints, or a second process.
_ELSEWHERE = set(
    "StopIteration StopAsyncIteration SystemExit KeyboardInterrupt GeneratorExit stdin stdout stderr __stdout__ "
    "redirect_stdout redirect_stderr patch mock Mock MagicMock asyncio subprocess multiprocessing".split()
)


class _Flow:
    """
    Where the results of a program go in its tests, by the names that hold them.

    Args:
        body (`list[ast.stmt]`):
            One test, with what it shares with the others.
        names (`set[str]`):
            Names of the program.
    """

    def __init__(self, body: list[ast.stmt], names: set[str]):
        self.nodes = [node for statement in body for node in ast.walk(statement)]
        self.reach, self.origins = set(names), {}  # names that lead into the program; whose results a name may hold
        self.functions: dict[str, ast.FunctionDef] = {}
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                method = bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
                self.functions[f"self.{node.name}" if method else node.name] = node
        while self._spread():
            pass

    def _spread(self) -> bool:
        """Follow every assignment, argument and return value once. Whether that found anything new."""
        before = len(self.reach), sum(map(len, self.origins.values()))
        for node in self.nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._flow(target, node.value)
            elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
                self._flow(node.target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._flow(node.target, node.iter)
            elif isinstance(node, ast.withitem):
                self._flow(node.optional_vars, node.context_expr)
            elif isinstance(node, ast.Call):
                self._flow_into(node)
        for name, function in self.functions.items():
            for node in ast.walk(function):
                if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)):
                    self.origins.setdefault(name, set()).update(self.sources(node.value))
        return before != (len(self.reach), sum(map(len, self.origins.values())))

    def _flow(self, target: ast.expr | None, value: ast.expr | None) -> None:
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        for name in filter(None, map(_root, parts)):
            self.origins.setdefault(name, set()).update(self.sources(value))
            if self._leads(value):
                self.reach.add(name)

    def _flow_into(self, call: ast.Call) -> None:
        name = _root(call.func)
        if name in self.functions:
            parameters = [item.arg for item in self.functions[name].args.args][name.startswith("self.") :]
            for parameter, value in zip(parameters, call.args, strict=False):
                self._flow(ast.Name(parameter), value)
            for keyword in call.keywords:
                self._flow(ast.Name(keyword.arg or ""), keyword.value)
        elif name is not None and name not in self.reach and isinstance(call.func, ast.Attribute):
            for value in _arguments(call):  # of a method, such as `append`, that keeps them
                self.origins.setdefault(name, set()).update(self.sources(value))

    def _leads(self, node: ast.expr | None) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(map(self._leads, node.elts))
        return _root(node) in self.reach

    def called(self, call: ast.Call) -> str | None:
        """The function or method of the program that is called."""
        root = _root(call.func)
        return None if root not in self.reach else getattr(call.func, "attr", root)

    def makes(self, node: ast.AST) -> bool:
        """Whether an object of a class of the program is made, to judge by its name."""
        if not isinstance(node, ast.Call) or self.called(node) is None:
            return False
        plain = isinstance(node.func, ast.Name) or _root(node.func) == getattr(node.func.value, "id", "") == "solution"
        return plain and self.called(node).lstrip("_")[:1].isupper()

    def sources(self, node: ast.AST | None) -> set[str]:
        """Functions of the program whose results an expression may hold."""
        found = set()
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, (ast.Name, ast.Attribute)):
                found |= self.origins.get(_root(part), set())
            elif isinstance(part, ast.Call) and self.called(part) is not None and not self.makes(part):
                found.add(self.called(part))
        return found

    def problem(self) -> str:
        """What keeps the test from being run here."""
        bound = {_root(target) for node in self.nodes for target in _displays(node)}
        compared = {_root(part) for node in self.nodes if isinstance(node, ast.Compare) for part in ast.walk(node)}
        tried = {id(part) for node in self.nodes if isinstance(node, (ast.With, ast.Try)) for part in ast.walk(node)}
        for node in self.nodes:
            if isinstance(node, (ast.Compare, ast.BinOp)):
                operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.left, node.right]
                if any(map(self.makes, operands)):
                    return "compares objects of the program"
            call = node.value if isinstance(node, ast.Expr) else node
            if not isinstance(call, ast.Call) or (name := self.called(call)) is None:
                continue
            own = {name, *self.origins.get(_root(call.func), ())}
            others = {source for value in _arguments(call) for source in self.sources(value)} - own
            if others:
                return f"hands what {min(others)} of the program returns to {name} of the program"
            for value in _arguments(call):
                if isinstance(value, ast.Lambda) or getattr(value, "id", "") in self.functions:
                    return f"hands a function to {name} of the program"
                alone = call is not node and id(node) not in tried  # a call for the sake of what it changes
                if alone and isinstance(value, ast.Name) and value.id in bound & compared:
                    return f"looks at an argument that {name} of the program changes"
        return ""


def program_names(tests: str) -> set[str]:
    """
    Names in tests that are those of the program.

    Args:
        tests (`str`):
            Text of the tests.

    Returns:
        `set[str]`: Names.

    Raises:
        `SyntaxError` or `ValueError`: If the text is no program.
    """
    with _LOCK:
        return _program_names(ast.parse(tests))


def _program_names(tree: ast.AST) -> set[str]:
    names = {name for name in free_names(tree) if not name.startswith("__")} - {"self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "solution"}
        elif isinstance(node, ast.ImportFrom) and node.module == "solution":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in _WHOLE_MODULES and node.names[0].name == "*":
            names -= set(dir(import_module(node.module)))
    return names - {"*"}


def unsupported(tests: str) -> str:
    """
    Why tests that call functions of a program cannot be run here, as far as their text tells.

    A program may neither see an expected result nor decide whether it was met. So what one of its functions returns is
    not handed to another one: in `assert is_close(f(1), 0.5)`, with an `is_close` of the program, no `f` would be
    wrong.

    Args:
        tests (`str`):
            Text of the tests.

    Returns:
        `str`: The reason; empty if there is none.
    """
    try:
        with _LOCK:
            compile(tests, "tests.py", "exec", dont_inherit=True)
            return _unsupported(ast.parse(tests))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"no Python ({error})"


def _unsupported(tree: ast.Module) -> str:
    names = _program_names(tree)
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
            if node.names[0].name == "*" and node.module not in (*_WHOLE_MODULES, "solution"):
                return f"imports all of {modules[0]}"
            if node.module == "pytest" and not {alias.name for alias in node.names} <= _PYTEST:
                return "needs more of pytest than is there"
        for module in modules:
            if module.split(".")[0] not in {*sys.stdlib_module_names, "solution", "pytest"}:
                return f"imports {module}"
            if module == "pytest" and isinstance(node, ast.Import) and any(alias.asname for alias in node.names):
                return "imports pytest under another name"
        parts = [*modules, *(alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias))]
        parts += [getattr(node, "attr", ""), getattr(node, "id", "")]
        if found := _ELSEWHERE.intersection(part for whole in parts for part in whole.split(".")):
            return f"needs {min(found)}"
        if isinstance(node, ast.Attribute) and _root(node) in ("pytest", "mark"):
            dotted = ast.unparse(node)
            if dotted.removeprefix("pytest.") not in _PYTEST:
                return f"needs {dotted}"
        # Names that stand for classes, of which there is none in the process of the tests.
        classes = []
        if isinstance(node, ast.ExceptHandler):
            classes = [node.type]
        elif isinstance(node, ast.ClassDef):
            classes = node.bases
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if function in ("raises", "assertRaises", "assertRaisesRegex"):
                classes = node.args[:1]
            elif function in ("isinstance", "issubclass", "assertIsInstance"):
                classes = node.args[1:2]
        for part in (part for item in classes if item is not None for part in ast.walk(item)):
            if isinstance(part, ast.Name) and part.id in names:
                return f"needs the class {part.id} of the program"
    if not names:
        return "calls nothing of the program"
    shared, tests = [], []
    for node in tree.body:
        methods = node.body if isinstance(node, ast.ClassDef) else []
        if _is_test(node):
            tests.append([node])
        elif any(map(_is_test, methods)):
            if node.decorator_list:
                return f"needs @{ast.unparse(node.decorator_list[0])}"
            rest = [item for item in methods if not _is_test(item)]
            tests += [[*rest, item] for item in methods if _is_test(item)]
        else:
            shared.append(node)
    problems = (_Flow([*shared, *test], names).problem() for test in tests or [[]])
    return next(filter(None, [*map(_set_up, ast.walk(tree)), *problems]), "")


def _is_test(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test")


def _set_up(node: ast.AST) -> str:
    """What a test function takes for granted that nobody here provides."""
    if isinstance(node, ast.AsyncFunctionDef) or getattr(node, "name", "") in _SET_UPS:
        return f"needs {node.name}"
    if not _is_test(node):
        return ""
    given = {"self"}
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("parametrize") and mark.args:
            try:
                found = ast.literal_eval(mark.args[0])
            except ValueError:
                return "needs names of parameters"
            given |= {name.strip() for name in (found.split(",") if isinstance(found, str) else found)}
        elif not isinstance(mark, ast.Call) or not ast.unparse(mark.func).endswith("timeout"):
            return f"needs @{ast.unparse(mark)}"
    missing = {item.arg for item in node.args.args} - given
    return f"needs {min(missing)}" if missing else ""


def _displays(node: ast.AST) -> Iterator[ast.expr]:
    """Names that are bound to a list, a set or a dictionary, which a program could change."""
    kinds = (ast.List, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp)
    if isinstance(node, ast.Assign) and isinstance(node.value, kinds):
        yield from node.targets


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _root(node: ast.AST | None) -> str | None:
    """The name that an expression begins with; of `self.x.y`, `self.x`."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript, ast.Starred, ast.Await)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "cls"):
            return f"self.{node.attr}"
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
