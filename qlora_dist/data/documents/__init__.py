"""Steps 2 and 3 of the data pipeline: records -> a tokenized, memory-mapped store of documents."""

from .build import build_documents
from .select import overlap_warning
from .sources import split_sources
from .store import DataStats, Documents, SourceStats

__all__ = ["DataStats", "Documents", "SourceStats", "build_documents", "overlap_warning", "split_sources"]
