"""The run configuration: frozen pydantic models (`sections`), YAML files and overrides (`reading`), JSON schema.

`names` and `quantization` interpret values for more than one package.
"""

from .reading import dump_yaml, json_schema, load_config, parse_config
from .sections import (
    BatchConfig,
    DataConfig,
    DataFormat,
    LoggingConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    StrategyConfig,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "DataConfig",
    "DataFormat",
    "LoggingConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "StrategyConfig",
    "TrainConfig",
    "dump_yaml",
    "json_schema",
    "load_config",
    "parse_config",
]
