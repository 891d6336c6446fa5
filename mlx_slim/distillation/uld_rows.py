"""The rows of a run as a teacher with another tokenizer reads them, aligned with the student's.

Invariant: the i-th stored row of the student has the i-th row here: the same conversation through
the teacher's chat template and tokenizer, or an empty one where the answers cannot be aligned, and
every such row is counted with its reason in ``alignment.json``. The folder is folders whole or not
at all, and is reused while its key (rows, both tokenizers, the teacher's template, the way of
aligning) stays. Try it:
``mlx-slim distill distill-smollm2 distill.method=uld "distill.teachers=[{model: OTHER}]" -o run``.

Layout (F rows, S the student's targets in order, U the teacher's): ``rows/``, the teacher's rows as
``data/store.py``; ``groups.npy`` int32 (F,), aligned groups of each row; ``student.npy`` int32
(S, 2) and ``teacher.npy`` (U, 2): the group of each target in its row, or −1, and the token whose
probability scales it, or −1 for the group's base.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_slim.artifacts import atomic_folder, hash_json, read_json, write_json
from mlx_slim.config.schema import Recipe
from mlx_slim.data.collate import RowStore, first_targets
from mlx_slim.data.ledger import SourceLedger
from mlx_slim.data.pipeline import Pipeline, PreparedRow
from mlx_slim.data.prepare import Prepared, sources_of
from mlx_slim.data.rendered import Rendered
from mlx_slim.data.sources import Source
from mlx_slim.data.store import TokenRows, TokenStore, TokenWriter
from mlx_slim.data.tokenize import Tokens, check_ids
from mlx_slim.distillation.uld_alignment import (
    NO_GROUP,
    Answer,
    AnswerReader,
    Merge,
    Part,
    Unaligned,
    contents,
    groups,
    positions_of,
)
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.progress import stage
from mlx_slim.reading import JsonObject

_VERSION = 1  # of the files: raise it when the same key would give another alignment
_RECORD = "alignment.json"
_CHUNK = 256  # rows that are tokenized at once
_FIRST = 5  # places named for each reason


@dataclass(frozen=True)
class TeacherReader:
    """How a teacher reads rows, and how they are aligned.

    Attributes:
        tokenizer: Of the teacher.
        longest: Most tokens of a row that it may read.
        extended: Align by bytes; else by the number of the token.
        merge: How the tokens of a group are merged.
    """

    tokenizer: Any
    longest: int
    extended: bool
    merge: Merge


@dataclass
class _Side:
    """The targets of one model's rows, as they are collected."""

    pairs: array = field(default_factory=lambda: array("i"))

    def add(self, supervised_T: np.ndarray, needed: Sequence[Part]) -> None:
        pairs_T2 = np.full((len(supervised_T), 2), NO_GROUP, np.int32)
        for part in needed:
            pairs_T2[part.target] = part.group, part.token
        self.pairs.frombytes(np.ascontiguousarray(pairs_T2[supervised_T]).tobytes())

    def save(self, file: Path) -> None:
        np.save(file, np.frombuffer(self.pairs, np.int32).reshape(-1, 2))


