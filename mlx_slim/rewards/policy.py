"""The training strategy of a policy: what its answers earn, and what is learned from them.

Invariant: the columns of a round follow from its answers, their rewards and the weights at the
start of the run. Rewards are on disk before they are learned from (``rewards.jsonl`` beside the
answers), so a function need not return the same twice. Validation rows are answered greedily and
scored alike: the step with the best mean is the result. Try it:
``mlx-slim train smollm2-grpo -o runs/grpo``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import mlx.nn as nn
import numpy as np

from mlx_slim import events
from mlx_slim.artifacts import hash_json, json_lines, write_text
from mlx_slim.config.reward import RewardConfig
from mlx_slim.config.rounds import RoundsConfig
from mlx_slim.config.schema import Recipe
from mlx_slim.data.batches import Batcher
from mlx_slim.data.prepare import Prepared
from mlx_slim.data.store import TokenStore
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.finetuning.answers import split
from mlx_slim.finetuning.build import Tuned, prepare_data
from mlx_slim.finetuning.round_answers import REWARDS, Round
from mlx_slim.finetuning.strategy import SingleModel
from mlx_slim.finetuning.task_metric import TaskMetric
from mlx_slim.models.row_limits import row_limit
from mlx_slim.planner.memory import Prediction
from mlx_slim.reading import JsonObject, library_errors, parse_json, short
from mlx_slim.rewards.advantages import advantages, alike, spread
from mlx_slim.rewards.losses import PolicyLoss
from mlx_slim.rewards.objective import PolicyColumns, PolicyObjective
from mlx_slim.rewards.reference import ReferenceModel, drawn_log_probs
from mlx_slim.rewards.reward import Reward, usable
from mlx_slim.rewards.scored_rows import ScoredRow, read_scored_rows, refuse_test_questions
from mlx_slim.runtime import from_first_rank
from mlx_slim.training.callbacks import Callback, computing
from mlx_slim.training.cross_entropy import CrossEntropy
from mlx_slim.training.objective import Objective
from mlx_slim.training.rounds import Begun

_ANY = 1 << 62  # a batch of answers is limited by its positions alone: free memory would vary
_NOTHING = np.empty(0, np.float32)


@final
class PolicyScorer:
    """Scores the answers of a round, and holds what the objective reads of them.

    Args:
        config: The ``reward`` section.
        rounds: The ``rounds`` section.
        reward: What scores answers.
    """

    fraction = 1.0
    log_probs = True

    def __init__(self, config: RewardConfig, rounds: RoundsConfig, reward: Reward) -> None:
        self.config, self.rounds, self.reward = config, rounds, reward
        self.answers = config.group_size
        self.until: Sequence[str] = reward.until
        self.rows: list[ScoredRow] = []
        self.reference: ReferenceModel | None = None
        self.batch_tokens, self.vocabulary = 0, 0
        self.chunk: int | None = None
        empty = _NOTHING if config.beta else None
        self.columns = PolicyColumns(_NOTHING, _NOTHING, _NOTHING, _NOTHING, empty)
        self._rewards_A = _NOTHING

    def place(self, prediction: Prediction, budget: int, observer: events.Observer) -> Prediction:
        """Return the cost of the run with what the reference keeps: adapters of the start."""
        more = 0 if self.reference is None else self.reference.nbytes
        breakdown = prediction.breakdown
        peak = prediction.predicted_peak_bytes + more
        return replace(
            prediction,
            predicted_peak_bytes=peak,
            breakdown={**breakdown, "weights": breakdown.get("weights", 0) + more},
            fits=peak <= prediction.budget_bytes,
        )

    def score_alone(self, observer: events.Observer) -> bool:
        """Return True: everything is done with the model in memory."""
        return True

    def close(self) -> None:
        """Forget the reference and the round."""
        self.reference = None

    def score(self, answers: Round, model: nn.Module, stop: Callable[[], bool]) -> Begun:
        """Score the answers, or read what they scored; compute what the reference says of them.

        Raises:
            SlimError: If the reward of an answer is none; its row is named.
        """
        config = self.config
        self._rewards_A = np.array(from_first_rank(partial(self._scored, answers)), np.float64)
        cut_A = np.array([one.stop_reason == "length" for one in answers.answers])
        self.columns = PolicyColumns.of(
            config.loss_type,
            self.rounds.max_tokens,
            answers.supervised,
            ~cut_A if config.mask_truncated else np.ones(len(cut_A), bool),
            advantages(self._rewards_A, config.group_size, divide=config.divides_by_spread),
            np.concatenate([one.log_probs or [] for one in answers.answers]),
            self._reference(answers, model),
        )
        return Begun.READY

    def _scored(self, answers: Round) -> list[float]:
        """Return the rewards, from the file where there is one."""
        file = answers.folder.path / REWARDS
        groups = [
            answers.answers[first : first + self.answers]
            for first in range(0, len(answers), self.answers)
        ]
        if not file.is_file():
            began = time.perf_counter()
            scored = [self.reward(self.rows[group[0].row], group) for group in groups]
            answers.folder.add_seconds("scoring", time.perf_counter() - began)
            lines = [
                json.dumps({"row": group[0].row, "rewards": rewards}) + "\n"
                for group, rewards in zip(groups, scored, strict=True)
            ]
            write_text(file, "".join(lines))
        with library_errors(f"{short(file)} is damaged", "remove it: the answers are scored again"):
            read = [parse_json(raw, short(file)) for _, raw in json_lines(file)]
            rewards = [float(one) for line in read for one in line["rewards"]]
            if len(rewards) != len(answers) or not all(map(usable, rewards)):
                raise ValueError(f"not {len(answers)} finite numbers")
        return rewards

    def _reference(self, answers: Round, model: nn.Module) -> np.ndarray | None:
        """Return what the reference says of every drawn token, or None without one."""
        if self.reference is None:
            return None
        longest = int(answers.lengths.max())
        batcher = Batcher(answers, max(self.batch_tokens, longest), longest, "grouped", 0)
        with self.reference.applied(model):
            return drawn_log_probs(
                model,
                batcher,
                self.rounds.temperature,
                vocabulary=self.vocabulary,
                chunk=self.chunk,
            )

    def figures(self, answers: Round) -> dict[str, float]:
        """Return what the rewards of a round are like, by TRL's names."""
        same_G = alike(self._rewards_A, self.answers)
        return {
            "reward": float(self._rewards_A.mean()),
            "reward_std": float(spread(self._rewards_A, self.answers).mean()),
            "frac_reward_zero_std": float(same_G.mean()),
            "mean_length": float(answers.supervised.mean()),
        }


