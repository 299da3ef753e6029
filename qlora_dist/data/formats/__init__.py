"""Step 1 of the data pipeline: files or hub data of any format -> conversations, texts or token ids."""

from .detect import FORMATS, detect_format, group_records, map_columns
from .fields import BadRecord, Conversation, Document, Text, Tokens
from .files import RawRecord, find_files, is_local, own_splits, read_file, read_hub

__all__ = [
    "FORMATS",
    "BadRecord",
    "Conversation",
    "Document",
    "RawRecord",
    "Text",
    "Tokens",
    "detect_format",
    "find_files",
    "group_records",
    "is_local",
    "map_columns",
    "own_splits",
    "read_file",
    "read_hub",
]
