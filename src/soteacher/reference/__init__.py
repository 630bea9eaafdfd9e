"""Published accuracies, each with its source and protocol, to be read beside one's own.

``published`` holds the numbers and finds those of a data set, a pair and a method; ``released_logs`` says how far the
best epoch lies above the last; ``table`` reads the files of both.
"""

from soteacher.reference.published import Published, matching, network_name, published
from soteacher.reference.released_logs import BestLastGap, gap_best_last

__all__ = ["BestLastGap", "Published", "gap_best_last", "matching", "network_name", "published"]
