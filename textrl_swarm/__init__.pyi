# The names of the package root, for type checkers; at run time `__init__.py` reads them from this file.

from .config import LoraSettings as LoraSettings
from .config import PPOConfig as PPOConfig
from .config import SamplingConfig as SamplingConfig
from .config import Timeouts as Timeouts
from .errors import AdapterError as AdapterError
from .errors import AdapterMissing as AdapterMissing
from .errors import AdapterRejected as AdapterRejected
from .errors import AddressError as AddressError
from .errors import BlocksUnavailable as BlocksUnavailable
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import ExportError as ExportError
from .errors import IncompatibleLibrary as IncompatibleLibrary
from .errors import LaunchError as LaunchError
from .errors import ModelError as ModelError
from .errors import NumericsError as NumericsError
from .errors import PetalsMissing as PetalsMissing
from .errors import PromptError as PromptError
from .errors import RemoteFailure as RemoteFailure
from .errors import RewardError as RewardError
from .errors import ServerFailed as ServerFailed
from .errors import ServerMismatch as ServerMismatch
from .errors import ShapeError as ShapeError
from .errors import SwarmError as SwarmError
from .errors import TextRLSwarmError as TextRLSwarmError
from .learning.learner import Learner as Learner
from .learning.loop import train as train
from .learning.ppo import PPO as PPO
from .policies.base import Policy as Policy
from .policies.loading import load_policy as load_policy
from .rewards.classifiers import reward_model as reward_model
from .rewards.combine import CombinedReward as CombinedReward
from .rewards.combine import group_baseline as group_baseline
from .rewards.combine import rank_rewards as rank_rewards
from .runs.config import load_config as load_config
from .runs.prompts import load_prompts as load_prompts
from .swarm.local import LocalSwarm as LocalSwarm
from .textrl.actor import TextRLActor as TextRLActor
from .textrl.agent import PPOAgent as PPOAgent
from .textrl.env import TextRLEnv as TextRLEnv
from .textrl.evaluation import Evaluator as Evaluator
from .textrl.evaluation import save_agent as save_agent
from .textrl.evaluation import train_agent_with_evaluation as train_agent_with_evaluation
from .types import RolloutBatch as RolloutBatch

__version__: str
