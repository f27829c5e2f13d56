"""The page's routes, with a made-up engine: who may read what, what leaves the server, and how often the engine is asked."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from tests.serving.fake_engine import WORDS, Engine, Tokenizer, application, small_tree
from vllm_eagle.algorithm.accept import Walk
from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import TreeMetrics, TreeTrace
from vllm_eagle.serving import feed as feed_module
from vllm_eagle.serving.history import History
from vllm_eagle.serving.page import EaglePage
from vllm_eagle.serving.source import Source
from vllm_eagle.serving.summary import verdict
from vllm_eagle.serving.trees import TreeView, token_text

READ = ("/eagle/data.json", "/eagle/metrics")


@contextmanager
def serving(engine: Engine, api_key: list[str] | None = None) -> Iterator[TestClient]:
    """The plugin in an application, as vLLM attaches it."""
    with TestClient(application(engine, api_key), base_url="http://server:8000") as client:
        yield client
    stats_file.remove(engine.file)


def test_the_plugin_is_one_to_vllm() -> None:
    assert isinstance(EaglePage(), EndpointPlugin)
    assert EaglePage.name == "eagle_trees"


def test_the_page_holds_no_data_and_may_load_nothing_from_elsewhere() -> None:
    engine = Engine()
    engine.create_file()
    engine.step(small_tree(), [2, 7])
    with serving(engine, ["key"]) as client:
        for path, kind in (("/eagle", "text/html"), ("/eagle/page.css", "text/css"), ("/eagle/page.js", "text/javascript")):
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert "shipped-pair" not in answer.text
        page = client.get("/eagle").text
        assert "onclick" not in page
        assert "style=" not in page
        assert "<script>" not in page
    assert engine.calls == []


@pytest.mark.parametrize("path", READ)
def test_the_key_is_asked_for_and_compared(path: str) -> None:
    engine = Engine()
    engine.create_file()
    with serving(engine, ["first", "second"]) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}, {"Authorization": "first"}):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json() == {"error": "This server wants its API key."}
        assert engine.calls == []
        for key in ("first", "second"):
            assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_the_key_of_the_environment_counts_unless_the_command_line_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    with serving(Engine()) as client:
        assert client.get(READ[0]).status_code == 401
        assert client.get(READ[0], headers={"Authorization": "Bearer from-environment"}).status_code == 200
    with serving(Engine(), ["from-command-line"]) as client:
        assert client.get(READ[0], headers={"Authorization": "Bearer from-environment"}).status_code == 401


@pytest.mark.parametrize("path", READ)
def test_pages_of_other_sites_may_not_read(path: str) -> None:
    with serving(Engine()) as client:
        assert client.get(path, headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get(path, headers={"Origin": "null"}).status_code == 403
        assert client.get(path, headers={"Origin": "http://["}).status_code == 403  # no URL
        assert client.get(path, headers={"Origin": "http://server:8000"}).status_code == 200


@pytest.mark.parametrize("path", ["/eagle", "/eagle/page.js", *READ])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_only_reading_is_possible(path: str, method: str) -> None:
    engine = Engine()
    with serving(engine) as client:
        assert client.request(method, path).status_code == 405
    assert engine.calls == []


def test_parameters_are_ignored() -> None:
    engine = Engine()
    with serving(engine) as client:
        assert client.get("/eagle/data.json?method=shutdown&show_text=1").json()["options"]["show_text"] is False
    assert set(engine.calls) <= {"eagle_stats", "eagle_recent_trees"}


def test_no_words_leave_the_server_unless_asked_for() -> None:
    tree = small_tree()
    hidden, shown = Engine(), Engine(show_text=True)
    for engine in (hidden, shown):
        engine.create_file()
        engine.step(tree, [2, 7])
    with serving(hidden) as client:
        text = client.get("/eagle/data.json").text
        found = json.loads(text)["recent"]
    assert "chatcmpl-secret" not in text
    assert "token" not in found[0]
    assert found == [
        {
            "request": found[0]["request"],
            "parents": [0, 0, 0, 1],
            "confidence": [1.0, 0.9, 0.1, 0.8],
            "path": [1],
            "num_emitted": 2,
        }
    ]
    for word in WORDS:
        assert json.dumps(word)[1:-1] not in json.dumps(found)
    with serving(shown) as client:
        answer = client.get("/eagle/data.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    found = answer.json()["recent"]
    assert found[0]["request"] == "chatcmpl-secret"
    assert found[0]["texts"] == ["The", " price", "<script>alert(1)</script>", " of"]
    assert found[0]["emitted"] == [" price", " 48"]


def test_names_of_requests_tell_them_apart_and_nothing_else() -> None:
    trace = TreeTrace()
    for req_id in ("a", "b", "a"):
        trace.record(req_id, Walk(small_tree()))
    names = [tree["request"] for tree in TreeView(None)(trace.last())]
    assert names[0] == names[2] != names[1]
    assert names != [tree["request"] for tree in TreeView(None)(trace.last())]  # another process, other names


def test_token_text_keeps_spaces_in_front() -> None:
    decode = token_text(Tokenizer())
    assert [decode(i) for i in range(len(WORDS))] == WORDS


def test_figures_on_the_page() -> None:
    engine = Engine()
    engine.create_file()
    with serving(engine) as client:
        assert client.get("/eagle/data.json").json()["level"] == "idle"
        for _ in range(30):
            engine.step(small_tree(), [2, 3, 5], num_requests=2)
        for _ in range(10):
            engine.step(small_tree(), [4])
        found = client.get("/eagle/data.json").json()
    assert found["trees"]
    assert (found["model"], found["head"]) == ("shipped-pair", "head")
    assert (found["level"], found["verdict"]) == ("good", "Speculation works")
    assert found["load"] == {"running": 3, "waiting": 1, "kv_usage": 0.25}
    for span in ("minute", "total"):
        window = found[span]
        assert window["tau"] == 1 + 60 / 40
        assert (window["passes"], window["trees"], window["nodes_per_tree"]) == (40, 40, 3)
        assert window["depths"] == [
            {"reached": 40, "accepted": 30},
            {"reached": 30, "accepted": 30},
            {"reached": 30, "accepted": 0},
        ]
        assert window["loads"] == [{"requests": "1", "trees": 10, "nodes": 3}, {"requests": "2-3", "trees": 30, "nodes": 3}]
        assert [stage["name"] for stage in window["stages"]] == ["draft", "verify", "accept", "compact"]
        assert window["stages"][1] == {"name": "verify", "share": pytest.approx(5 / 8.2), "ms": pytest.approx(5)}
        assert window["decisions"]["tree"] == 70
    assert found["minute"]["tokens_per_s"] == pytest.approx(100 / found["minute"]["seconds"])
    assert 2.5 in found["chart"]["taus"][-2:]
    assert set(found["chart"]["taus"][:-2]) == {None}


def test_speculation_that_is_off_is_said() -> None:
    engine = Engine()
    engine.create_file()
    engine.metrics.counts["speculation_off"] = 1
    with serving(engine) as client:
        found = client.get("/eagle/data.json").json()
    assert found["speculation_off"]
    assert (found["level"], found["verdict"]) == ("bad", "Speculation is off")


def test_verdicts() -> None:
    def counted(*accepted: int, passes: int = 100) -> TreeMetrics:
        metrics = TreeMetrics()
        metrics.add("num_passes", passes)
        for number in accepted:
            metrics.count_verification(16, number, 1)
        return metrics

    assert verdict(TreeMetrics(), counted(3)) == ("idle", "Idle")
    assert verdict(counted(*[3] * 30), counted(*[3] * 90)) == ("good", "Speculation works")
    assert verdict(counted(*[0] * 30), counted(*[3] * 90)) == ("warn", "Hardly any draft is accepted")
    assert verdict(counted(*[1] * 30), counted(*[3] * 90)) == ("warn", "Below its average")
    none = counted()
    none.count_decision("no_room", 7)
    assert verdict(none, counted(3)) == ("warn", "No trees: no_room 7")


def test_a_server_without_trees_says_so() -> None:
    engine = Engine(tree_mode=False)
    with serving(engine) as client:
        found = client.get("/eagle/data.json").json()
        assert found["trees"] is False
        assert found["model"] == "shipped-pair"
        assert client.get("/eagle/metrics").text == ""
    assert engine.calls == []


def test_the_metrics_route_counts_as_the_collector_does() -> None:
    engine = Engine()
    engine.create_file()
    engine.step(small_tree(), [2, 3, 5])
    with serving(engine) as client:
        text = client.get("/eagle/metrics").text
    assert 'vllm_eagle_nodes_accepted_total{engine="0",model_name="shipped-pair"} 2.0' in text
    assert engine.calls == []  # the file is enough


def test_a_dead_engine_gives_one_sentence() -> None:
    engine = Engine()
    engine.errored = True
    with serving(engine) as client:
        for path in READ:
            answer = client.get(path)
            assert answer.status_code == 503
            assert "engine is dead" in answer.json()["error"]
        assert client.get("/eagle").status_code == 200


def test_before_the_engine_is_there() -> None:
    app = FastAPI()
    EaglePage().attach_router(app)
    assert TestClient(app).get("/eagle/data.json").status_code == 503


def test_an_engine_that_refuses_a_call_is_reported_without_details() -> None:
    engine = Engine()
    engine.create_file()
    engine.broken = True
    with serving(engine) as client:
        answer = client.get("/eagle/data.json")
    assert answer.status_code == 200
    assert "does not answer eagle_recent_trees" in answer.json()["problem"]
    assert "secret detail" not in answer.text


def test_many_browsers_cost_one_call_a_second() -> None:
    engine = Engine()
    engine.create_file()
    now = [100.0]

    async def run() -> None:
        source = Source(engine, engine.file, clock=lambda: now[0])
        for _ in range(3):
            engine.step(small_tree(), [2, 3, 5])
            await asyncio.gather(*(source.update() for _ in range(20)))
            now[0] += 0.3
        assert engine.calls == ["eagle_recent_trees"]
        now[0] += 0.2
        await asyncio.gather(*(source.update() for _ in range(20)))
        assert engine.calls == ["eagle_recent_trees"] * 2
        assert source.problem is None
        assert len(source.trees) == 3
        for _ in range(5):  # nothing new: the engine is left alone
            now[0] += 2
            await source.update()
        assert len(engine.calls) == 2

    asyncio.run(run())
    stats_file.remove(engine.file)


def test_a_busy_engine_is_asked_once_and_waited_for_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_eagle.serving.source.WAIT_S", 0.01)
    engine = Engine()
    engine.create_file()
    engine.step(small_tree(), [2, 3, 5])
    now = [100.0]

    async def run() -> None:
        engine.answering = asyncio.Event()
        source = Source(engine, engine.file, clock=lambda: now[0])
        for _ in range(4):
            await source.update()
            now[0] += 2
        assert engine.calls == ["eagle_recent_trees"]
        assert source.silent_s == 8
        assert source.trees == []
        assert source.counters is not None  # the file does not wait
        engine.answering.set()
        await source.update()
        assert len(source.trees) == 1
        assert source.silent_s == 0

    asyncio.run(run())
    stats_file.remove(engine.file)


def test_without_the_file_counters_and_trees_come_by_call_in_turn() -> None:
    engine = Engine()
    engine.step(small_tree(), [2, 3, 5])
    now = [100.0]

    async def run() -> None:
        source = Source(engine, engine.file, clock=lambda: now[0])
        for _ in range(4):
            await source.update()
            now[0] += 1
        assert engine.calls == ["eagle_stats", "eagle_recent_trees"] * 2
        assert source.counters is not None
        assert source.counters.as_dict() == engine.metrics.as_dict()
        await source.update(trees=False)
        now[0] += 1
        await source.update(trees=False)
        assert engine.calls[4:] == ["eagle_stats"] * 2

    asyncio.run(run())


def test_the_chart_knows_when_nothing_happened() -> None:
    history, metrics = History(), TreeMetrics()
    for second in range(40):
        if not 10 <= second < 20:
            metrics.add("num_passes")
            metrics.count_verification(4, second % 2, 1)
        history.add(1000.0 + second, TreeMetrics(metrics.counts.copy()))
    taus = history.taus(1039.5, 5)
    assert len(taus) == 120
    assert taus[:-8] == [None] * 112
    assert taus[-8:] == [None, 1.6, None, None, 1.4, 1.6, 1.4, 1.6]  # four are too few
    assert taus[1:] == history.taus(1041.0, 5)[:-1]  # points stay what they were
    minute, seconds = history.last(60)
    assert seconds == 39
    assert minute.counts["num_verifications"] == 29  # of the first sample on
    metrics.reset()
    history.add(1041.0, TreeMetrics(metrics.counts.copy()))
    assert history.last(60)[0].counts["num_verifications"] == 0


def test_without_the_file_there_are_no_samples_but_the_engines_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "SAMPLE_EVERY_S", 0.005)

    async def run() -> None:
        feed = feed_module.Feed(Engine())
        sampling = asyncio.create_task(feed.sample())
        for answers in (1, 1, 2):  # the trees are asked for in between
            await feed.data()
            await asyncio.sleep(0.1)
            assert len(feed._history._samples) == answers
            feed._source._called_s -= 1
        sampling.cancel()

    asyncio.run(run())


def test_samples_are_taken_without_anybody_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "SAMPLE_EVERY_S", 0.01)
    engine = Engine()
    engine.create_file()
    with serving(engine) as client:
        time.sleep(0.2)
        for _ in range(30):
            engine.step(small_tree(), [2, 3, 5])
        time.sleep(0.2)
        assert engine.calls == []
        found = client.get("/eagle/data.json").json()
    assert found["minute"]["trees"] == 30
    assert found["minute"]["seconds"] >= 0.3
