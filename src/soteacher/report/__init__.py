"""What a finished run says: the page ``report.html`` and the summary table.

``record`` reads a run's folder, ``tables`` puts its numbers into words and rows, ``published`` sets those of others
beside them, ``charts`` draws them, ``page`` writes the page from ``page.html`` and ``page.css``.
"""

from soteacher.report.page import write_report
from soteacher.report.published import PublishedNumbers, published_numbers
from soteacher.report.record import NetworkRecord, RunRecord, read_run
from soteacher.report.tables import Table, cost_table, summary_sentence, summary_table

__all__ = [
    "NetworkRecord",
    "PublishedNumbers",
    "RunRecord",
    "Table",
    "cost_table",
    "published_numbers",
    "read_run",
    "summary_sentence",
    "summary_table",
    "write_report",
]
