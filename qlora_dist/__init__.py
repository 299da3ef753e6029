"""Distributed QLoRA fine-tuning. Read `qlora_dist/train/__init__.py` first: it is the table of contents."""

__version__ = "0.2.0"