class RowAligner:
    """Aligns rows of the student with the teacher's reading of them.

    Args:
        pipeline: The student's, over the recipe's data.
        student: Its tokenizer.
        teacher: How the teacher reads.
    """

    def __init__(self, pipeline: Pipeline, student: Any, teacher: TeacherReader) -> None:
        self._pipeline, self._teacher = pipeline, teacher
        # Only its template is used: rows are as long as they are.
        self.template = Pipeline(pipeline.config, teacher.tokenizer, max_length=1 << 30).template
        self._student_reader = AnswerReader(student, "student")
        self._teacher_reader = AnswerReader(teacher.tokenizer, "teacher")

    @property
    def fingerprint(self) -> JsonObject:
        """What the alignment depends on, besides the student's rows."""
        return {
            "version": _VERSION,
            "tokenizer": self._teacher_reader.encoder.fingerprint(),
            "template": self.template.key,
            "longest": self._teacher.longest,
            "extended": self._teacher.extended,
            "merge": self._teacher.merge,
        }

    def write(
        self, folder: Path, stored: TokenStore, rows: Iterator[PreparedRow], key: JsonObject
    ) -> None:
        """Write the alignment of all ``rows`` into the new folder ``folder``."""
        writer = TokenWriter(folder / "rows")
        student, teacher = _Side(), _Side()
        counts, reasons, first = array("i"), {}, {}
        number = 0
        for chunk in _chunks(rows):
            for row, (ids_T, read) in zip(chunk, self._read(chunk), strict=True):
                stored_T, supervised_T = stored.row(number)
                if not np.array_equal(stored_T, row.tokens.ids_T):
                    raise SlimError(
                        f"{row.raw.place}: the rows changed while they were read",
                        "start again with rows that stay as they are",
                    )
                number += 1
                try:
                    ours, theirs, count = self._aligned(row, read, ids_T, stored_T, supervised_T)
                except Unaligned as error:
                    reasons[str(error)] = reasons.get(str(error), 0) + 1
                    places = first.setdefault(str(error), [])
                    places += [row.raw.place] if len(places) < _FIRST else []
                    student.add(supervised_T, [])
                    nothing = np.zeros(0, np.bool_)
                    writer.add(TokenRows.of([Tokens(np.zeros(0, np.int32), nothing)]))
                    counts.append(0)
                    continue
                check_ids(self._teacher.tokenizer, ids_T, f"{row.raw.place}, for the teacher")
                needed_T = np.zeros(len(ids_T), np.bool_)
                needed_T[[part.target for part in theirs]] = True
                student.add(supervised_T, ours)
                teacher.add(needed_T, theirs)
                writer.add(TokenRows.of([Tokens(ids_T, needed_T)]))
                counts.append(count)
        writer.close()
        student.save(folder / "student.npy")
        teacher.save(folder / "teacher.npy")
        np.save(folder / "groups.npy", np.asarray(counts, np.int32))
        unaligned = {why: {"count": n, "first": first[why]} for why, n in reasons.items()}
        write_json(folder / _RECORD, {"key": key, "rows": number, "unaligned": unaligned})

    def _read(
        self, chunk: list[PreparedRow]
    ) -> list[tuple[np.ndarray, tuple[list[Answer] | str, list[Answer] | str, np.ndarray]]]:
        """Return the teacher's ids of each row, and both sides' answers with the student's ids."""
        texts = [contents(row.example) for row in chunk]
        rendered = [self._rendered(row) for row in chunk]
        ours = self._student_reader.read([row.rendered for row in chunk], texts)
        theirs = self._teacher_reader.read(rendered, texts)
        return [
            (teacher_ids, (mine, other, student_ids))
            for (student_ids, mine), (teacher_ids, other) in zip(ours, theirs, strict=True)
        ]

    def _rendered(self, row: PreparedRow) -> Rendered:
        try:
            return self.template.render(row.example)
        except SlimError as error:
            raise SlimError(
                f"{row.raw.place}: the teacher's template: {error.message}",
                "give it rows that its template accepts, or another data.template",
            ) from error

    def _aligned(
        self,
        row: PreparedRow,
        read: tuple[list[Answer] | str, list[Answer] | str, np.ndarray],
        ids_T: np.ndarray,
        stored_T: np.ndarray,
        supervised_T: np.ndarray,
    ) -> tuple[list[Part], list[Part], int]:
        """Return the positions that both sides need, and the number of groups."""
        mine, other, whole_T = read
        for side in (mine, other):
            if isinstance(side, str):
                raise Unaligned(side)
        if row.pieces > 1:
            raise Unaligned("one of several pieces of a long text")
        if len(ids_T) > self._teacher.longest:
            raise Unaligned(f"longer than the teacher's {self._teacher.longest} tokens")
        place_T = _places(whole_T, stored_T)
        ours: list[Part] = []
        theirs: list[Part] = []
        count = 0
        for one, two in zip(mine, other, strict=True):
            assert isinstance(one, Answer) and isinstance(two, Answer)
            for ours_group, theirs_group in groups(one, two, extended=self._teacher.extended):
                here = positions_of(ours_group, count, whole_T, self._teacher.merge)
                places = [int(place_T[part.target]) for part in here]
                if any(at < 0 or not supervised_T[at] for at in places):
                    continue  # cut off, or an answer that is not learned
                ours += [part._replace(target=at) for part, at in zip(here, places, strict=True)]
                theirs += positions_of(theirs_group, count, ids_T, self._teacher.merge)
                count += 1
        if not count:
            raise Unaligned("no border of two tokens in common")
        return ours, theirs, count


