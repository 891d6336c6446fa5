"""The reference pages of the documentation, made from the code whenever the site is built.

Invariant: nothing on these pages is written twice. Commands come from click, keys with defaults and
ranges from the pydantic sections and their docstrings, tasks and recipes from ``evals/`` and
``recipes/``, papers from the arXiv ids in docstrings. What lacks a description fails the build.
mkdocs calls ``on_files`` (``mkdocs.yml``, ``hooks``). Try it: ``make docs``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mlx_slim.config.schema import Recipe
from mlx_slim.config.task import TaskSpec

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_slim"
ARXIV = re.compile(r"(?<!\d)\d{4}\.\d{5}(?!\d)")

# What a paper is called here; which files implement or cite it is read off their docstrings.
PAPERS = {
    "1909.08053": "Tensor parallelism (Megatron-LM)",
    "1904.09751": "The Curious Case of Neural Text Degeneration (nucleus sampling)",
    "2304.11277": "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel",
    "2305.18290": "DPO: direct preference optimization",
    "2306.13649": "On-Policy Distillation of Language Models (GKD)",
    "1503.02531": "Distillation of logits at a temperature (Hinton et al.)",
    "1604.06174": "Gradient checkpointing",
    "1606.07947": "Sequence-level distillation",
    "1706.00384": "Deep mutual learning",
    "1801.06146": "Learning rates by depth (ULMFiT)",
    "2003.10555": "Learning rates by depth (ELECTRA)",
    "2005.14165": "Overlap of training rows and test questions (GPT-3)",
    "2106.09685": "LoRA",
    "2205.14135": "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    "2210.17323": "GPTQ",
    "2303.10512": "AdaLoRA",
    "2304.10255": "PED-ANOVA: importance of hyperparameters",
    "2305.11627": "LLM-Pruner: coupled groups, first-order importance, the pruning protocol",
    "2305.14314": "QLoRA",
    "2306.00978": "AWQ",
    "2309.00071": "YaRN: rotary embeddings beyond the trained length",
    "2309.14717": "QA-LoRA",
    "2310.05914": "NEFTune: noise on the embeddings",
    "2310.12036": "IPO: preferences without a reward model's assumptions",
    "2312.03732": "rsLoRA",
    "2402.01306": "KTO: single answers with labels",
    "2402.03300": "GRPO: group-relative policy optimization (DeepSeekMath)",
    "2402.04616": "TinyLLM: answers and rationales of several teachers",
    "2402.09353": "DoRA",
    "2402.12030": "Universal logit distillation (ULD)",
    "2402.12354": "LoRA+",
    "2402.13753": "LongRoPE",
    "2403.00409": "Robust DPO: pairs that are the wrong way round",
    "2403.03853": "ShortGPT: block influence",
    "2403.07691": "ORPO: preferences without a reference",
    "2403.15796": "Loss on a fixed text as the measure of what is forgotten",
    "2403.17887": "Depth pruning by angular distance",
    "2404.02948": "PiSSA",
    "2404.06395": "Warm-up, stable, decay schedule (MiniCPM)",
    "2405.14734": "SimPO: mean log-probability as the reward",
    "2406.01775": "OLoRA",
    "2407.11062": "EfficientQAT",
    "2407.14679": "Minitron: activation importance, distillation after pruning",
    "2408.11796": "Minitron in practice: channels of the residual stream",
    "2410.19185": "Tailored LLaMA: recovery of a pruned model for one task",
    "2410.21228": "Intruder dimensions",
    "2410.21271": "EoRA: compensation of rounding without training",
    "2411.09009": "Loss over the vocabulary without full logits",
    "2503.14476": "DAPO: clip-higher, dynamic sampling, token mean",
    "2503.20783": "Dr. GRPO: no bias to long wrong answers",
    "2510.13999": "REAP: experts by router-weighted activation",
}


# ------------------------------------------------------------------------------------- markdown


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; line breaks in cells become spaces and bars are escaped."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def code(text: str) -> str:
    """Return docstring text as Markdown: double backticks become single ones."""
    return text.replace("``", "`")


# ------------------------------------------------------------------------------------- commands


def walk_commands(
    group: click.Group, context: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield every command below ``group`` with a context that names it, groups before theirs."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        inner = click.Context(command, info_name=name, parent=context)
        yield command, inner
        if isinstance(command, click.Group):
            yield from walk_commands(command, inner)


def command_section(command: click.Command, context: click.Context) -> str:
    """Return usage, help and options of one command.

    Raises:
        ValueError: If the command or one of its options has no help.
    """
    path = context.command_path
    if not command.help:
        raise ValueError(f"{path} has no help text")
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"{'#' * (2 + path.count(' ') - 1)} {path}", f"```text\n{usage}\n```", _help(command)]
    rows = []
    for option in command.params:
        if isinstance(option, click.Argument) or getattr(option, "hidden", False):
            continue
        record = option.get_help_record(context)
        if record is None or not re.sub(r"\[[^\]]*\]$", "", record[1]).strip():
            raise ValueError(f"{path}: {option.opts} has no help text")
        rows.append((f"`{record[0]}`", _escaped(record[1])))
    if rows:
        lines.append(table(("option", "meaning"), rows))
    return "\n\n".join(lines)


def _help(command: click.Command) -> str:
    """Return the help as Markdown: a paragraph that click leaves alone is a block of text."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    out = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b"):
            out.append(f"```text\n{paragraph.removeprefix(chr(8)).strip()}\n```")
        else:
            out.append(_escaped(" ".join(paragraph.split())))
    return "\n\n".join(out)


