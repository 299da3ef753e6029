"""Documents built from small sources with a byte-level tokenizer."""

import json

from helpers.tiny_tokenizers import byte_level_tokenizer
from qlora_dist.data.documents import build_documents

ALPACA = [{"instruction": f"Say {i}", "input": "", "output": f"The number {i}." * (1 + i % 5)} for i in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(tmp_path, *sources, tokenizer=None, **options):
    return build_documents(
        sources,
        tokenizer or byte_level_tokenizer(),
        **{"row_tokens": 512, "cache_dir": tmp_path / "cache", **options},
    )


def texts(documents, tokenizer=None):
    return [(tokenizer or byte_level_tokenizer()).decode(documents[i].input_ids) for i in range(len(documents))]


def answers(documents):
    tokenizer = byte_level_tokenizer()
    examples = (documents[i] for i in range(len(documents)))
    return [tokenizer.decode(example.input_ids[example.is_label]) for example in examples]
