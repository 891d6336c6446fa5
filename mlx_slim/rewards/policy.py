"""The training strategy of a policy: what it draws, what that earns, and what is learned from it.

Invariant: everything about a round follows from the weights at its beginning, its rows and the
seed; the reference is the model at the start of the run. Validation rows are answered greedily and
scored by the same reward: the step with the best mean is the result. Try it:
``mlx-slim train smollm2-grpo -o runs/grpo``.
"""

from __future__ import annotations

from typing import final

import mlx.nn as nn
import numpy as np

from pathlib import Path

from mlx_slim import events
from mlx_slim.artifacts import hash_json
from mlx_slim.config.reward import RewardConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.prepare import Prepared
from mlx_slim.data.store import TokenStore
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.generate import MOST_ANSWERS, generate_batch
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.finetuning.answers import split
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.strategy import SingleModel
from mlx_slim.finetuning.task_metric import TaskMetric
from mlx_slim.models.row_limits import row_limit
from mlx_slim.reading import JsonObject
from mlx_slim.rewards.losses import PolicyLoss
from mlx_slim.rewards.objective import PolicyObjective, RoundColumns
from mlx_slim.rewards.reference import ReferenceModel
from mlx_slim.rewards.reward import Reward
from mlx_slim.rewards.scored_rows import ScoredRow, read_scored_rows, refuse_test_questions
from mlx_slim.training.callbacks import computing
from mlx_slim.training.step import CrossEntropy, Objective

_ANY = 1 << 62  # batches are limited by their positions alone: free memory would vary