def _escaped(text: str) -> str:
    """Return plain text such that Markdown shows it as it stands."""
    return re.sub(r"([\[\]<>*_`])", r"\\\1", text)


def commands_page() -> str:
    """Return the page of all commands and options."""
    from mlx_slim.cli.main import command

    root = click.Context(command, info_name="mlx-slim")
    parts = [
        "# Commands",
        "Every command has `--help`. Exit codes: 0 done, 1 an internal error, 2 the input is wrong "
        "(one line and a hint, nothing is written), 3 not enough memory or disk, 130 interrupted "
        "(the state is saved and the resume command printed).",
        *(command_section(each, context) for each, context in walk_commands(command, root)),
    ]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------- keys of files


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Return key -> description, from the ``Attributes:`` of the section's docstring."""
    text = inspect.getdoc(section) or ""
    block = text.partition("\nAttributes:\n")[2]
    found: dict[str, str] = {}
    key = ""
    for line in block.splitlines():
        if entry := re.match(r"    (\w+): (.*)", line):
            key = entry[1]
            found[key] = entry[2]
        elif key and line.startswith("        "):
            found[key] += " " + line.strip()
        elif line.strip():
            break
    return {key: re.sub(r"\bNone\b", "`null`", code(value)) for key, value in found.items()}


def summary(section: type[BaseModel]) -> str:
    """Return the section's docstring without its attributes."""
    text = inspect.getdoc(section) or ""
    return code(text.partition("\nAttributes:\n")[0].strip())


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in get_args(annotation) for one in sections_of(part)]


def type_name(annotation: Any, metadata: Any = ()) -> str:
    """Return a type as a reader of YAML would say it, with its range."""
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation] + _range(metadata)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return type_name(get_args(annotation)[0], annotation.__metadata__)
    origin, arguments = getattr(annotation, "__origin__", None), get_args(annotation)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"{type_name(arguments[0])} → {type_name(arguments[1])}"
    if arguments and "Literal" in str(annotation).split("[")[0]:
        return " | ".join(f"`{value}`" for value in arguments)
    if arguments:
        return " or ".join(dict.fromkeys(type_name(one, metadata) for one in arguments))
    return "anything"


