"""The real ``openai`` client, on a CPU and along a GPU's path."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import MESSAGES, Files, Running, run_server
from tests.support.tiny import tiny_model

openai = pytest.importorskip("openai", reason="pip install mlx-slim[test]")

# As Qwen's: the template shows the tools, and mlx-lm's parser reads the calls.
TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{# <tool_call> tool_call.name #}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=["cpu", "gpu"])
def client(request: pytest.FixtureRequest, files: Files) -> Iterator[tuple[Any, Running]]:
    if request.param == "gpu":
        if shutil.which("g++") is None:
            pytest.skip("mx.compile needs a C++ compiler on a CPU")
        request.getfixturevalue("as_on_gpu")
    with run_server(files.model, adapter=files.adapters) as server:
        yield connect(server), server


def connect(server: Running) -> Any:
    return openai.OpenAI(base_url=server.address, api_key="none", max_retries=0)


def test_chat_completions_streams_and_adapters(client: tuple[Any, Running], files: Files) -> None:
    api, _ = client
    one = files.adapters[0]
    assert [model.id for model in api.models.list()] == [files.model, *files.adapters]
    assert api.models.retrieve(one).id == one
    texts = {}
    for name in (files.model, one):
        words: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": 8}
        whole = api.chat.completions.create(**words)
        assert whole.model == name
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 8
        chunks = list(
            api.chat.completions.create(
                **words, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[-1].usage.completion_tokens == 8
        streamed = "".join(p.choices[0].delta.content or "" for p in chunks if p.choices)
        texts[name] = whole.choices[0].message.content
        assert streamed == texts[name]
        words = {"model": name, "prompt": "once upon", "max_tokens": 5}
        text = api.completions.create(**words).choices[0].text
        chunks = api.completions.create(**words, stream=True)
        assert "".join(part.choices[0].text for part in chunks) == text
    assert texts[files.model] != texts[one]
    answers: list[str] = []

    def ask() -> None:
        answer = api.chat.completions.create(model=one, messages=MESSAGES, max_tokens=8)
        answers.append(answer.choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [texts[one]] * 2


def test_log_probabilities_are_those_of_the_tokens_of_the_answer(
    client: tuple[Any, Running], files: Files
) -> None:
    api, _ = client
    words: dict[str, Any] = {"model": files.model, "messages": MESSAGES, "max_tokens": 6}
    words["logit_bias"] = {str(ord("k") - ord("!")): 100}
    choice = api.chat.completions.create(**words, logprobs=True).choices[0]
    assert choice.message.content == "kkkkkk"
    assert [(one.token, one.bytes) for one in choice.logprobs.content] == [("k", [107])] * 6
    words["logit_bias"] = {}
    choice = api.chat.completions.create(**words, logprobs=True, top_logprobs=4).choices[0]
    for one in choice.logprobs.content:  # greedy: the likeliest
        logprobs = [other.logprob for other in one.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, logprobs[0])


def test_refusals_are_the_clients_errors(client: tuple[Any, Running], files: Files) -> None:
    api, _ = client
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o' is served"):
        api.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4o")
    with pytest.raises(openai.BadRequestError, match="n = 3 is not supported"):
        api.chat.completions.create(model=files.model, messages=MESSAGES, n=3)
    with pytest.raises(openai.BadRequestError, match="chat template has none"):
        api.chat.completions.create(
            model=files.model,
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )


def test_tools_reach_the_template_and_a_call_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "tools", chat_template=TOOLS)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    with run_server(model) as server:
        generator = server.provider
        ids = generator.tokenizer.encode(call, add_special_tokens=False)  # type: ignore[attr-defined]
        prompts: list[str] = []
        _say(monkeypatch, ids, prompts, generator.tokenizer)
        answer = connect(server).chat.completions.create(
            model=str(model),
            messages=MESSAGES,
            tools=[{"type": "function", "function": tool}],
            max_tokens=len(ids) + 1,
        )
    assert '"name": "weather"' in prompts[0]
    (choice,) = answer.choices
    assert choice.finish_reason in ("tool_calls", "length")
    (call_back,) = choice.message.tool_calls
    assert call_back.function.name == "weather"
    assert json.loads(call_back.function.arguments) == {"city": "Bern"}


def _say(
    monkeypatch: pytest.MonkeyPatch, ids: list[int], prompts: list[str], tokenizer: Any
) -> None:
    """Make the sampler choose ``ids`` one by one: a random model calls no tool."""
    import mlx.core as mx
    from mlx_lm import server

    from mlx_slim.serving.generator import Provider

    words = iter([*ids, *[ids[-1]] * 4])
    check = Provider.check

    def checked(self: Provider, prompt: list[int], arguments: Any) -> None:
        prompts.append(tokenizer.decode(prompt))
        check(self, prompt, arguments)

    monkeypatch.setattr(Provider, "check", checked)
    monkeypatch.setattr(server, "_make_sampler", lambda *_: lambda _: mx.array([next(words)]))