def _places(whole_T: np.ndarray, stored_T: np.ndarray) -> np.ndarray:
    """Return where each id of a whole row is in the stored one, −1 where it was cut off.

    The end was cut off, or the beginning behind a BOS (``data.truncation``).
    """
    places_T = np.full(len(whole_T), -1, np.int64)
    size = len(stored_T)
    if np.array_equal(whole_T[:size], stored_T):
        places_T[:size] = np.arange(size)
        return places_T
    head = int(whole_T[0] == stored_T[0] and not np.array_equal(whole_T[-size:], stored_T))
    if not np.array_equal(whole_T[len(whole_T) - size + head :], stored_T[head:]):
        raise Unaligned("the row was cut before it was tokenized")
    places_T[:head] = 0
    places_T[len(whole_T) - size + head :] = np.arange(head, size)
    return places_T


def _chunks(rows: Iterator[PreparedRow]) -> Iterator[list[PreparedRow]]:
    chunk: list[PreparedRow] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Alignment:
    """The aligned rows of one store of the student's.

    Args:
        folder: As ``RowAligner.write`` leaves it.
        rows: The student's rows: all of a folder, or some of them in any order.

    Attributes:
        teacher: The teacher's rows, those that are aligned, in the order of ``rows``.
        aligned_R: Whether a row of ``rows`` is aligned, bool (R,).
        unaligned: Rows of ``rows`` that are not.
        student_S2: Number of the group of each of the student's targets among all groups of
            ``rows``, or −1; and the token that scales it, or −1. int64.
        teacher_U2: The same of the teacher's targets.
        weight_G: Weight of each group: the loss is a mean over the groups of a row and then over
            rows, and the loop divides it by targets. float32.
        scaled: Most of a row's targets that scale a group, as a fraction of its targets.
    """

    def __init__(self, folder: Path, rows: TokenStore) -> None:
        every_row, pairs_S2 = np.load(folder / "groups.npy"), np.load(folder / "student.npy")
        counts_R = every_row[rows.index]
        self.aligned_R = aligned_R = counts_R > 0
        self.unaligned = int((~aligned_R).sum())
        self.teacher = TokenStore(folder / "rows", index=rows.index[aligned_R])
        before_R = np.cumsum(counts_R, dtype=np.int64) - counts_R
        every = TokenStore(rows.folder)
        self.student_S2 = _pairs(pairs_S2, first_targets(every), rows, rows.index, before_R)
        every_teacher = TokenStore(folder / "rows")
        pairs_U2 = np.load(folder / "teacher.npy")
        self.teacher_U2 = _pairs(
            pairs_U2,
            first_targets(every_teacher),
            self.teacher,
            rows.index[aligned_R],
            before_R[aligned_R],
        )
        mean = float(rows.supervised.sum()) / max(1, int(aligned_R.sum()))
        weight_R = mean / np.maximum(counts_R, 1)
        self.weight_G = np.repeat(weight_R, counts_R).astype(np.float32)
        scaling_S = (self.student_S2[:, 0] >= 0) & (self.student_S2[:, 1] >= 0)
        row_S = np.repeat(np.arange(len(rows)), rows.supervised)
        scaling_R = np.bincount(row_S[scaling_S], minlength=len(rows))
        self.scaled = float((scaling_R / np.maximum(rows.supervised, 1)).max(initial=0.0))

    @cached_property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.weight_G)

    def fingerprint(self) -> str:
        """Return a hash of how the teacher's tokens are merged."""
        return hashlib.sha256(np.ascontiguousarray(self.teacher_U2).tobytes()).hexdigest()