def _range(metadata: Any) -> str:
    """Return the bounds among a field's constraints as text."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = []
    for one in metadata:
        for inner in getattr(one, "metadata", None) or [one]:
            for name, sign in signs.items():
                value = getattr(inner, name, None)
                if value is not None and value < 1e9:  # more only refuses slips of the keyboard
                    bounds.append(f"{sign} {round(value, 6):,}".removesuffix(".0"))
    return f" ({', '.join(bounds)})" if bounds else ""


def default_of(field: Any) -> str:
    """Return a field's default as YAML shows it."""
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory()
    if isinstance(value, BaseModel) or (isinstance(value, list) and value and _is_section(value)):
        return "see below"
    if isinstance(value, str) and "\n" in value:
        return "see the text below"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    return "`''`" if value == "" else f"`{value}`"


def _is_section(values: list[Any]) -> bool:
    return isinstance(values[0], BaseModel)


def section_tables(section: type[BaseModel], prefix: str = "", level: int = 2) -> list[str]:
    """Return the tables of a section and of those inside it, depth first.

    Raises:
        ValueError: If a key has no description, or a description has no key.
    """
    described = descriptions(section)
    rows: list[tuple[str, ...]] = []
    inner: list[tuple[str, type[BaseModel], bool]] = []
    for key, field in section.model_fields.items():
        nested = sections_of(field.annotation)
        text = described.pop(key, "") or (summary(nested[0]).split("\n\n")[0] if nested else "")
        if not text:
            raise ValueError(f"{section.__name__}.{key} has no description in its docstring")
        rows.append(
            (f"`{key}`", type_name(field.annotation, field.metadata), default_of(field), text)
        )
        many = "list" in str(field.annotation) or "dict" in str(field.annotation)
        inner += [(key, one, many) for one in nested]
    if described:
        raise ValueError(f"{section.__name__} describes {sorted(described)}, which it has not")
    title = prefix or "The file"
    parts = [f"{'#' * level} {title if not prefix else f'`{title}`'}", summary(section)]
    parts.append(table(("key", "type", "default", "meaning"), rows))
    for field in section.model_fields.values():
        value = field.default
        if isinstance(value, str) and "\n" in value:
            parts.append(f"The default text:\n\n```text\n{value}\n```")
    for key, one, many in inner:
        path = f"{prefix}.{key}" if prefix else key
        parts += section_tables(one, f"{path}[]" if many else path, level)
    return parts


def recipe_page() -> str:
    """Return the page of every key of a recipe."""
    return "\n\n".join(
        [
            "# Recipe keys",
            "A recipe is a YAML file with these keys; `extends: NAME` (or a list of names) takes "
            "over everything that another one sets. Each default stands in the code once. Any key "
            "can be set on the command line as `section.key=value`; `mlx-slim train RECIPE "
            "--dry-run` prints every resolved value and where it comes from. An unknown key is an "
            "error that names the closest one. [Shipped recipes](recipes.md).",
            *section_tables(Recipe),
        ]
    )


def files_page() -> str:
    """Return the page of the keys of a matrix and of a task."""
    from mlx_slim.compare.matrix_spec import MatrixSpec

    return "\n\n".join(
        [
            "# Matrix and task files",
            "## Matrix",
            "What `mlx-slim compare MATRIX` reads: models × methods × tasks.",
            *section_tables(MatrixSpec, level=3),
            "## Task",
            "What `mlx-slim eval MODEL --task FILE.yaml` reads.",
            *section_tables(TaskSpec, level=3),
        ]
    )


# ----------------------------------------------------------------------- tasks, recipes, papers


