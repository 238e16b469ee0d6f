"""A reward served over HTTP: the requests that are sent, and how failing answers are handled."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import servers
from alignkit.errors import ConfigError, PluginError, TransientError
from alignkit.interfaces import Reward
from alignkit.records import Example
from alignkit.rewards.weighted import WeightedRewards
from alignkit.serving.http import JsonServer
from alignkit.serving.server import Limits, RewardServer
from alignkit_rewards.clip_score import ClipScore
from alignkit_rewards.jpeg import JpegIncompressibility
from alignkit_rewards.remote import Remote
from servers import Odd, serving

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_rewards.endpoint.FIRST_WAIT", 0.01)
    monkeypatch.delenv("ALIGNKIT_TOKEN", raising=False)


def client(server: RewardServer, **fields: Any) -> Remote:
    reward = Remote(url=server.url, **fields)
    reward.check_server([Example("a red circle")])
    reward.load(CPU)
    return reward


def test_it_holds_the_contract(clip_folder: str, holds_the_contract: Callable[..., None]) -> None:
    with serving(ClipScore(checkpoint=clip_folder)) as server:
        reward = client(server)
        assert not reward.differentiable
        holds_the_contract(reward)


@pytest.mark.parametrize("images_per_request", [1, 3, 16])
def test_scores_are_those_of_the_reward_itself_to_the_bit(
    images_per_request: int, images: Tensor, examples: list[Example]
) -> None:
    local = JpegIncompressibility(quality=80)
    with serving(JpegIncompressibility(quality=80)) as server:
        remote = client(server, images_per_request=images_per_request)
        assert torch.equal(remote(images, examples).values, local(images, examples))
        assert remote.bounds == (0.0, None)


def test_every_grey_level_arrives_as_it_left(examples: list[Example]) -> None:
    levels = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    seen = []

    class Keeps(Reward):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            seen.append(images)
            return images.mean((1, 2, 3))

    with serving(Keeps()) as server:
        client(server)(levels, examples[:1])
    assert torch.equal(seen[0], levels)


def test_parts_metadata_and_invalid_images_come_through(images: Tensor) -> None:
    examples = [Example("a"), Example("what?"), Example("c", {"weight": 0.5, "why": ["ä"]}), Example("d")]
    expected = WeightedRewards([("it", 1.0, Odd())])(images, examples)
    with serving(Odd()) as server:
        found = WeightedRewards([("it", 1.0, client(server, images_per_request=2))])(images, examples)
    assert found.valid.tolist() == [True, False, True, True]
    assert found.reasons == expected.reasons == ["", "it: a question", "", ""]
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0, equal_nan=True)
    assert set(found.parts) == {"it", "it/half", "it/some"}
    torch.testing.assert_close(dict(found.parts), dict(expected.parts), rtol=0, atol=0, equal_nan=True)


def test_requests_respect_the_limits_of_the_server(examples: list[Example]) -> None:
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))  # 7 kB as PNG files
    size = images.shape[-1] ** 2
    for limits, calls in ((Limits(items=3), 2), (Limits(pixels=2 * size), 2), (Limits(bytes=16_000), 4)):
        reward = Odd()
        with serving(reward, limits=limits) as server:
            assert client(server)(images, examples).valid.all()
        assert reward.calls == calls
    with serving(Odd(), limits=Limits(pixels=size - 1)) as server:
        remote = client(server)
        with pytest.raises(ConfigError, match=f"remote: an image of {size} pixels is larger than http.* accepts"):
            remote(images, examples)


def test_no_more_requests_than_allowed_are_in_flight(images: Tensor, examples: list[Example]) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    both = threading.Barrier(2, timeout=20)

    class Counting(RewardServer):
        def score(self, body: dict[str, Any]) -> dict[str, Any]:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            both.wait()  # so that two requests are in flight at some point
            answer = super().score(body)
            with lock:
                now[0] -= 1
            return answer

    server = Counting("127.0.0.1", 0, WeightedRewards([("served", 1.0, Odd())]), "f", "", 16, Limits())
    with servers.running(server):
        remote = client(server, images_per_request=1, concurrency=2)
        remote(images, examples)
    assert most == [2]


def test_a_prompt_that_the_reward_cannot_score_is_found_by_check() -> None:
    with serving(Odd()) as server:
        remote = Remote(url=server.url)
        with pytest.raises(ConfigError, match=r"remote: http\S+ cannot score a prompt: odd: the prompt 'unscorable 7'"):
            remote.check_server([*(Example("fine") for _ in range(2500)), Example("unscorable 7")])
        with pytest.raises(ConfigError, match="remote: the prompt 'a' cannot be sent as JSON"):
            remote.check([Example("a", {"when": object()})])


def test_a_busy_server_is_retried_and_a_faulty_reward_is_not(images: Tensor, examples: list[Example]) -> None:
    busy, bug = Odd("busy"), Odd("bug")
    with serving(busy) as server:
        assert client(server)(images, examples).valid.all()
        assert busy.calls == 3
        busy.calls = 0
        with pytest.raises(
            TransientError, match=r"remote: no answer from http.*/score in 2 tries \(status 503: .*odd: come"
        ):
            client(server, retries=1)(images, examples)
    for reward, message, calls in (
        (bug, "while scoring image 0, 'a red circle': KeyError: 'target'", 2),  # the second call finds the image
        (Odd("nan"), "returned nan for image 0, 'a red circle'", 1),
    ):
        with (
            serving(reward) as server,
            pytest.raises(PluginError, match=f"remote: the reward at http.* failed: .*{message}"),
        ):
            client(server)(images, examples)
        assert reward.calls == calls


def test_a_missing_server_is_reported_in_one_line() -> None:
    with serving(Odd()) as server:
        url = server.url
    with pytest.raises(
        TransientError, match=rf"remote: no answer from {url}/spec in 3 tries \(ConnectError .*\); check"
    ):
        Remote(url=url, retries=2).check_server([])
    Remote(url=url).check([Example("a")])  # sends nothing


def test_a_server_that_answers_too_late_is_not_retried(images: Tensor, examples: list[Example]) -> None:
    done = threading.Event()

    class Slow(Reward):
        def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
            done.wait(20)
            return images.mean((1, 2, 3))

    with serving(Slow()) as server:
        remote = client(server, timeout=0.2, retries=9)
        with pytest.raises(TransientError, match=r"in 1 try \(no whole answer within 0.2 seconds\)"):
            remote(images, examples)
        done.set()


def test_another_reward_at_the_same_address_is_refused(images: Tensor, examples: list[Example]) -> None:
    with serving(Odd(), fingerprint="first") as server:
        remote = client(server, serves="first")
        port = server.server_address[1]
        with pytest.raises(ConfigError, match="serves served with fingerprint first, expected second; start"):
            Remote(url=server.url, serves="second").check_server([])
    with serving(Odd(), fingerprint="second", port=port):
        with pytest.raises(ConfigError, match=r"status 409: .* fingerprint first, this server has second"):
            remote(images, examples)
        with pytest.raises(ConfigError, match="fingerprint second, expected first"):
            remote.load(CPU)


def test_scores_are_cached_only_for_a_deterministic_reward_with_serves_set_and_a_fingerprint_of_its_own() -> None:
    class Fingerprinted(Odd):
        def fingerprint(self) -> str:
            return "odd 1"

    class Stochastic(Fingerprinted):
        deterministic = False

    with serving(Odd()) as server:
        remote = client(server, serves=servers.MARK)
        assert remote.deterministic and not remote.fingerprint()
    with serving(Fingerprinted()) as server:
        assert not Remote().deterministic
        assert not client(server).deterministic and not client(server).fingerprint()
        assert client(server, serves=servers.MARK).deterministic
        assert client(server, serves=servers.MARK).fingerprint() == f"remote {servers.MARK}"
    with serving(Stochastic()) as server:
        assert not client(server, serves=servers.MARK).deterministic


def test_a_server_of_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.serving.http.PROTOCOL", 2)
    message = "uses protocol 2, this alignkit uses 1; install the same version of alignkit"
    with serving(Odd()) as server, pytest.raises(ConfigError, match=message):
        Remote(url=server.url).check_server([])


def test_a_server_that_is_not_alignkit_serve_is_reported() -> None:
    endpoint = servers.Endpoint(lambda *_: "")
    message = r"/spec is not served by `alignkit serve` \(status 404: Not Found\); correct the url"
    with servers.running(endpoint), pytest.raises(ConfigError, match=message):
        Remote(url=endpoint.url).check_server([])


@pytest.fixture
def lying(request: Any) -> Iterator[str]:
    """The URL of a server that answers every score request with `request.param`."""
    other = {"fingerprint": "other"} if request.param == "of another server" else {}
    routes = {
        "GET /spec": lambda _: {"name": "x", "fingerprint": "f", "bounds": [None, None],
                                "limits": {"items": 9, "bytes": 1 << 20, "pixels": 1 << 20}},
        "POST /check": lambda _: {"problem": None},
        "POST /score": lambda _: {"fingerprint": "f", "items": request.param} | other,
    }  # fmt: skip
    server = JsonServer("127.0.0.1", 0, routes, token="", max_bytes=1 << 20, max_requests=4)
    with servers.running(server):
        yield server.url


def test_a_dropped_connection_is_retried_and_then_an_error(images: Tensor, examples: list[Example]) -> None:
    deaths = [ConnectionAbortedError(), ConnectionAbortedError()]

    class Dies(RewardServer):
        def score(self, body: dict[str, Any]) -> dict[str, Any]:
            if deaths:
                raise deaths.pop()  # the connection is closed without an answer
            return super().score(body)

    server = Dies("127.0.0.1", 0, WeightedRewards([("served", 1.0, Odd())]), "f", "", 16, Limits())
    with servers.running(server):
        assert client(server)(images, examples).valid.all() and not deaths
        deaths += [ConnectionAbortedError(), ConnectionAbortedError()]
        with pytest.raises(TransientError, match=r"in 2 tries \(RemoteProtocolError"):
            client(server, retries=1)(images, examples)


GOOD = {"valid": True, "score": 0.5}


@pytest.mark.parametrize(
    ("lying", "message"),
    [
        (None, "returned no scores for 4 images"),
        ([GOOD] * 3, "returned 3 scores for 4 images, expected one each"),
        ([GOOD] * 5, "returned 5 scores for 4 images"),
        ([GOOD] * 3 + [{"valid": True}], 'returned {"valid": true}, expected'),
        ([GOOD] * 3 + [{"valid": True, "score": "0.5"}], 'returned {"valid": true, "score": "0.5"}, expected'),
        ([GOOD] * 3 + [{"valid": True, "score": True}], "expected"),
        ([GOOD] * 3 + [{"valid": 1, "score": 0.5}], "expected"),
        ([GOOD] * 3 + [{**GOOD, "parts": {"a": None}}], "expected"),
        ([GOOD] * 3 + [0.5], "returned 0.5, expected"),
    ],
    indirect=["lying"],
    ids=str,
)
def test_a_malformed_answer_is_an_error_and_never_a_score(
    lying: str, message: str, images: Tensor, examples: list[Example]
) -> None:
    remote = Remote(url=lying)
    remote.load(CPU)
    with pytest.raises(PluginError) as caught:
        remote(images, examples)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("lying", ["of another server"], indirect=True)
def test_an_answer_with_another_fingerprint_is_refused(lying: str, images: Tensor, examples: list[Example]) -> None:
    remote = Remote(url=lying)
    remote.load(CPU)
    with pytest.raises(ConfigError, match="answered with fingerprint other, expected f"):
        remote(images, examples)


def test_the_token_comes_from_the_environment_and_is_never_shown(
    images: Tensor, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Odd(), token="s3cret") as server:
        remote = Remote(url=server.url)
        with pytest.raises(ConfigError, match=r"refuses the token, none was sent \(status 401.*that token_env names"):
            remote.check_server([])
        monkeypatch.setenv("ALIGNKIT_TOKEN", "wr0ng")
        with pytest.raises(ConfigError, match="the one in the environment variable ALIGNKIT_TOKEN") as caught:
            remote.check_server([])
        assert "wr0ng" not in str(caught.value)
        monkeypatch.setenv("HOUSE_TOKEN", "s3cret\n")
        remote = client(server, token_env="HOUSE_TOKEN")
        assert remote(images, examples).valid.all()
        assert "s3cret" not in repr(remote) + repr(vars(remote))
        monkeypatch.setenv("HOUSE_TOKEN", "s3\ncret")
        with pytest.raises(
            ConfigError, match=r"HOUSE_TOKEN holds a token with characters that cannot be sent"
        ) as caught:
            remote.check_server([])
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("url", "localhost:8188", "url is 'localhost:8188', expected http://HOST:PORT"),
        ("url", "file:///etc/passwd", "url is"),
        ("url", "http://me:hunter2@localhost", "url contains a user name or password"),
        ("token_env", "sk-123", "token_env is not the name of an environment variable"),
    ],
)
def test_an_invalid_field_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"remote: {message}") as caught:
        Remote(**{field: value})  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value) and "sk-123" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images_per_request", 0, "images_per_request: found 0, expected 1 or more"),
        ("concurrency", 0, "concurrency: found 0, expected 1 or more"),
        ("retries", -1, "retries: found -1, expected 0 or more"),
        ("timeout", 0.0, "timeout: found 0.0, expected more than 0"),
        ("timeout", math.inf, "timeout: found inf, expected more than 0, and finite"),
    ],
)
def test_a_field_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Remote(**{field: value})  # type: ignore[arg-type]
