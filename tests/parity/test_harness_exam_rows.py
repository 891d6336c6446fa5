"""MMLU-Pro, TruthfulQA and WikiText as lm-evaluation-harness has them, over rows written here.

Needs the extra ``parity``: ``make parity``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_slim.evaluation.jobs import Engine, TaskJob
from mlx_slim.evaluation.scoring.documents import DocumentsJob
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.requests import RequestEncoder
from mlx_slim.evaluation.tasks.metrics import record_choice, record_generation
from mlx_slim.evaluation.tasks.prompts import Chat, build_questions
from mlx_slim.evaluation.tasks.rows import TaskRows
from mlx_slim.evaluation.tasks.spec import Task, find_task
from mlx_slim.export.model import export_hf
from mlx_slim.models.load import Loaded, load
from mlx_slim.reading import JsonObject
from tests.parity.optional import needed
from tests.parity.torch_side import transformers
from tests.support.task_rows import mmlu_pro_rows, truthfulqa_rows

lm_eval = needed("lm_eval")
huggingface = needed("lm_eval.models.huggingface")

LONGEST = 480
Sides = tuple[Any, Loaded]  # the model of the harness, and ours
PAGE = (
    ' = Number {0} = \n The {0} @-@ year @,@ old " dog " ( a pet ) said : it \'s 1 @.@ 5 ° C ; N '
    "[ sic ] ! {{ x }} \n  = = = = Later = = = = \n It slept '  and woke ' . "
)
PAGES = [{"page": PAGE.format(number) * (1 + 3 * number)} for number in range(4)]


def harness_task(name: str, splits: dict[str, list[JsonObject]]) -> Any:
    """Return the harness's task over ``splits``."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class Local(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {s: datasets.Dataset.from_list(rows) for s, rows in splits.items()}

    return Local(config=load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{name}.yaml"))


def mmlu_pro(subject: str) -> tuple[Task, TaskRows, Any]:
    """Return a subject of MMLU-Pro: ours, its rows, the harness's."""
    splits = mmlu_pro_rows()
    mine = {s: [r for r in rows if r["category"] == subject] for s, rows in splits.items()}
    word = subject.replace(" ", "_")
    theirs = harness_task(f"mmlu_pro/mmlu_pro_{word}", splits)
    return (
        find_task(f"mmlu_pro_{word}"),
        TaskRows(mine["test"], mine["validation"], "", ""),
        theirs,
    )


@pytest.mark.parametrize("multiturn", [None, True, False])
@pytest.mark.parametrize("subject", ["computer science", "math"])
def test_prompts_of_mmlu_pro(subject: str, multiturn: bool | None) -> None:
    task, rows, theirs = mmlu_pro(subject)
    chat, settings = None, {}
    if multiturn is not None:

        def turns(system: str, examples: list[tuple[str, str]], user: str) -> str:
            messages = [("system", system)] if system else []
            for question, answer in examples:
                messages += [("user", question), ("assistant", answer)]
            return "".join(f"<{who}>{text}" for who, text in [*messages, ("user", user)])

        def template(messages: list[dict[str, str]], **_: Any) -> str:
            return "".join(f"<{one['role']}>{one['content']}" for one in messages)

        chat = Chat(lambda s, user: turns(s, [], user), turns=turns if multiturn else None)
        settings = {
            "apply_chat_template": True,
            "fewshot_as_multiturn": multiturn,
            "chat_template": template,
        }
    theirs.build_all_requests(**settings)
    ours = build_questions(task, rows, chat=chat)
    assert [question.context for question in ours] == [one.args[0] for one in theirs.instances]
    assert len(ours) == 5 and ours[0].context.count("Options:") == 6
    generation = theirs.instances[0].args[1]
    assert generation["until"] == task.spec.until
    assert generation["max_gen_toks"] == task.spec.max_tokens


ANSWERS = [
    "So the answer is (A).", "the answer is B", "The answer is: C", "A", "The answer is (K).", "",
    "the answer is (B), no: the answer is (C).", "ANSWER IS (B)", "answer is (b)", "answer is C)",
    "answer is\n(C)", "The answer is (C", "my answer is A because the answer is (D)", "answer isB",
    "the answer is  (B)", "the answer is (J) (A)", "Answer: (C)", "so answer is (D).Question:",
    "the answer is $\\boxed{C}$", "the answer is D.",
]  # fmt: skip


@pytest.mark.parametrize("subject", ["computer science", "math"])
def test_stored_answers_of_mmlu_pro_are_read_alike(subject: str) -> None:
    task, rows, theirs = mmlu_pro(subject)
    questions = build_questions(task, rows)
    right = set()
    for text in ANSWERS:
        theirs.build_all_requests()
        for instance in theirs.instances:
            instance.resps = [text]
        theirs.apply_filters()
        for question, row, instance in zip(questions, rows.rows, theirs.instances, strict=True):
            read = instance.filtered_resps["custom-extract"]
            expected = theirs.process_results(row, [read])["exact_match"]
            record = record_generation(task, question, text, "eos")
            assert record["letter"] == read.lower()
            assert record["letter_match"] == expected, text
            right.add(expected)
    assert right == {0.0, 1.0}


@pytest.fixture(scope="module")
def sides(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder = tmp_path_factory.mktemp("harness") / "hf"
    export_hf(tiny("llama"), folder)
    theirs = huggingface.HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        max_length=LONGEST,
        device="cpu",
        batch_size=2,
    )
    return theirs, load(folder, dtype=mx.float32)


def engine(ours: Loaded) -> Engine:
    return Engine(ours.model, ours.tokenizer, LoglikelihoodScorer(ours.model))


def test_mc2_of_truthfulqa(sides: Sides) -> None:
    model, ours = sides
    rows = truthfulqa_rows()
    theirs = harness_task("truthfulqa/truthfulqa_mc2", {"validation": rows})
    theirs.build_all_requests()
    task = find_task("truthfulqa_mc2")
    questions = build_questions(task, TaskRows(rows, [], "", ""))
    pairs = [pair for question in questions for pair in question.pairs]
    assert pairs == [instance.args for instance in theirs.instances]
    values = iter(model.loglikelihood(theirs.instances, disable_tqdm=True))
    expected = [[next(values) for _ in question.choices] for question in questions]
    job = TaskJob(task, "", 0, None, questions, RequestEncoder(ours.tokenizer, LONGEST))
    records = [r for chunk in job.chunks for r in job.compute(chunk, engine(ours)).records]
    noise = random.Random(0)
    for question, row, record, scores in zip(questions, rows, records, expected, strict=True):
        assert record["loglikelihoods"] == pytest.approx([ll for ll, _ in scores], abs=1e-2)
        assert record["mc2"] == pytest.approx(theirs.process_results(row, scores)["acc"], abs=1e-3)
        random_values = [-noise.uniform(0, 30) for _ in scores]
        our_fraction = record_choice(task, question, random_values, [False] * len(random_values))[
            "mc2"
        ]
        their_fraction = theirs.process_results(row, [(value, False) for value in random_values])[
            "acc"
        ]
        assert our_fraction == pytest.approx(their_fraction, abs=1e-9)
    mean = theirs.aggregation()["acc"](
        [theirs.process_results(r, s)["acc"] for r, s in zip(rows, expected, strict=True)]
    )
    assert job.summarize(records).metrics["mc2"].value == pytest.approx(mean, abs=1e-3)


def test_wikitext_by_whole_pages(sides: Sides) -> None:
    model, ours = sides
    theirs = harness_task("wikitext/wikitext", {"test": PAGES, "train": PAGES})
    theirs.build_all_requests()
    task = find_task("wikitext")
    questions = build_questions(task, TaskRows(PAGES, [], "", ""))
    assert [(question.context,) for question in questions] == [
        instance.args for instance in theirs.instances
    ]
    values = model.loglikelihood_rolling(theirs.instances, disable_tqdm=True)
    results = [theirs.process_results(row, [v]) for row, v in zip(PAGES, values, strict=True)]
    job = DocumentsJob(task, "", None, questions, RequestEncoder(ours.tokenizer, LONGEST))
    assert job.describe()["windows"] > len(PAGES)
    records = [r for chunk in job.chunks for r in job.compute(chunk, engine(ours)).records]
    assert [r["loglikelihood"] for r in records] == pytest.approx(values, rel=1e-5)
    figures = job.summarize(records).metrics
    assert list(figures) == list(results[0])
    for metric, one in figures.items():
        expected = theirs.aggregation()[metric]([result[metric] for result in results])
        assert math.log(one.value) == pytest.approx(math.log(expected), rel=1e-5)
        if metric == "bits_per_byte":
            assert one.value == pytest.approx(expected, abs=1e-3)
