"""A teacher behind HTTP, against a real server: what it sends, repeats, and never says."""

from __future__ import annotations

import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mlx_slim.distillation.endpoint import EndpointTeacher
from mlx_slim.errors import SlimError
from tests.support.endpoint import answers, completion, serving
from tests.support.runs import free_port

KEY = "sk-very-secret-0123456789"


def teacher(base_url: str, **changes: Any) -> EndpointTeacher:
    settings = {"max_tokens": 16, "retries": 2, "backoff": 0.01, "timeout": 5.0, **changes}
    return EndpointTeacher("t", base_url, "some-model", **settings)


def chats(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_come_in_order_and_few_at_a_time() -> None:
    prompts = chats(*("x" * n for n in range(1, 13)))
    with serving(slow=0.02) as served:
        replies = list(teacher(served.base_url, concurrency=3, until=["\n\n"]).answer(prompts))
    assert [text for text, _ in replies] == [
        f"Because it has {n} characters: {('x' * n)[-12:]!r}." for n in range(1, 13)
    ]
    assert {reason for _, reason in replies} == {"eos"}
    assert 1 < served.most <= 3
    assert len(served.requests) == 12
    for request in served.requests:
        assert request["path"] == "/v1/chat/completions"
        assert (request["model"], request["max_tokens"]) == ("some-model", 16)
        assert (request["temperature"], request["stream"]) == (0, False)
        assert request["stop"] == ["\n\n"]
        assert request["authorization"] is None


def test_tool_calls_are_sent_as_the_api_has_them() -> None:
    """Rows hold arguments as objects, the API has JSON text."""
    function = {"name": "look", "arguments": {"at": "Köln", "n": None}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": function}]}
    with serving() as served:
        list(teacher(served.base_url).answer([[*chats("a")[0], call, {**chats("b")[0][0]}]]))
    (sent,) = served.requests[0]["messages"][1]["tool_calls"]
    assert sent["function"]["arguments"] == '{"at": "Köln", "n": null}'
    assert function["arguments"] == {"at": "Köln", "n": None}


def test_stop_reasons_and_an_answer_without_text() -> None:
    replies = [completion("a", "length"), completion(None), completion("c", "content_filter")]
    with serving(lambda n, _: (200, replies[n], {})) as served:
        replies = list(teacher(served.base_url, concurrency=1).answer(chats("1", "2", "3")))
    assert replies == [("a", "length"), ("", "eos"), ("c", "eos")]


@pytest.mark.parametrize("status", [429, 503])
def test_busy_then_well(status: int) -> None:
    def script(number: int, body: dict[str, Any]):
        return (status, {}, {"Retry-After": "0"}) if number < 2 else answers(number, body)

    with serving(script) as served:
        assert len(list(teacher(served.base_url).answer(chats("one")))) == 1
    assert len(served.requests) == 3


def test_broken_for_ever_is_one_line_after_a_bounded_number_of_tries() -> None:
    with (
        serving(lambda *_: (500, b"out of\nmemory", {})) as served,
        pytest.raises(SlimError, match=r"500 Internal Server Error: out of memory \(3 tries\)"),
    ):
        list(teacher(served.base_url).answer(chats("one")))
    assert len(served.requests) == 3


def test_the_answers_before_a_failure_are_yielded() -> None:
    def script(number: int, body: dict[str, Any]):
        return (400, b"no", {}) if "bad" in str(body) else answers(number, body)

    replies = []
    with serving(script) as served, pytest.raises(SlimError, match="400 Bad Request: no"):
        for answer in teacher(served.base_url).answer(chats("a", "b", "bad", "d")):
            replies.append(answer)  # noqa: PERF402 (what came before the error is wanted)
    assert len(replies) == 2


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>welcome</html>",
        b'{"choices": []}',
        b"[1]",
        b"",
        b'{"choices":[{"message":{"content":3}}]}',
    ],
)
def test_a_reply_that_is_no_completion(reply: Any) -> None:
    with (
        serving(lambda *_: (200, reply, {})) as served,
        pytest.raises(SlimError, match="did not return a chat completion") as caught,
    ):
        list(teacher(served.base_url).answer(chats("one")))
    assert (reply.decode() or "nothing") in caught.value.message
    assert len(served.requests) == 1