def _pairs(
    every_S2: np.ndarray,
    first_F: np.ndarray,
    rows: RowStore,
    index_R: np.ndarray,
    before_R: np.ndarray,
) -> np.ndarray:
    """Return the pairs of some rows' targets, their groups numbered among those of all of them."""
    counts_R = rows.supervised
    within_S = np.arange(int(counts_R.sum())) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
    pairs_S2 = every_S2[np.repeat(first_F[index_R], counts_R) + within_S].astype(np.int64)
    here_S = pairs_S2[:, 0] >= 0
    pairs_S2[here_S, 0] += np.repeat(before_R, counts_R)[here_S]
    return pairs_S2


def aligned_rows(
    recipe: Recipe, data: Prepared, out: Path, student: Any, teacher: TeacherReader, folder: Path
) -> tuple[list[Alignment], JsonObject]:
    """Return the alignment of the training rows, and of the validation rows if there are any.

    Args:
        recipe: Of the run.
        data: Its rows, tokenised.
        out: The run folder.
        student: The student's tokenizer.
        teacher: How the teacher reads.
        folder: Where alignments are kept; made if it is missing.

    Returns:
        The alignments, and the record of what is not aligned in all of the folder's rows.

    Raises:
        SlimError: If no training row can be aligned; rows that a template refuses.
    """
    pipeline = Pipeline(recipe.data, student, max_length=recipe.train.max_length)
    aligner = RowAligner(pipeline, student, teacher)
    alignments, unaligned, rows = [], {}, 0
    folders: dict[Path, Path] = {}
    for store in filter(None, (data.train, data.validation)):
        if store.folder not in folders:
            key = {**aligner.fingerprint, "student": data.fingerprint, "rows": store.folder.name}
            target = folder / hash_json(key)[:16]
            if not (target / _RECORD).is_file():
                with atomic_folder(target, replace=True) as temporary:
                    every = TokenStore(store.folder)
                    with stage("aligning tokens", len(every), "rows"):
                        source = _prepared_rows(recipe, pipeline, out, store)
                        aligner.write(temporary, every, source, key)
            folders[store.folder] = target
            record = read_json(target / _RECORD)
            rows += record["rows"]
            for why, entry in record["unaligned"].items():
                total = unaligned.setdefault(why, {"count": 0, "first": []})
                total["count"] += entry["count"]
                total["first"] = [*total["first"], *entry["first"]][:_FIRST]
        if not np.load(folders[store.folder] / "groups.npy")[store.index].any():
            kind = "training" if store is data.train else "validation"
            reasons = "; ".join(f"{entry['count']:,} {why}" for why, entry in unaligned.items())
            raise SlimError(
                f"no {kind} row can be aligned with the teacher's tokens: {reasons}",
                "train on the teacher's texts: distill.method=sequence",
            )
        alignments.append(Alignment(folders[store.folder], store))
    return alignments, {"rows": rows, "unaligned": unaligned}


def _prepared_rows(
    recipe: Recipe, pipeline: Pipeline, out: Path, store: TokenStore
) -> Iterator[PreparedRow]:
    """Yield the rows of the folder of ``store`` again, with their texts."""
    find = finder(out)
    for config, limit in sources_of(recipe.data, store):
        source: Source = find(config)
        ledger = SourceLedger(source.name, source.kind, config.weight, source.ignored)
        yield from pipeline.rows(source, config, ledger, limit)
