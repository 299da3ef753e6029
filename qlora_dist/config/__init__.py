"""The run configuration: frozen pydantic models (`sections`), YAML files and overrides (`reading`), JSON schema.

`names` and `quantization` interpret values for more than one package.
"""

from .reading import dump_yaml, json_schema, load_config, parse_config
from .sections import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
)

__all__ = [
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "SourceConfig",
    "dump_yaml",
    "json_schema",
    "load_config",
    "parse_config",
]