@final
class PolicyStrategy:
    """Learning from rewards of answers that the model draws.

    Args:
        recipe: With a ``reward`` section.
        reward: What scores answers.
        say: Hears of what could not be checked.
    """

    targets = None

    def __init__(self, recipe: Recipe, reward: Reward, say: Callable[[str], None]) -> None:
        assert recipe.reward is not None
        self.student = SingleModel()
        self.config, self.reward = recipe.reward, reward
        self.scorer = PolicyScorer(recipe.reward, recipe.rounds, reward)
        self._say = say
        self._validation_rows: list[ScoredRow] = []

    def check(self, recipe: Recipe) -> None:
        """Accept every recipe: its sections were checked."""

    def rows(self, recipe: Recipe, tuned: Tuned, out: Path, *, unchanged: bool) -> Prepared:
        """Return the rows; refuse questions of a test; take the reference from the model.

        Raises:
            SlimError: A row that asks nothing, or what a task is scored on.
        """
        data = prepare_data(recipe, tuned, out, unchanged=unchanged)
        scorer = self.scorer
        if not scorer.rows:  # else the model is built anew in the midst of a run
            scorer.rows = self._scored_rows(recipe, tuned, out, data.train)
            if data.validation is not None and recipe.train.validate_task is None:
                self._validation_rows = self._scored_rows(recipe, tuned, out, data.validation)
            named = [find_task(one.task) for one in recipe.data.sources if one.task]
            tasks = {task.name: task for task in (*self.reward.tasks, *named)}
            questions = [*scorer.rows, *self._validation_rows]
            refuse_test_questions(questions, tasks.values(), self._say)
        scorer.batch_tokens, scorer.chunk = recipe.train.batch_tokens, recipe.train.loss_chunk
        scorer.vocabulary = tuned.config.get("vocab_size", 8)
        if self.config.beta:
            scorer.reference = ReferenceModel(tuned.model)
        if data.validation is not None and self._validation_rows:
            tuned.callbacks.append(self._validation(recipe, tuned, data.validation))
        return data

    def _scored_rows(
        self, recipe: Recipe, tuned: Tuned, out: Path, store: TokenStore
    ) -> list[ScoredRow]:
        return read_scored_rows(
            store,
            recipe.data,
            tuned.loaded.tokenizer,
            finder(out),
            max_length=recipe.train.max_length,
            limit=row_limit(tuned.config),
        )

    def _validation(self, recipe: Recipe, tuned: Tuned, store: TokenStore) -> TaskMetric:
        """Return the mean reward of greedy answers to validation rows, as a callback."""
        from mlx_slim.evaluation.scoring.generate import MOST_ANSWERS, generate_batch

        rows = self._validation_rows
        prompts = [split(*store.row(number))[0] for number in range(len(store))]
        most = recipe.rounds.longest_answers(prompts, recipe.train.max_length)
        tokenizer = tuned.loaded.tokenizer
        positions = max(
            len(prompt) + longest for prompt, longest in zip(prompts, most, strict=True)
        )
        size = max(1, min(MOST_ANSWERS, recipe.train.batch_tokens // positions))
        callbacks: list[Callback] = list(tuned.callbacks)

        def measure() -> dict[str, float | str]:
            model = tuned.model
            training = model.training
            model.eval()
            with computing(callbacks):
                answers = generate_batch(
                    model,
                    tokenizer,
                    prompts,
                    most,
                    stops=self.reward.until,
                    batch_size=size,
                    cache_bytes=_ANY,
                )
            model.train(training)
            rewards = [
                self.reward(row, [answer])[0] for row, answer in zip(rows, answers, strict=True)
            ]
            return {"metric": self.reward.metric, "value": float(np.mean(rewards))}

        identity = hash_json([self.reward.name, self.reward.metric, [row.place for row in rows]])
        return TaskMetric(self.reward.name, len(rows), measure, identity)

    def objectives(
        self, model: nn.Module, chunk: int | None, vocabulary: int, num_threads: int
    ) -> tuple[Objective, Objective | None]:
        """Return the policy loss for training, and cross-entropy for validation rows."""
        config, rounds = self.config, self.scorer.rounds
        token_loss = PolicyLoss(
            config.epsilon,
            config.upper,
            config.beta,
            config.use_bias_correction_kl,
            rounds.temperature,
        )
        sizes: tuple[Any, ...] = (model, chunk, vocabulary, num_threads)
        return (
            PolicyObjective(token_loss, lambda: self.scorer.columns, *sizes),
            CrossEntropy(*sizes),
        )

    def record(self) -> JsonObject:
        """Return the function of the command line; the recipe describes the rest."""
        source = self.reward.source
        return {} if source is None else {"reward": asdict(source)}
