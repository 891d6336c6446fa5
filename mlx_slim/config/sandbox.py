"""Render untrusted Jinja templates within limits: chat templates, ``data.template``, tasks.

Invariant: a rendering ends in about a second and keeps to tens of megabytes beyond its inputs,
whatever the template says: every block that runs, every value that is made and every text that is
written is counted against a ``Budget``, and an operation whose result can be far larger than its
arguments (a repetition, a padding, a power, a format) is counted before it runs. Everything that
goes wrong leaves as ``jinja2.TemplateError``. No signal is used, so that worker threads are bounded
too. Try it: ``mlx-slim data preview smollm2-lora data.template=mine.jinja``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_slim.config.sandbox_budget import DEEPEST, Budget, TooMuch, budget
from mlx_slim.config.sandbox_calls import (
    before_call,
    bounded_filters,
    bounded_globals,
    bounded_tests,
    size_of_format,
    size_of_operation,
)
from mlx_slim.errors import SlimError

LONGEST_SOURCE = 1 << 16  # characters of a template; the longest of a known model has 30,000
_Result = TypeVar("_Result")


# ------------------------------------------------------------------------------ the environment


class _Counting(CodeGenerator):
    """Compiles templates so that they count what they do."""

    # Jinja calls it by position; its name of the argument, `nodes`, would hide the module.
    def blockvisit(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, nodes_: Iterable[nodes.Node], frame: Frame
    ) -> None:
        body = list(nodes_)
        texts = (
            len(data.data)
            for node in body
            if isinstance(node, nodes.Output)
            for data in node.nodes
            if isinstance(data, nodes.TemplateData)
        )
        self.writeline(f"environment.step({len(body) + 1}, {sum(texts)})")
        super().blockvisit(body, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))")

    def _count_value(self, visit: Any, node: Any, frame: Frame) -> None:
        self.write("environment.count_value(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._count_value(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._count_value(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._count_value(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._count_value(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds; takes the arguments of ``jinja2.Environment``."""

    code_generator_class = _Counting
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False, autoescape=False, finalize=_output)
        self.filters = bounded_filters(self.filters)
        self.tests = bounded_tests(self.tests)
        self.globals = bounded_globals()

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            if loop.test is not None:  # it runs once an item, outside of the body: a counted test
                counted = nodes.Test(nodes.Const(0), "number", [], [], None, None)
                loop.test = nodes.And(counted, loop.test)
        return super()._generate(source, *args, **kwargs)

    def step(self, steps: int, characters: int) -> bool:
        """Count what a block of the template does (compiled into it)."""
        return budget().step(steps, characters)

    def count_value(self, value: Any) -> Any:
        """Count a value of the template (compiled into it)."""
        return budget().count_value(value)

    def concatenate(self, values: tuple[Any, ...]) -> str:
        """Return the values as one text: ``a ~ b``."""
        used = budget()
        used.reserve(sum(map(used.size, values)), "a text")
        return used.count_value("".join(map(str, values)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``, its size counted first."""
        used = budget()
        both = type(left), type(right)
        if operator == "+" and both == (str, str):  # what templates do most
            used.reserve(len(left) + len(right), "a text")
            return used.count_value(left + right)
        used.reserve(size_of_operation(operator, left, right))
        return used.count_value(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method that templates may call."""
        used = budget()
        each, args = before_call(__obj, args, kwargs)
        used.depth += 1
        if used.depth > DEEPEST:
            raise TooMuch(f"the template's macros call each other more than {DEEPEST} deep")
        try:
            return used.count_value(super().call(__context, __obj, *args, **kwargs), each)
        finally:
            used.depth -= 1

    def wrap_str_format(self, value: Any) -> Any:
        """Return the sandbox's ``str.format`` with its size counted first; None for others."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            budget().reserve(size_of_format(value.__self__, (*args, *kwargs.values())), "a text")
            return inner(*args, **kwargs)

        return run


def _output(value: Any) -> Any:
    """Count what ``{{ … }}`` writes."""
    used = budget()
    if isinstance(value, str):
        used.step(0, len(value))
        return value
    used.step(0, 10 * used.size(value))  # as Python writes it: a character takes up to 10
    return value


# -------------------------------------------------------------------------- compile and render


class BoundedTemplate:
    """A compiled template.

    Args:
        environment: Its filters, globals and syntax.
        source: Jinja.

    Raises:
        TemplateError: If it is not Jinja, or too large.
    """

    def __init__(self, environment: BoundedEnvironment, source: str) -> None:
        self.source = source
        self._template = guarded(lambda: environment.from_string(source), source)

    def render(self, values: Mapping[str, Any]) -> str:
        """Return the text.

        Args:
            values: What the template reads, by name.

        Raises:
            TemplateError: The template refuses, fails, or takes more than it may.
        """
        return self.render_marked(values)[0]

    def render_marked(self, values: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the ranges [start, end) of it that extensions marked."""

        def run() -> tuple[str, list[tuple[int, int]]]:
            pieces: list[str] = []
            used = budget()
            for piece in self._template.generate(values):
                pieces.append(piece)
                used.output_length += len(piece)
            return "".join(pieces), used.spans

        return guarded(run, "", values.values())


def guarded(run: Callable[[], _Result], source: str, inputs: Iterable[Any] = ()) -> _Result:
    """Return ``run()``, which compiles ``source`` or renders, within a budget of its own.

    Raises:
        TemplateError: Whatever goes wrong.
    """
    if len(source) > LONGEST_SOURCE:
        raise TemplateSyntaxError(
            f"the template has {len(source)} characters: at most {LONGEST_SOURCE} are read", 1
        )
    try:
        with Budget(inputs):
            return run()
    except TemplateError:
        raise
    except RecursionError as error:
        raise TooMuch("the template is nested too deeply, or calls itself without end") from error
    except MemoryError as error:
        raise TooMuch("the template takes too much memory") from error
    except SyntaxError as error:  # Python's limits of nesting
        raise TemplateSyntaxError(f"the template cannot be compiled: {error.msg}", 1) from error
    except (ValueError, SlimError) as error:  # they say what is wrong
        raise TemplateRuntimeError(str(error)[:300]) from error
    except Exception as error:  # whatever a filter or an operator raises
        raise TemplateRuntimeError(f"{type(error).__name__}: {str(error)[:300]}") from error
