"""The page of two images and its answers over HTTP: what is accepted, once, and from whom."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from alignkit.errors import AlignkitError, ConfigError
from alignkit.records import Example
from alignkit.serving import chooser
from alignkit.serving.answers import Answers, Pair
from alignkit.serving.chooser import Chooser
from page_fixtures import EVIL
from servers import running, solid

PLAN = [Pair(prompt, copy) for copy in range(4) for prompt in range(3)]
EXAMPLES = [Example("a red circle", {"target": "OPEN"}), Example(EVIL[0]), Example(EVIL[5])]


def read(image: str) -> tuple[int, int, int]:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        level = opened.getpixel((0, 0))
    assert isinstance(level, tuple)
    return level[0], level[1], level[2]


class Client:
    """What the page does, without a browser."""

    def __init__(self, server: Chooser) -> None:
        self.server, self.http = server, httpx2.Client(base_url=server.url, timeout=20, trust_env=False)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/state").json()
        return found

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, dict[str, Any]]:
        body = {"protocol": 1, "session": self.server.session} | body
        response = self.http.post(path, json=body, headers=headers)
        return response.status_code, response.json()

    def lines(self) -> list[dict[str, Any]]:
        table = self.server.answers.table
        return [json.loads(line) for line in table.read_text("utf-8").splitlines()] if table.exists() else []


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """A function that serves the folder `choices` and returns a client."""
    with ExitStack() as stack:

        def make(generate: Callable[[Pair], tuple[bytes, bytes]] = solid, **settings: Any) -> Client:
            answers = Answers(tmp_path / "choices", {"seed": 0}, len(EXAMPLES))
            server = Chooser(0, answers, EXAMPLES, PLAN, **settings)
            server.generate(generate)
            stack.enter_context(running(server))
            client = Client(server)
            stack.enter_context(client.http)
            return client

        yield make


Serve = Callable[..., Client]


def test_every_pair_is_shown_once_and_its_answer_names_the_image_that_was_shown(serve: Serve) -> None:
    client, shown, left = serve(origin={"model": "tiny"}, command="alignkit train"), [], []
    for number, answer in enumerate(["left", "right", "tie", "skip"] * 3):
        state = client.state()
        assert (state["done"], state["total"]) == (number, 12)
        pair = state["pair"]
        prompt, copy, which = read(pair["left"])
        assert read(pair["right"]) == (prompt, copy, 1 - which) and pair["text"] == EXAMPLES[prompt].text
        shown.append(Pair(prompt, copy))
        left.append(which)
        assert client.post("/answer", pair=pair["name"], answer=answer)[0] == 200
        line = client.lines()[-1]
        winner = {"left": which, "right": 1 - which}.get(answer)
        assert line["winner"] == (None if winner is None else shown[-1].files[winner]) and line["model"] == "tiny"
    assert shown == PLAN and set(left) == {0, 1}
    end = client.state()
    assert end["pair"] is None and end["done"] == end["total"] == len(client.lines()) == 12
    assert (end["summary"], end["command"]) == ("6 pairs, 3 ties, 3 skipped", "alignkit train")
    assert client.lines()[0]["metadata"] == {"target": "OPEN"} and client.lines()[2]["text"] == EVIL[5]


def test_the_same_answer_twice_is_one_and_another_or_unknown_one_is_refused(serve: Serve) -> None:
    client = serve()
    first, second = "000000_0", "000001_0"
    client.state()
    with ThreadPoolExecutor(6) as pool:  # as two open pages, or an impatient finger
        codes = list(pool.map(lambda _: client.post("/answer", pair=first, answer="left")[0], range(6)))
    assert set(codes) == {200} and len(client.lines()) == 1
    client.state()
    refused = [
        (409, "was answered before, with left", {"pair": first, "answer": "right"}),
        (409, "is not the one shown now", {"pair": "000002_0", "answer": "left"}),
        (409, "is not the one shown now", {"pair": "999999_7", "answer": "left"}),
        (409, "images of another folder", {"pair": second, "answer": "left", "session": "other"}),
        (400, "the name of a pair", {"pair": "../x", "answer": "left"}),
        (400, "the name of a pair", {"answer": "left"}),
        (400, "expected left, right, tie, skip", {"pair": second, "answer": "undo"}),
        (400, "expected left, right, tie, skip", {"pair": second, "answer": ["left"]}),
    ]
    for status, message, body in refused:
        code, answer = client.post("/answer", **body)
        assert code == status and message in answer["error"], body
    assert len(client.lines()) == 1 and client.state()["pair"]["name"] == second


def test_the_last_answer_can_be_undone_also_after_a_restart(serve: Serve) -> None:
    client = serve()
    for answer in ("left", "tie"):
        client.post("/answer", pair=client.state()["pair"]["name"], answer=answer)
    assert client.post("/undo", pair="000000_0")[0] == 409
    assert client.post("/undo", pair="000001_0")[1]["pair"]["name"] == "000001_0"
    again = serve()
    state = again.state()
    assert (state["done"], state["last"], state["pair"]["name"]) == (1, "000000_0", "000001_0")
    assert again.post("/undo", pair="000000_0")[1]["last"] is None and again.lines() == []


def test_pages_of_others_can_neither_answer_nor_frame_nor_read_the_page(serve: Serve) -> None:
    client = serve()
    name, host = client.state()["pair"]["name"], client.server.url.removeprefix("http://")
    for headers in (
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}, {"Origin": ""},
        {"Host": "evil.example"}, {"Host": "evil.example", "Origin": "http://evil.example"},
    ):  # fmt: skip
        assert client.post("/answer", headers, pair=name, answer="left")[0] == 403
        assert client.post("/undo", headers, pair=name)[0] == 403
    assert client.http.get("/state", headers={"Origin": "https://evil.example"}).status_code == 403
    plain = client.http.post("/answer", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415 and client.post("/answer", pair="0" * 20_000)[0] == 413
    assert client.lines() == []
    page = client.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in page.text and "access-control-allow-origin" not in page.headers
    for origin in (f"http://{host}", f"http://localhost:{host.partition(':')[2]}"):
        headers = {"Origin": origin, "Host": origin.removeprefix("http://")}
        assert client.post("/answer", headers, pair=name, answer="left")[0] == 200


def test_images_are_generated_a_few_pairs_ahead_and_kept_for_the_next_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chooser, "AHEAD", 3)
    made: list[Pair] = []
    ready = threading.Condition()

    def generate(pair: Pair) -> tuple[bytes, bytes]:
        with ready:
            made.append(pair)
            ready.notify_all()
        return solid(pair)

    client = serve(generate)
    for shown in range(3):
        with ready:
            assert ready.wait_for(lambda shown=shown: len(made) == 3 + shown, 10)
        client.post("/answer", pair=client.state()["pair"]["name"], answer="tie")
    client.server.shutdown()
    client.server.server_close()
    assert len(made) in (5, 6) and made == PLAN[: len(made)]
    assert serve(generate).state()["done"] == 3 and len(set(made)) == len(made)


def test_a_request_without_images_yet_is_answered_in_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "PATIENCE", 0.05)
    go = threading.Event()

    def generate(pair: Pair) -> tuple[bytes, bytes]:
        go.wait(20)
        return solid(pair)

    client = serve(generate)
    state = client.state()
    assert state["pair"] is None and state["done"] < state["total"]
    assert client.post("/answer", pair="000000_0", answer="left")[0] == 409  # nobody has seen it
    monkeypatch.setattr(chooser, "PATIENCE", 20)
    go.set()
    assert client.state()["pair"]["name"] == "000000_0"


def test_a_failure_to_generate_ends_the_server_and_is_kept(serve: Serve) -> None:
    def generate(pair: Pair) -> tuple[bytes, bytes]:
        if pair == PLAN[1]:
            raise AlignkitError("out of memory")
        return solid(pair)

    client = serve(generate)
    assert client.server._thread is not None
    client.server._thread.join(10)
    assert str(client.server.failure) == "out of memory"


def test_ports_that_cannot_be_bound_are_refused(serve: Serve, tmp_path: Path) -> None:
    answers = Answers(tmp_path / "other", {}, len(EXAMPLES))
    with pytest.raises(ConfigError, match="--port 80000: expected 1 to 65535, or 0 for a free port"):
        Chooser(80_000, answers, EXAMPLES, PLAN)
    with pytest.raises(AlignkitError, match=r"--port \d+: cannot be bound .*; choose another, or 0 for a free one"):
        Chooser(serve().server.server_address[1], answers, EXAMPLES, PLAN)
