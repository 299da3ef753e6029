"""Distributed QLoRA fine-tuning. Read `qlora_dist/train/loop.py` first: it is the table of contents."""

__version__ = "0.1.0"
