"""Templates of others: whatever they say, they end, and keep within their memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jinja2 import TemplateError

from mlx_slim.config.expressions import compile_text, compile_value
from mlx_slim.data.chat_render import render_chat

TEXT = "{% set a = 'a' * 100000 %}"
HUGE = {
    "a long loop": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(90000) %}{% for j in range(90000) %}"
    "{% endfor %}{% endfor %}",
    "loops that pick nothing": "{% for k in range(900) %}{% for i in range(90000) if i < 0 %}"
    "{% endfor %}{% endfor %}",
    "text in a loop": "{% for i in range(90000) %}" + "x" * 5000 + "{% endfor %}",
    "a repetition": "{{ 'a' * 10**9 }}",
    "a repetition, turned": "{{ 10**9 * 'a' }}",
    "a list's repetition": "{% set x = [0] * 10**9 %}",
    "a power": "{{ 9**(9**9) }}",
    "products": "{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by set blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 20 + "x" + "{% endcall %}" * 20,
    "lists of one list": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "objects of one object": "{% set n = namespace(x={}) %}{% for i in range(60) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "a namespace in itself": "{% set n = namespace() %}{% set n.x = n %}{{ n }}",
    "namespaces of one": "{% set n = namespace() %}{% set n.x = [n, n] %}{{ n.x }}",
    "a growing list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = n.x + [i] %}{% endfor %}",
    "slices": TEXT + "".join(f"{{% set a{i} = a[1:] %}}" for i in range(3000)),
    "center": "{{ 'a' | center(10**9) }}",
    "center by name": "{{ 'a' | center(width=10**9) }}",
    "a method": "{{ 'a'.ljust(10**9) }}",
    "a filter block": "{% filter center(10**9) %}a{% endfilter %}",
    "indent": "{% set a = 'a\n' * 99999 %}{{ a | indent(90000) }}",
    "indent by text": "{% set a = 'a\n' * 99999 %}{{ a | indent(a) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% by value": "{{ '%*d' | format(10**9, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format by value": "{{ '{:{}}'.format(1, 10**9) }}",
    "format again and again": TEXT + "{{ ('{0}' * 90000).format(a) }}",
    "format by attr": "{{ ('{:1000000000}' | attr('format'))(1) }}",
    "replace": TEXT + "{{ a.replace('a', a) }}",
    "the filter replace": TEXT + "{{ a | replace('', a) }}",
    "join": TEXT + "{{ ([a] * 90000) | join }}",
    "a text's join": TEXT + "{{ a.join(range(100) | map('string')) }}",
    "expandtabs": "{{ ('\t' * 90000).expandtabs(90000) }}",
    "translate": "{{ 'a'.translate({97: 'b' * 999}) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "tojson": "{% set n = namespace(x=[0]) %}{% for i in range(90) %}{% set n.x = [n.x, 1] %}"
    "{% endfor %}{{ n.x | tojson(indent=90000) }}",
    "round": "{{ 5 | round(-10**9) }}",
    "sum": "{{ ([[1]] * 90000) | sum(start=[]) | length }}",
    "rfind": "{{ ('a' * 500000).rfind('ab' + 'a' * 250000) }}",
    "strip": "{{ ('a' * 500000).strip('b' * 500000 + 'a') }}",
    "trim": "{{ ('a' * 500000) | trim('b' * 500000 + 'a') }}",
    "split": "{% for i in range(999) %}{% set x = ('a,' * 99999).split(',') %}{% endfor %}",
    "maps": "{% for k in range(999) %}{% set x = range(90000) | map('string') | list %}"
    "{% endfor %}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that branches": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a block without end": "{% block a %}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a comparison": "{% for i in range(90000) %}{% if 'b' in 'a' * 500000 %}{% endif %}"
    "{% endfor %}",
    "groups": "{% for i in range(900) %}{{ range(90000) | groupby('real') | length }}{% endfor %}",
    "a mark": "{% generation %}{{ 'a' * 10**9 }}{% endgeneration %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "attributes": "{{ a" + ".b" * 20000 + " }}",
    "a long source": "x" * 100_000,
    "a long number": "{{ 1" + "0" * 6000 + " }}",
    "a date": "{{ strftime_now('%Y' * 1000000) }}",
    "Python": "{{ ''.__class__.__mro__ }}",
    "another file": "{% include 'x' %}",
    "anything": "{{ 1 + 'a' }}",
}  # fmt: skip


def measure() -> None:
    """Render each in a worker thread, as rows are: no signal reaches it. Print what went wrong."""

    def render(name: str, source: str) -> None:
        start = time.thread_time()
        try:
            render_chat(source, [{"role": "user", "content": "hi"}])
            print(f"{name}: rendered")
        except TemplateError:
            pass
        except BaseException as error:
            print(f"{name}: {error!r}")
        if (seconds := time.thread_time() - start) > 20:
            print(f"{name}: {seconds} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    for name, source in HUGE.items():
        thread = threading.Thread(target=render, args=(name, source))
        thread.start()
        thread.join()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (peak - before) * unit > 64 << 20:
            print(f"{name}: {(peak - before) * unit >> 20} MB")
            before = peak


def test_templates_end_and_keep_within_their_memory() -> None:
    command = "from tests.config.test_sandbox import measure; measure()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stderr == ""
    assert done.stdout == ""


def test_the_bounds_grow_with_the_row() -> None:
    long = "word " * 1_000_000
    text, _ = render_chat("{{ messages[0].content.strip() * 2 }}", [{"content": long}])
    assert text == long.strip() * 2


def test_tasks_templates_are_bounded_and_keep_their_meaning() -> None:
    with pytest.raises(TemplateError, match="at most"):
        compile_text("{{ 'a' * 10**9 }}")({})
    with pytest.raises(TemplateError, match="at most"):
        compile_value("{{ [q] * 10**9 }}")({"q": 1})
    for compiled in (compile_text, compile_value):
        with pytest.raises(ValueError, match="not a Jinja template: No filter named 'pper'"):
            compiled("{{ q | pper }}")
    with pytest.raises(TemplateError, match="takes more than 1 s"):
        compile_text("{{ q | regex_replace('(a|aa)+$', '') }}")({"q": "a" * 60 + "b"})
    with pytest.raises(TemplateError, match="too much text"):
        compile_text("{{ q | regex_replace('a', q) }}")({"q": "a" * 100_000})
    assert (
        compile_text(r"{{ q | regex_replace('(\w)(\w)', '\\2\\1!') }}")({"q": "ab cd"}) == "ba! dc!"
    )
    assert compile_value("{{ q | map('upper') }}")({"q": ["a"]}) == ["A"]
    assert compile_text("{{ q | tojson }}")({"q": {"b": "é<", "a": 1}}) == (
        '{"a": 1, "b": "\\u00e9\\u003c"}'
    )
