"""Log-likelihoods of continuations, with every shared prefix computed once.

Invariant: a score is the one that a plain forward pass over the request alone gives, up to the
rounding of float sums (over rounded keys and values, where these are to be rounded); and the scores
of one call depend on its requests and on the scorer's settings only, never on earlier calls, so
work that is split, resumed or distributed over machines gives the same bits. The head runs on
scored positions only; answers of one token need one pass for all choices. Try it:
``mlx-slim bench eval MODEL --task hellaswag --against mlx-lm``.
Legend: R rows, T positions, N scored positions, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_slim import blas
from mlx_slim.data.collate import TokenNode
from mlx_slim.evaluation.scoring import prefix_tree
from mlx_slim.evaluation.scoring.list_plan import ScoredList, balanced, listed, subtrees
from mlx_slim.evaluation.scoring.prefix_cache import (
    Pool,
    Sharing,
    batch_pool,
    branch_caches,
    grown,
    probe,
)
from mlx_slim.evaluation.scoring.requests import Request, common_prefix, shared_length
from mlx_slim.models import structure
from mlx_slim.models.attention import UNBOUNDED
from mlx_slim.models.host_exponentials import host_exponentials
from mlx_slim.models.kv_cache import KVFormat, rounded_caches
from mlx_slim.models.logits import logsumexp
from mlx_slim.models.parallel import divided_by
from mlx_slim.models.rope import boundary_of, set_length
from mlx_slim.models.token_list import Before, TokenList, longest_row, token_lists
from mlx_slim.progress import Stage, stage
from mlx_slim.runtime import default_num_threads, on_gpu
from mlx_slim.threads import run_in_threads

MEMORY = 2**30  # bytes of keys and values that are cached for sharing
SCORING_BYTES = 2 * MEMORY  # of a job: the scorer takes half of a power of two for its cache
HEAD_LOGITS = (
    1 << 24
)  # that exist at one time; on a CPU, for each thread, a half where rows are enough
HEAD_ROWS = 128  # so many, below HEAD_LOGITS: a product of fewer reads its weights too often
MIN_ROOT = 16  # a shorter prefix of everything is not cached between calls
MIN_BATCH = 64  # positions: a smaller batch only costs overhead

# (request, log p, whether first choice) of each scored target of a batch, and its keys and values
Computed = tuple[list[tuple[int, float, bool]], Pool]


@dataclass(frozen=True)
class RequestScore:
    """Score of a continuation.

    Attributes:
        loglikelihood: Σ log p(token | all before it), nats.
        greedy: Whether every token is the model's first choice.
    """

    loglikelihood: float
    greedy: bool


class LoglikelihoodScorer:
    """Scores requests on one model.

    Args:
        model: Any mlx-lm model; put into evaluation mode, otherwise unchanged.
        batch_tokens: Most positions of a batch, padding included; None chooses by device.
        lists: Whether a CPU may compute lists of tokens (``list_plan.py``), no padded rows.
        memory: Bytes of keys and values that may be kept for sharing; None takes 1 GiB.
        kv_format: What all keys and values are rounded to, also those of a request itself: as if
            the model had read it token by token with a quantized cache. None leaves them.

    Attributes:
        tokens_computed: Positions that went through the model so far, padding included.
        tokens_minimum: The fewest possible for the same requests: every distinct prefix once.
        tokens_root: The part of both that was for roots.
        notes: What the user should know, such as why prefixes cannot be shared.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_tokens: int | None = None,
        memory: int | None = None,
        kv_format: KVFormat | None = None,
        lists: bool = True,
    ) -> None:
        self._model, self._kv_format = model, kv_format
        self.memory = memory or MEMORY
        self.tokens_computed = self.tokens_minimum = self.tokens_root = 0
        self.notes: list[str] = []
        model.eval()
        set_length(model, boundary_of(model))  # rows are no longer; shared prefixes and padding are
        split = structure.split(model)
        self._body: Callable[..., mx.array] = split.body if split else model
        self._head: Callable[[mx.array], mx.array] = split.head if split else lambda logits: logits
        if split is None:
            self.notes.append("the model does not split into body and head: full logits are used")
        self._vocabulary = split.head.vocabulary if split else 1
        # Passes of a divided model must come in the same order on all ranks: one at a time.
        self._one_at_a_time = divided_by(model) is not None
        lists = lists and not (on_gpu() or self._one_at_a_time or kv_format)
        self._longest_listed = longest_row(model) if lists else 0
        self.batch_tokens = batch_tokens or self._default_batch()
        self.sharing = self._longest_listed >= UNBOUNDED or not self._sharing.reason
        if not self.sharing:
            self.notes.append(f"prefixes are not shared: {self._sharing.reason}")
        self._root: tuple[tuple[int, ...], Pool] = ((), [])
        self._root_before: tuple[tuple[int, ...], Before] = ((), [])

    @functools.cached_property
    def _sharing(self) -> Sharing:
        """How prefixes can be shared where rows are padded."""
        return probe(self._model, self._body)

    @property
    def lists(self) -> bool:
        """Whether rows, or those that fit into a window, are computed as lists of tokens."""
        return self._longest_listed > 0

    def _default_batch(self) -> int:
        if on_gpu():
            return 4096
        return 1024 if self.lists else 512

    def score(self, requests: Sequence[Request], root: tuple[int, ...] = ()) -> list[RequestScore]:
        """Return the score of each request, in order.

        Args:
            requests: Any number; they are batched.
            root: Ids that begin this and further calls' requests, such as few-shot examples: their
                keys and values are cached until a call has another root.
        """
        if not requests:
            return []
        with host_exponentials(), token_lists() if self.lists else contextlib.nullcontext():
            return self._score(requests, root)

    def _score(self, requests: Sequence[Request], root: tuple[int, ...]) -> list[RequestScore]:
        root = self.shared_root(requests, root)
        as_lists = max(len(request.inputs) for request in requests) <= self._longest_listed
        pool = [] if as_lists else self._pool_of(root)
        before = self._before(root) if as_lists else []
        if root:
            cut = len(root)
            requests = [Request(r.ids[cut:], r.start - cut) for r in requests]
        self.tokens_minimum += prefix_tree.fewest_tokens(requests)
        scores: list[RequestScore] = []
        if as_lists:
            nodes = prefix_tree.build(requests, longest=self.batch_tokens)
            with stage("scoring", sum(len(node.tokens) for node in nodes), "tokens") as reading:
                computed = self._compute_lists(nodes, before, reading)
            return [computed[index] for index in range(len(requests))]
        rounds = self._within_memory(list(requests))
        total = sum(len(node.tokens) for _, nodes in rounds for node in nodes)
        with stage("scoring", total, "tokens") as reading:
            for count, nodes in rounds:
                computed = self._compute(nodes, pool, reading)
                scores += [computed[index] for index in range(count)]
        return scores

    def shared_root(self, requests: Sequence[Request], root: tuple[int, ...]) -> tuple[int, ...]:
        """Return the part of ``root`` that all requests begin with and leave a position after."""
        if not self.sharing:
            return ()
        length = min(shared_length(root, common_prefix(requests)), *(r.start - 1 for r in requests))
        return root[:length] if length >= MIN_ROOT else ()

    def _pool_of(self, root: tuple[int, ...]) -> Pool:
        """Return keys and values of ``root``, computed unless it is the cached one."""
        if root and self._root[0] != root:
            self.tokens_minimum += len(root)
            pool: Pool = []
            for begin in range(0, len(root), self.batch_tokens):
                node = prefix_tree.Node(
                    root[begin : begin + self.batch_tokens], -1, 0, 0, inner=True
                )
                pool = grown(pool, [self._forward([node], [np.arange(begin)], pool)[1]])
            self.tokens_computed += len(root)
            self.tokens_root += len(root)
            self._root = (root, pool)
        return self._root[1] if root else []

    def _before(self, root: tuple[int, ...]) -> Before:
        """Return keys and values of ``root`` for lists, computed unless it is the cached one."""
        if root and self._root_before[0] != root:
            self.tokens_minimum += len(root)
            self.tokens_computed += len(root)
            self.tokens_root += len(root)
            before: Before = []
            for begin in range(0, len(root), self.batch_tokens):
                tokens = list(root[begin : begin + self.batch_tokens])
                one = ScoredList(tokens, [TokenNode(0, len(tokens), 0, ())], [])
                before = self._side_by_side(self._forward_list, [(one, before, True)])[0][1]
            self._root_before = (root, before)
        return self._root_before[1] if root else []

    def _compute_lists(
        self, nodes: list[prefix_tree.Node], before: Before, reading: Stage
    ) -> dict[int, RequestScore]:
        """Return the score of each request that ``nodes`` score, behind the root ``before``."""
        scores: dict[int, RequestScore] = {}

        def forward(one: ScoredList, before: Before, keep: bool) -> tuple[list, Before]:
            computed = self._forward_list(one, before, keep)
            reading.advance(len(one.tokens))
            return computed

        below = subtrees(nodes)
        sizes = [sum(len(nodes[i].tokens) for i in indices) for indices in below]
        waiting = [([i for i, node in enumerate(nodes) if node.parent < 0], before)]
        while waiting:
            tops, before = waiting.pop()
            small = [top for top in tops if sizes[top] <= self.batch_tokens]
            large = [top for top in tops if sizes[top] > self.batch_tokens]
            threads = default_num_threads()
            groups = balanced([sizes[top] for top in small], self.batch_tokens, threads)
            work = [
                (listed(nodes, [below[small[i]] for i in group]), before, False) for group in groups
            ]
            if later := large[threads:]:  # keys and values of few are in memory at one time
                waiting.append((later, before))
            large = large[:threads]
            work += [(listed(nodes, [range(top, top + 1)]), before, True) for top in large]
            self.tokens_computed += sum(len(one.tokens) for one, _, _ in work)
            results = self._side_by_side(forward, work)
            for top, (_, after) in zip(large, results[len(groups) :], strict=True):
                waiting.append(([i for i in below[top] if nodes[i].parent == top], after))
            for token_scores, _ in results:
                for index, value, first in token_scores:
                    so_far = scores.get(index, RequestScore(0.0, True))
                    scores[index] = RequestScore(
                        so_far.loglikelihood + value, so_far.greedy and first
                    )
        return scores

    def _forward_list(
        self, one: ScoredList, before: Before, keep: bool
    ) -> tuple[list[tuple[int, float, bool]], Before]:
        """Compute a list: the score of each scored target, and keys and values to ``keep``."""
        passed = TokenList(one.nodes, before, keep=keep)
        with passed.computed():
            hidden_1PD = self._body(mx.array([one.tokens]), cache=None)
            mx.eval(hidden_1PD)
        return (self._targets(hidden_1PD[0], one.pairs) if one.pairs else []), passed.pairs

    def _within_memory(self, requests: list[Request]) -> list[tuple[int, list[prefix_tree.Node]]]:
        """Return groups of consecutive requests, as (number, nodes), that fit into ``memory``."""
        nodes = prefix_tree.build(requests, longest=self.batch_tokens, sharing=self.sharing)
        inner = sum(len(node.tokens) for node in nodes if node.inner)
        if len(requests) == 1 or inner * self._sharing.position_bytes <= self.memory:
            return [(len(requests), nodes)]
        middle = len(requests) // 2
        return [
            part
            for half in (requests[:middle], requests[middle:])
            for part in self._within_memory(half)
        ]

    def _compute(
        self, nodes: list[prefix_tree.Node], pool: Pool, reading: Stage
    ) -> dict[int, RequestScore]:
        """Return the score of each request that ``nodes`` score; ``pool`` holds the root."""
        places = pool[0][0].shape[0] if pool else 0
        paths = {-1: np.arange(places)}  # node -> places in the pool of the positions up to its end
        scores: dict[int, RequestScore] = {}
        levels = sorted({node.level for node in nodes if node.inner})
        steps = [[i for i, n in enumerate(nodes) if n.inner and n.level == at] for at in levels]
        steps.append([i for i, n in enumerate(nodes) if not n.inner])  # all leaves at once
        for step in steps:
            batches = prefix_tree.batches(nodes, step, self._budget(nodes, step))
            work = [
                ([nodes[i] for i in rows], [paths[nodes[i].parent] for i in rows], pool)
                for rows in batches
            ]
            self.tokens_computed += sum(len(rows) * len(nodes[rows[0]].tokens) for rows in batches)
            results = self._run(work, reading)
            for rows, (token_scores, _) in zip(batches, results, strict=True):
                for index, value, first in token_scores:
                    before = scores.get(index, RequestScore(0.0, True))
                    scores[index] = RequestScore(
                        before.loglikelihood + value, before.greedy and first
                    )
                for i in rows if nodes[rows[0]].inner else ():
                    row_places = np.arange(places, places + len(nodes[i].tokens))
                    paths[i] = np.concatenate([paths[nodes[i].parent], row_places])
                    places += len(row_places)
            pool = grown(pool, [part for _, part in results])
        return scores

    def _budget(self, nodes: list[prefix_tree.Node], step: list[int]) -> int:
        """Return the positions of a batch such that all threads get batches of like size."""
        total = sum(len(nodes[i].tokens) for i in step)
        threads = 1 if self._one_at_a_time else default_num_threads()
        num_batches = math.ceil(total / (threads * self.batch_tokens)) * threads
        return min(self.batch_tokens, max(MIN_BATCH, math.ceil(1.05 * total / max(num_batches, 1))))

    def _run(self, work: list[tuple], reading: Stage) -> list[Computed]:
        """Compute batches: on a CPU side by side, one thread of BLAS each."""

        def forward(nodes: list[prefix_tree.Node], *arguments: Any) -> Computed:
            computed = self._forward(nodes, *arguments)
            reading.advance(sum(len(node.tokens) for node in nodes))
            return computed

        return self._side_by_side(forward, work)

    def _side_by_side(self, function: Callable[..., Any], work: list[tuple]) -> list[Any]:
        threads = 1 if self._one_at_a_time else default_num_threads()
        if len(work) < 2 or threads == 1:
            with contextlib.nullcontext() if on_gpu() else blas.numpy_single_threaded():
                return [function(*arguments) for arguments in work]
        with blas.single_threaded():
            return run_in_threads(function, work, threads)

    def _forward(
        self, nodes: list[prefix_tree.Node], paths: list[np.ndarray], pool: Pool
    ) -> Computed:
        """Compute one batch, one row a node.

        Returns:
            (request, log p, whether first choice) of each scored target, and the keys and values
            of the rows if they are inner nodes.
        """
        length = max(len(node.tokens) for node in nodes)
        tokens_RT = np.zeros((len(nodes), length), dtype=np.int32)
        for row, node in enumerate(nodes):
            tokens_RT[row, : len(node.tokens)] = node.tokens
        caches = None
        if self.sharing:
            sharing = self._sharing
            caches = branch_caches(
                sharing.layers,
                paths,
                length,
                pool,
                sharing.dtype,
                additive=sharing.additive,
                kv_format=self._kv_format,
            )
        elif self._kv_format is not None:
            caches = rounded_caches(self._model, self._kv_format)
        hidden_RTD = self._body(mx.array(tokens_RT), cache=caches)
        part: Pool = []
        if self.sharing and caches and nodes[0].inner:
            flat = np.flatnonzero(
                np.arange(length) < np.array([[len(node.tokens)] for node in nodes])
            )
            part = batch_pool(caches, flat)
            mx.eval(part)
        pairs = [
            (row * length + position, index, target)
            for row, node in enumerate(nodes)
            for position, targets in sorted(node.scored.items())
            for index, target in targets
        ]
        if not pairs:
            mx.eval(hidden_RTD)
            return [], part
        return self._targets(hidden_RTD.reshape(-1, hidden_RTD.shape[-1]), pairs), part

    def _targets(
        self, hidden_ND: mx.array, pairs: list[tuple[int, int, int]]
    ) -> list[tuple[int, float, bool]]:
        """Return (request, log p, first choice) of each (position, request, target id)."""
        positions = sorted({position for position, _, _ in pairs})
        row_of = {position: row for row, position in enumerate(positions)}
        scored_ND = hidden_ND[mx.array(positions)]
        most, half = HEAD_LOGITS // self._vocabulary, HEAD_LOGITS // 2 // self._vocabulary
        chunk = max(1, most if on_gpu() else min(most, max(HEAD_ROWS, half)))
        scores: list[tuple[int, float, bool]] = []
        for begin in range(0, len(positions), chunk):
            here = [p for p in pairs if begin <= row_of[p[0]] < begin + chunk]
            logits_NV = self._head(scored_ND[begin : begin + chunk]).astype(mx.float32)
            rows = mx.array([row_of[position] - begin for position, _, _ in here])
            targets = mx.array([target for _, _, target in here])
            values = logits_NV[rows, targets] - logsumexp(logits_NV)[rows, 0]
            first = mx.argmax(logits_NV, axis=-1)[rows] == targets
            mx.eval(values, first)
            results = zip(here, np.array(values).tolist(), np.array(first).tolist(), strict=True)
            scores += [(index, value, is_first) for (_, index, _), value, is_first in results]
        return scores
