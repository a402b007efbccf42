"""The report of `moeprof study`: what all its parts say, as Markdown and as one page."""

from .results import Results
from .write import write_report

__all__ = ["Results", "write_report"]
