"""Modules that every rank of a test imports; the fork server imports them once."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: F401
import tensorboard  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import qlora_dist.train  # noqa: F401
