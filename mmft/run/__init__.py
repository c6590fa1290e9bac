"""The jobs behind the commands: `training` and `inspecting` of policies, `reward_training` and `reward_inspecting`."""

from mmft.run.checking import check_data
from mmft.run.inspecting import evaluate, generate, preview
from mmft.run.publishing import merge, push
from mmft.run.replaying import replay_batch
from mmft.run.reward_inspecting import evaluate_reward, is_reward_model, score_captions
from mmft.run.reward_training import train_reward, write_judgements
from mmft.run.training import Job, prepare, train

__all__ = [
    "Job",
    "check_data",
    "evaluate",
    "evaluate_reward",
    "generate",
    "is_reward_model",
    "merge",
    "prepare",
    "preview",
    "push",
    "replay_batch",
    "score_captions",
    "train",
    "train_reward",
    "write_judgements",
]
