from .api.configs import load_config as load_config
from .api.data import BuiltData as BuiltData
from .api.data import build_data as build_data
from .api.planning import plan as plan
from .api.runs import Run as Run
from .api.runs import compare as compare
from .api.trained import TrainedModel as TrainedModel
from .api.trained import load_trained as load_trained
from .api.training import train as train
from .config import RunConfig as RunConfig
from .errors import MachineFailed as MachineFailed
from .errors import RunFailed as RunFailed
from .errors import UserError as UserError
from .memory.planned import Plan as Plan

__version__: str
