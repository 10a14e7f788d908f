"""Train a model through domains in sequence with TRL, see what broke, heal it without training."""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.2.0"

_EXPORTS = {
    "Domain": "domain",
    "HealCallback": "training.callbacks",
    "HubCallback": "hub.callback",
    "InterferenceAnalyzer": "analysis.analyzer",
    "InterferenceConfig": "analysis.config",
    "InterferenceReport": "analysis.report",
    "RefreshCallback": "training.refresh",
    "Repair": "repair.repair",
    "RouteRollback": "repair.route_rollback",
    "Run": "run",
    "ScoreMatrix": "evaluation.score_matrix",
    "ScoreSummary": "evaluation.metrics",
    "Scorer": "evaluation.scorer",
    "SequentialGRPOConfig": "training.config",
    "SequentialGRPOTrainer": "training.trainer",
    "StageCallback": "training.callbacks",
    "SubspaceRollback": "repair.subspace_rollback",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .analysis.analyzer import InterferenceAnalyzer as InterferenceAnalyzer
    from .analysis.config import InterferenceConfig as InterferenceConfig
    from .analysis.report import InterferenceReport as InterferenceReport
    from .domain import Domain as Domain
    from .evaluation.metrics import ScoreSummary as ScoreSummary
    from .evaluation.score_matrix import ScoreMatrix as ScoreMatrix
    from .evaluation.scorer import Scorer as Scorer
    from .hub.callback import HubCallback as HubCallback
    from .repair.repair import Repair as Repair
    from .repair.route_rollback import RouteRollback as RouteRollback
    from .repair.subspace_rollback import SubspaceRollback as SubspaceRollback
    from .run import Run as Run
    from .training.callbacks import HealCallback as HealCallback
    from .training.callbacks import StageCallback as StageCallback
    from .training.config import SequentialGRPOConfig as SequentialGRPOConfig
    from .training.refresh import RefreshCallback as RefreshCallback
    from .training.trainer import SequentialGRPOTrainer as SequentialGRPOTrainer


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
