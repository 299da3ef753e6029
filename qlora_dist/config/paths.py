"""The types of config values that name files: each local path becomes absolute when the config is read, exactly once.

What is written down (a run's config.yaml, its checkpoints) then means the same in another working directory and for
another user. A value that can also be a name (of the hub, of a template) stays one unless it is a path here, see
`names`. Symbolic links are kept: what they point to may be exchanged on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from .names import is_data_path, is_model_path, is_template_path


def _absolute(path: str) -> str:
    if not path.strip():
        raise ValueError("expected a name or path, found none")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        user = path.split("/")[0]
        raise ValueError(f"{user}: there is no such user; write ./{path} for a folder of that name") from None
    except FileNotFoundError:
        raise ValueError("a relative path, but the working directory was removed; start in another folder") from None


def _model(name: str) -> str:
    return _absolute(name) if is_model_path(name) or not name.strip() else name


def _data(name: str) -> str:
    return _absolute(name) if is_data_path(name) or not name.strip() else name


def _template(name: str) -> str:
    return _absolute(name) if is_template_path(name) or not name.strip() else name


LocalPath = Annotated[str, AfterValidator(_absolute)]
ModelPath = Annotated[str, AfterValidator(_model)]  # or a name on the hub
DataPath = Annotated[str, AfterValidator(_data)]  # or a name on the hub
TemplatePath = Annotated[str, AfterValidator(_template)]  # or a named template
