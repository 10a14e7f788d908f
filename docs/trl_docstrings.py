"""Griffe extension that reads docstrings in the style of transformers and TRL.

There a parameter stands as ``name (`type`, *optional*, defaults to `value`):`` and a link as
``[`~trl.GRPOTrainer`]``. Griffe would print that markup as it is. Types and defaults of parameters are taken from the
signature instead.
"""

import re

import griffe


_LINK = re.compile(r"\[`(~?)([\w.]+)`\]")
_PARAMETER = re.compile(r"^( +\*{0,2}\w+) \(.*\):$", re.MULTILINE)
_TYPE = re.compile(r"^( +)(`[^`\n]+`(?:(?: or |, | of shape )`[^`\n]+`)*): ", re.MULTILINE)


def plain(text: str) -> str:
    """
    Rewrite one docstring in the style that Griffe knows as Google's.

    Args:
        text (`str`):
            The docstring.

    Returns:
        `str`: The docstring without markup in types.
    """
    text = _LINK.sub(lambda match: f"`{match[2].rsplit('.', 1)[-1] if match[1] else match[2]}`", text)
    text = _PARAMETER.sub(r"\1:", text)
    return _TYPE.sub(lambda match: f"{match[1]}{match[2].replace('`', '')}: ", text)


class TrlDocstrings(griffe.Extension):
    """Rewrites each docstring once, before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