class _CutShort(BaseHTTPRequestHandler):
    """Ends each first reply early: by its length, by its last chunk, or with the connection."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        way = body["messages"][-1]["content"]
        data = json.dumps(completion(f"whole: {way}")).encode()
        cut = data if way in self.server.seen else data[:-9]  # type: ignore[attr-defined]
        self.server.seen.append(way)  # type: ignore[attr-defined]
        self.send_response(200)
        if way == "length":
            self.send_header("Content-Length", str(len(data)))
        elif way == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            cut = b"%x\r\n%b" % (len(data), cut) + (b"\r\n0\r\n\r\n" if cut == data else b"")
        self.end_headers()
        self.wfile.write(cut)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_reply_that_is_cut_short_is_asked_for_again() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _CutShort)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        ways = ["length", "chunks", "connection"]
        replies = list(teacher(url, backoff=0.01).answer(chats(*ways)))
        with pytest.raises(SlimError, match=r"cut short after .* bytes \(1 try\)"):
            list(teacher(url, retries=0).answer(chats("length", "other")))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert [text for text, _ in replies] == [f"whole: {way}" for way in ways]


def test_silence_is_an_error_after_the_timeout() -> None:
    with serving(slow=0.5) as served, pytest.raises(SlimError, match=r"no answer within 0\.1 s"):
        list(teacher(served.base_url, timeout=0.1, retries=1).answer(chats("one")))


def test_nobody_listens() -> None:
    with pytest.raises(SlimError, match=r"[Rr]efused.*2 tries"):
        url = f"http://127.0.0.1:{free_port()}/v1"
        list(teacher(url, retries=1).answer(chats("one")))


def test_the_key_is_sent_and_in_no_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")

    def script(_: int, body: dict[str, Any]):
        return 401, f"bad key {KEY}, begone".encode(), {}

    caplog.set_level("DEBUG")
    with serving(script) as served:
        client = teacher(served.base_url, api_key_env="TEACHER_KEY")
        with pytest.raises(SlimError) as caught:
            list(client.answer(chats("one")))
    assert served.requests[0]["authorization"] == f"Bearer {KEY}"
    assert "401 Unauthorized: bad key ***, begone" in caught.value.message
    assert "TEACHER_KEY" in caught.value.hint
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert KEY not in text + json.dumps(client.settings) + caught.value.hint
    assert len(served.requests) == 1


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving() as other:
        moved = {"Location": f"{other.base_url}/chat/completions"}
        with (
            serving(lambda *_: (307, b"", moved)) as served,
            pytest.raises(SlimError, match=r"redirects \(307\) to http.*not followed"),
        ):
            list(teacher(served.base_url, api_key_env="TEACHER_KEY").answer(chats("one")))
    assert other.requests == []


def test_addresses_and_keys_are_checked_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for url, what in (
        ("file:///etc/passwd", "not an http"),
        ("ftp://host/v1", "not an http"),
        ("http://", "not an http"),
        ("http://host:port/v1", "not a valid address"),
        ("http://user:pass@host/v1", "must not contain"),
        ("http://host/v1?key=1", "must not contain"),
    ):
        with pytest.raises(SlimError, match=what) as caught:
            teacher(url)
        assert "pass@" not in str(caught.value)
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(SlimError, match="TEACHER_KEY is not set"):
        teacher("http://127.0.0.1/v1", api_key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "a\nb")
    with pytest.raises(SlimError, match="outside printable ASCII") as caught:
        teacher("http://127.0.0.1/v1", api_key_env="TEACHER_KEY")
    assert "a\nb" not in str(caught.value)
