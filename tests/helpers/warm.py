"""What every rank of a test imports and computes first; the fork server does it once, before it forks them."""

import gc
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: F401
import deepspeed.ops
import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3
import pytest  # noqa: F401
import tensorboard  # noqa: F401
import torch._inductor.compile_fx
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import qlora_dist.train  # noqa: F401
from qlora_dist.cluster import provenance

_ = deepspeed.ops.__compatible_ops__  # starts compilers
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
provenance.code_digest(), provenance.commit()  # kept for all runs
# All this lives as long as the process: a collection in a rank (there are two in each run) would visit, and so copy,
# every page of it
gc.collect()
gc.freeze()
