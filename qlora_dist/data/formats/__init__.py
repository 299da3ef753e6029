"""Step 1 of the data pipeline: files or hub datasets in any format -> conversations, texts or token ids."""

from ...config.names import is_data_path as is_local
from .detect import FORMATS, check_columns, convert, detect_format, group_records, map_columns
from .fields import BadRecord, Conversation, Document, Text, Tokens
from .files import RawRecord, available_splits, find_files, read_file, read_hub
from .slices import parse_split

__all__ = [
    "FORMATS",
    "BadRecord",
    "Conversation",
    "Document",
    "RawRecord",
    "Text",
    "Tokens",
    "available_splits",
    "check_columns",
    "convert",
    "detect_format",
    "find_files",
    "group_records",
    "is_local",
    "map_columns",
    "parse_split",
    "read_file",
    "read_hub",
]
