"""The server: answers are those of the models alone, refusals are a status, nothing ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.errors import SlimError
from mlx_slim.evaluation.chat import open_session
from mlx_slim.serving.options import ServeOptions
from mlx_slim.serving.requests import MAX_BODY
from mlx_slim.serving.run import listening
from tests.serving.conftest import MESSAGES, Files, Running, run_server
from tests.support.tiny import tiny_model


def expected(model: str, adapter: str | None = None, tokens: int = 4, **options: Any) -> str:
    session = open_session(model, adapter, **options)
    ids = session.chat_ids(MESSAGES)
    return "".join(session.stream(ids, max_tokens=tokens, temperature=0.0))


def text_of(record: dict[str, Any]) -> str:
    return record["choices"][0]["message"]["content"]


def test_each_name_answers_as_its_model_alone(running: Running, files: Files) -> None:
    one, two = files.adapters
    alone = {files.model: expected(files.model), one: expected(files.model, one)}
    assert alone[files.model] != alone[one]
    for name in (files.model, one, files.model, one):  # there and back
        status, record = running.chat(model=name)
        assert (status, record["model"], text_of(record)) == (200, name, alone[name])
    status, record = running.chat(adapters=one)  # mlx-lm's own key
    assert (record["model"], text_of(record)) == (one, alone[one])
    assert text_of(running.chat(model="default_model")[1]) == alone[files.model]
    assert text_of(running.chat(model=two)[1]) == expected(files.model, two)


def test_what_is_not_served_is_404_and_is_not_looked_for(
    running: Running, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a name was looked for")

    monkeypatch.setattr("mlx_lm.server.load", refuse)
    monkeypatch.setattr("mlx_slim.serving.generator.open_session", refuse)
    monkeypatch.setattr("mlx_lm.server.scan_cache_dir", refuse)
    monkeypatch.setattr("mlx_lm.server.urlopen", refuse)
    for body in (
        {"model": files.student},
        {"model": "mlx-community/some-model"},
        {"adapters": str(Path(files.model).parent)},
        {"draft_model": files.student},
    ):
        status, record = running.chat(**body)
        assert status == 404, body
        assert record["error"]["code"] == "model_not_found"
    status, _ = running.send("/v1/models/some/model", None, method="GET")
    assert status == 404
    _, data = running.send("/v1/models", None, method="GET")
    assert [each["id"] for each in json.loads(data)["data"]] == [files.model, *files.adapters]
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    status, _ = running.chat(messages=[{"role": "user", "content": image}])
    assert status == 400


def test_hostile_requests_get_a_status_and_the_next_one_an_answer(
    running: Running, files: Files
) -> None:
    path = "/v1/chat/completions"
    for data in (b"[1", b"\xff", b"[" * 50_000, b'{"messages": {}}', b"null"):
        assert running.send(path, data)[0] == 400
    headers = {"Content-Length": str(MAX_BODY + 1)}
    assert running.send(path, b" ", **headers)[0] == 413
    assert running.send(path, b"{}", **{"Content-Length": "-1"})[0] == 411
    assert running.send(path, b"{}", **{"Content-Length": "1" * 50})[0] == 411
    assert running.send("/v1/other", b"{}")[0] == 404
    assert running.send(path, b"{}", Origin="http://elsewhere.example")[0] == 403
    for body in (
        {"logit_bias": {"5000": 1}},
        {"top_k": 5000},
        {"stop": [{}]},
        {"messages": [{"role": "user", "content": "x" * 600}]},  # of 512 tokens
        {"tools": [{"type": "function", "function": {"name": "f"}}]},  # the template has none
        {"chat_template_kwargs": {"messages": []}},
    ):
        status, record = running.chat(**body)
        assert status == 400, body
        assert "\n" not in record["error"]["message"]
    with socket.create_connection(("127.0.0.1", running.port)) as gone:  # a client that leaves
        gone.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    assert text_of(running.chat()[1]) == expected(files.model)
    assert running.send("/health", None, method="GET")[0] == 200


def test_what_no_request_is_gets_json_and_pages_of_other_places_an_answer_of_403(
    running: Running,
) -> None:
    def send(text: str) -> tuple[int, dict[str, Any]]:
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as one:
            one.sendall(text.encode())
            head, _, body = one.makefile("rb").read().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    flood = "".join(f"X-{number}: y\r\n" for number in range(200))
    for text, status in (
        (f"GET /health HTTP/1.1\r\n{flood}\r\n", 431),
        (f"GET /{'a' * 70_000} HTTP/1.1\r\n\r\n", 414),
        ("PUT /v1/models HTTP/1.1\r\n\r\n", 501),
        ("GET http://[::1 HTTP/1.1\r\n\r\n", 404),
        ("POST http://[::1 HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 404),
    ):
        code, record = send(text)
        assert (code, type(record["error"]["message"])) == (status, str), text[:40]
    port = running.port
    body = json.dumps({"prompt": "a", "max_tokens": 1})
    for origin, host, status in (
        (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", 200),
        (f"http://localhost:{port}", f"localhost:{port}", 200),
        ("http://other.example", f"127.0.0.1:{port}", 403),
        (f"http://other.example:{port}", f"other.example:{port}", 403),  # DNS rebinding
        ("null", f"127.0.0.1:{port}", 403),
        ("http://[x", f"127.0.0.1:{port}", 403),
    ):
        headers = f"Host: {host}\r\nOrigin: {origin}\r\nContent-Length: {len(body)}\r\n"
        code, _ = send(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n{body}")
        assert code == status, origin


def test_a_batch_that_fails_ends_its_requests_only(
    running: Running, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.generate import BatchGenerator

    def fail(*_: Any) -> Any:
        raise ValueError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(BatchGenerator, "next", fail)
        status, record = running.chat()
    assert status == 500
    assert "out of luck" in record["error"]["message"]
    assert any("a batch of answers failed" in line for line in running.told)
    assert text_of(running.chat()[1]) == expected(files.model)


def test_several_clients_at_once_get_what_each_would_alone(running: Running, files: Files) -> None:
    names = [files.model, files.adapters[0], files.model, files.adapters[0], files.model]
    answers: dict[int, str] = {}

    def ask(number: int, name: str) -> None:
        answers[number] = text_of(running.chat(model=name, max_tokens=12)[1])

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {
        name: expected(files.model, None if name == files.model else name, 12) for name in names
    }
    assert [answers[i] for i in range(len(names))] == [alone[name] for name in names]


def test_a_prompt_that_continues_an_answer_is_answered(running: Running, files: Files) -> None:
    """mlx-lm keeps caches by prompt and answer: its own lookup leaves such a prompt no token."""
    session = open_session(files.model)
    ids = session.text_ids("once upon")
    pieces = "".join(session.stream(ids, max_tokens=3, temperature=0.0))
    prompts = ["once upon", "once upon" + pieces, "once upon"]
    texts = []
    for prompt in prompts:
        body = {"model": files.model, "prompt": prompt, "max_tokens": 3}
        status, data = running.send("/v1/completions", json.dumps(body).encode())
        assert status == 200, data
        texts.append(json.loads(data)["choices"][0]["text"])
    assert texts[0] == texts[2] == pieces


@pytest.mark.parametrize("bits", [8, 4])
def test_a_draft_and_a_quantized_cache_answer_as_in_generate(files: Files, bits: int) -> None:
    plain = expected(files.model, tokens=20, kv_bits=bits)
    with run_server(files.model, kv_bits=bits, draft_model=files.model) as server:
        first, again = (text_of(server.chat(max_tokens=20)[1]) for _ in range(2))
        messages = [*MESSAGES, {"role": "assistant", "content": first}, *MESSAGES]
        status, _ = server.chat(messages=messages, max_tokens=20, draft_model=files.model)
    assert (first, again, status) == (plain, plain, 200)
    told = [line for line in server.told if "proposed tokens accepted" in line]
    assert len(told) == 4  # one an answer, and all
    assert told[-1].startswith("in all, draft: ")
    assert "x the speed without it" in told[-1]


def test_a_base_model_completes_and_does_not_chat(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", chat_template=None)
    with run_server(base) as server:
        status, record = server.chat()
        assert (status, "no chat template" in record["error"]["message"]) == (400, True)
        body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
        assert server.send("/v1/completions", body)[0] == 200


def test_what_cannot_be_served_is_one_line_before_it_answers(files: Files, tmp_path: Path) -> None:
    def refused(model: str, **options: Any) -> str:
        with (
            pytest.raises(SlimError) as caught,
            listening(model, ServeOptions(**{"port": 0, **options}), print),
        ):
            pass
        return caught.value.message

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "is taken by another program" in refused(files.model, port=port)
    assert "is no address" in refused(files.model, host="no such host")
    assert "cannot listen" in refused(files.model, host="192.0.2.1")
    assert "nowhere" in refused("./nowhere")
    assert "multiple of 32" in refused(str(tiny_model(tmp_path / "narrow")), kv_bits=8)
    assert threading.active_count() < 20


def test_ctrl_c_ends_the_command_with_130_in_the_middle_of_an_answer(files: Files) -> None:
    command = [sys.executable, "-m", "mlx_slim", "serve", files.model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "100000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    with process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        port = int(line.split("/v1")[0].rsplit(":", 1)[1])
        body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            assert client.recv(16)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in rest
        assert time.monotonic() - began < 20
        assert process.stdout is not None and not process.stdout.read()
