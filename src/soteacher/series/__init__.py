"""A series of studies: one thing of a study is varied at a time, each alone around a common base.

``config`` makes the studies of the settings, ``run`` runs them.
"""

from soteacher.series.config import Axis, SeriesConfig, SeriesPoint, read_plan
from soteacher.series.run import report_again, run_series

__all__ = ["Axis", "SeriesConfig", "SeriesPoint", "read_plan", "report_again", "run_series"]
