"""The four domains that ship."""

from .code import code_domain as code_domain
from .math import math_domain as math_domain
from .qa import qa_domain as qa_domain
from .sources import DataOptions as DataOptions
from .writing import writing_domain as writing_domain
