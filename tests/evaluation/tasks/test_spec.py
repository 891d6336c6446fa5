"""Task definitions: the shipped ones, names, suites, and a user's own file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.tasks.spec import expand, find_task, list_tasks, suites
from tests.evaluation.support import CHOICE, GENERATION, write_task

SHIPPED = {
    "arc_challenge", "arc_easy", "bioasq", "boolq", "demo_exact_match", "gsm8k", "hellaswag",
    "mmlu", "mmlu_pro", "openbookqa", "piqa", "pubmedqa", "truthfulqa_mc2", "wikitext",
    "wikitext_blocks", "winogrande",
}  # fmt: skip


def test_the_shipped_tasks_are_pinned_and_licensed() -> None:
    tasks = {task.name: task for task in list_tasks()}
    assert set(tasks) == SHIPPED
    for task in tasks.values():
        assert task.version >= 1 and task.spec.licence and task.spec.about
        without = task.kind == "perplexity" or task.name == "truthfulqa_mc2"
        assert task.metrics and (task.spec.data.shots is None) == without
        if task.spec.data.path and "/" in task.spec.data.path and task.name != "demo_exact_match":
            assert len(task.spec.data.revision or "") == 40
            # The rows of the blocks are lines on the hub, pages in a mirror.
            assert (task.spec.fields and task.spec.overlap) or task.name == "wikitext_blocks"


def test_mmlu_has_57_parts_in_4_categories_each_a_task() -> None:
    mmlu = find_task("mmlu")
    groups = mmlu.spec.subgroups
    assert groups is not None
    assert len(mmlu.subtasks) == 57
    sizes = {name: len(subtasks) for name, subtasks in groups.categories.items()}
    assert sizes == {"stem": 19, "humanities": 13, "social_sciences": 12, "other": 13}
    for part in mmlu.subtasks:
        task = find_task(f"mmlu_{part}")
        assert (task.name, task.part, task.subtasks) == (f"mmlu_{part}", part, ())
    assert find_task("mmlu-us-foreign-policy").name == "mmlu_us_foreign_policy"
    assert find_task("demo-exact-match") == find_task("demo_exact_match")


def test_a_subtask_of_two_words_is_named_with_an_underscore() -> None:
    task = find_task("mmlu_pro_computer_science")
    assert (task.name, task.part) == ("mmlu_pro_computer_science", "computer science")
    assert find_task("mmlu-pro-math").part == "math"
    assert len(find_task("mmlu_pro").subtasks) == 14
    with pytest.raises(SlimError, match="no task is called 'mmlu_pro_computer'"):
        find_task("mmlu_pro_computer")


def test_suites_define_their_shots() -> None:
    chosen = expand(["leaderboard-v1"])
    assert {s.task.name: s.num_fewshot for s in chosen} == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "gsm8k": 5,
    }  # fmt: skip
    chosen = expand(["seed"])
    assert [(s.task.name, s.num_fewshot) for s in chosen] == [
        ("hellaswag", 0), ("gsm8k", 5), ("mmlu", 5),
    ]  # fmt: skip
    chosen = expand(["pruning-7"])
    assert [s.task.name for s in chosen] == [
        "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    ]  # fmt: skip
    assert {s.num_fewshot for s in chosen} == {0}
    for members in suites().values():
        assert set(members) <= SHIPPED


def test_expand_takes_defaults_commas_and_repeats() -> None:
    chosen = expand(["gsm8k,arc_easy", "arc-easy"])
    assert [(s.task.name, s.num_fewshot) for s in chosen] == [("gsm8k", 5), ("arc_easy", 0)]
    assert [s.num_fewshot for s in expand(["gsm8k", "mmlu"], 2)] == [2, 2]
    assert [s.num_fewshot for s in expand(["gsm8k"], 0)] == [0]


@pytest.mark.parametrize(
    ("names", "shots", "words"),
    [
        (["helaswag"], None, "did you mean 'hellaswag'"),
        (["mmlu_anatomi"], None, "did you mean 'mmlu_anatomy'"),
        (["leaderboard_v1"], None, "did you mean 'leaderboard-v1'"),
        (["./none.yaml"], None, "none.yaml does not exist"),
        ([], None, "no task is named"),
        (["seed"], 3, "the suite seed has its own shots"),
        (["seed", "hellaswag", "gsm8k", "leaderboard-v1"], None, "hellaswag is named twice"),
        (["gsm8k"], 1000, "from 0 to 100"),
        (["gsm8k"], -1, "from 0 to 100"),
    ],
)
def test_wrong_names_are_one_line(names: Any, shots: int | None, words: str) -> None:
    with pytest.raises(SlimError, match=words):
        expand(names, shots)


def test_a_suite_is_no_task() -> None:
    with pytest.raises(SlimError, match="seed is a suite") as caught:
        find_task("seed")
    assert "hellaswag" in caught.value.hint


def test_a_users_task_file(tmp_path: Path) -> None:
    task = write_task(tmp_path, CHOICE)
    assert (task.name, task.kind, task.num_fewshot) == ("mine", "multiple_choice", 0)
    assert task.metrics == ("acc", "acc_norm")
    assert task.spec.delimiter == " " and task.spec.separator == "\n\n"
    task = write_task(tmp_path, GENERATION + "name: other\nmetrics: [json_match]\n")
    assert (task.name, task.metrics) == ("other", ("json_match",))
    assert write_task(tmp_path, GENERATION).metrics == ("exact_match",)
    filters = GENERATION + "filters: {word: {pattern: '\\w+', take: last}}\n"
    assert write_task(tmp_path, filters).metrics == ("word_match",)


TEXTS = "kind: perplexity\ndata: {path: rows.jsonl}\nprompt: '{{ text }}'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CHOICE + "promt: x\n", r"promt \(mine.yaml:6\) is not a key: did you mean 'prompt'"),
        (CHOICE + "data2: {pth: x}\n", r"data2.pth \(mine.yaml:6\) is not a key: did you mean"),
        (CHOICE + "num_fewshot: many\n", r"num_fewshot \(mine.yaml:6\) is 'many': expected"),
        (CHOICE + "version: 0\n", "at least 1"),
        (CHOICE + "metrics: [f1]\n", "no metric 'f1' for multiple_choice: known are acc"),
        (CHOICE + "max_tokens: 5\n", "multiple_choice does not use max_tokens"),
        (CHOICE.replace('"{{ options }}"', "[]"), "needs choices"),
        (CHOICE.replace("{{ options }}", "{{ options"), "choices .*not a Jinja template"),
        (CHOICE.replace("A:", "{% if %}"), "prompt .*not a Jinja template"),
        (GENERATION + "choices: [a]\n", "generation does not use choices"),
        (GENERATION + "continuation: a\n", "generation does not use continuation"),
        (CHOICE.replace("target", "example"), "kind multiple_choice needs target"),
        (CHOICE + "block: 8\n", "multiple_choice does not use block"),
        (TEXTS + "target: a\n", "perplexity does not use target"),
        (TEXTS + "until: [a]\n", "perplexity does not use until"),
        (TEXTS + "block: 8\nraw: a\n", "leave raw out"),
        (TEXTS + "block: 1\n", "at least 2"),
        (TEXTS + "metrics: [perplexity]\n", "no metric 'perplexity' for perplexity: known are w"),
        (CHOICE + "continuation: '{{ a'\n", "continuation .*not a Jinja template"),
        (GENERATION + "ignore: ['(']\n", "ignore .*not a valid regular expression"),
        (GENERATION + "filters: {a: {pattern: '['}}\n", "not a valid regular expression"),
        (GENERATION + "metrics: [strict_match]\n", "no metric 'strict_match' for generation"),
        (GENERATION.replace(", shots: rows.jsonl", "") + "num_fewshot: 2\n", "data.shots names no"),
        (GENERATION.replace("kind: generation", "kind: ranking"), "one of multiple_choice, gen"),
        ("prompt: x\n", "kind is missing"),
        ("- a\n", "holds a list"),
        ("", "empty"),
    ],
)
def test_wrong_files_name_key_and_line(tmp_path: Path, text: Any, words: str) -> None:
    with pytest.raises(SlimError) as caught:
        write_task(tmp_path, text)
    assert re.search(words, str(caught.value)), str(caught.value)