def tasks_page() -> str:
    """Return the page of the evaluation tasks."""
    from mlx_slim.evaluation.tasks.spec import list_tasks, suites

    rows = []
    for task in list_tasks():
        data = task.spec.data
        rows.append(
            (
                f"`{task.name}`",
                task.spec.about,
                task.kind.replace("_", " "),
                str(task.num_fewshot),
                ", ".join(f"`{metric}`" for metric in task.metrics),
                f"`{data.path}`" if data.path else "your own copy",
                task.spec.licence or "",
            )
        )
    head = ("task", "asks", "kind", "shots", "metrics", "rows", "licence of the rows")
    lines = [
        f"- `{name}`: " + ", ".join(f"{task} {shots}-shot" for task, shots in members.items())
        for name, members in suites().items()
    ]
    return "\n\n".join(
        [
            "# Tasks",
            "`mlx-slim tasks` lists them, `mlx-slim tasks NAME` shows one with its first prompt. A "
            "task of your own is [one YAML file](files.md#task).",
            table(head, rows),
            "Suites, scored by their name:",
            "\n".join(lines),
        ]
    )


def recipes_page() -> str:
    """Return the page of the shipped recipes and matrices: what each is."""
    from mlx_slim.config import library

    rows = []
    for name in library.names("recipes"):
        first = library.find("recipes", name).read_text(encoding="utf-8").splitlines()[0]
        rows.append((f"`{name}`", first.removeprefix("#").strip()))
    matrices = [
        (f"`{name}`", library.find("matrices", name).read_text("utf-8").splitlines()[0][2:])
        for name in library.names("matrices")
    ]
    return "\n\n".join(
        [
            "# Shipped recipes",
            "`mlx-slim recipes NAME` shows one, `--copy FILE.yaml` makes a file of your own. "
            "[Which Mac holds which](../memory-and-speed.md#recipes-and-macs).",
            table(("recipe", "what it does"), rows),
            "## Matrices",
            "For `mlx-slim compare`.",
            table(("matrix", "what it compares"), matrices),
        ]
    )


def cited() -> dict[str, list[str]]:
    """Return arXiv id -> the files whose docstrings name it, ``mlx_slim/...``."""
    files: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not ARXIV.search(source):
            continue
        tree = ast.parse(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [
            ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)
        ]
        for found in sorted({one for text in texts for one in ARXIV.findall(text)}):
            files.setdefault(found, []).append(path.relative_to(ROOT).as_posix())
    return files


def papers_page() -> str:
    """Return the page of methods, files and arXiv ids.

    Raises:
        ValueError: If a docstring cites a paper without a name here, or a name is cited nowhere.
    """
    files = cited()
    if unnamed := sorted(set(files) - set(PAPERS)):
        raise ValueError(f"docs/generate.py: PAPERS has no name for {unnamed}: add one")
    if uncited := sorted(set(PAPERS) - set(files)):
        raise ValueError(f"docs/generate.py: no docstring cites {uncited}: drop them from PAPERS")
    rows = [
        (
            title,
            ", ".join(f"`{file.removeprefix('mlx_slim/')}`" for file in files[paper]),
            f"[{paper}](https://arxiv.org/abs/{paper})",
        )
        for paper, title in sorted(PAPERS.items(), key=lambda item: item[1].lower())
    ]
    return "\n\n".join(
        [
            "# Papers",
            "Where a method comes from, and the files (in `mlx_slim/`) that implement it or cite "
            "it.",
            table(("method", "files", "arXiv"), rows),
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/recipe.md": recipe_page,
    "reference/recipes.md": recipes_page,
    "reference/tasks.md": tasks_page,
    "reference/files.md": files_page,
    "reference/papers.md": papers_page,
}


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Link each section of ``reference.md`` to its generated page (called by mkdocs).

    The file itself has no such links: the pages are not in the repository.
    """
    if page.file.src_uri != "reference.md":
        return markdown
    for path, make in PAGES.items():
        title = make().partition("\n")[0].removeprefix("# ")
        heading = f"## {title}\n"
        if heading not in markdown:
            raise ValueError(f"docs/reference.md has no section {title!r}")
        markdown = markdown.replace(heading, f"{heading}\n[{title}]({path}).")
    return markdown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site (called by mkdocs)."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page() + "\n"))
    return files
