"""Counters of trees: what is counted, how it is shared between processes, and what Prometheus and the log make of it."""

import errno
import gc
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics import loggers
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.spec_decode import metrics as spec_decode

from tests.serving.fake_engine import Engine
from vllm_eagle.algorithm.config import TreeConfig
from vllm_eagle.metrics import stats_file
from vllm_eagle.metrics.counters import COUNTS, DECISIONS, STAGES, TreeMetrics
from vllm_eagle.options import instances
from vllm_eagle.serving import multiprocess
from vllm_eagle.serving.families import TreeCollector, families, load_label
from vllm_eagle.serving.stat_logger import EagleStatLogger, Load
from vllm_eagle.serving.summary import log_line

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana_dashboard.json"
LABELS = {"model_name": "m", "engine": "0"}


def counted() -> TreeMetrics:
    """Seven verifications, accepting 0, 0, 1, 3, 3, 3 and 8 nodes."""
    metrics = TreeMetrics()
    metrics.add("num_passes", 9)
    metrics.add("num_drafted", 100)
    metrics.add("num_moved", 11)
    for nodes, accepted, requests in ((16, 0, 1), (16, 0, 1), (5, 1, 3), (16, 3, 3), (16, 3, 3), (16, 3, 2), (15, 8, 600)):
        metrics.count_verification(nodes, accepted, requests)
    for stage, seconds in zip(STAGES, (1.5, 2.5, 0.25, 0.125), strict=True):
        metrics.add_seconds(stage, seconds)
    metrics.count_decision("tree", 7)
    metrics.count_decision("no_room", 2)
    return metrics


def samples(metrics: TreeMetrics, **options: Any) -> dict[str, float]:
    """Prometheus' text, read back: `name{label=value}` without the labels that all have."""
    registry = CollectorRegistry()
    registry.register(TreeCollector(lambda: metrics, TreeConfig(**{"num_draft_tokens": 16} | options), LABELS))
    return read(registry)


def shared(folder: Path) -> dict[str, float]:
    """The same of a registry that processes share, as vLLM makes it."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return read(registry)


def read(registry: CollectorRegistry) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.labels.keys() >= LABELS.keys()
            rest = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k not in LABELS)
            found[sample.name + (f"{{{rest}}}" if rest else "")] = sample.value
    return found


def test_samples_are_what_was_counted() -> None:
    found = samples(counted())
    prefix = "vllm_eagle_"
    plain = {
        "target_passes_total": 9,
        "nodes_drafted_total": 100,
        "nodes_verified_total": 100,
        "nodes_accepted_total": 18,
        "tokens_moved_total": 11,
        "drafting_errors_total": 0,
        "speculation_off": 0,
    }
    assert {name: found[prefix + name] for name in plain} == plain
    accepted = [found[f"{prefix}accepted_tokens_bucket{{le={le}}}"] for le in ("0.0", "1.0", "2.0", "3.0", "7.0", "8.0", "+Inf")]
    assert accepted == [2, 3, 3, 6, 6, 7, 7]
    assert (found[prefix + "accepted_tokens_sum"], found[prefix + "accepted_tokens_count"]) == (18, 7)
    sizes = [found[f"{prefix}tree_nodes_bucket{{le={le}}}"] for le in ("4.0", "6.0", "12.0", "16.0", "+Inf")]
    assert sizes == [0, 1, 1, 7, 7]
    assert (found[prefix + "tree_nodes_sum"], found[prefix + "tree_nodes_count"]) == (100, 7)
    reached = [found[f"{prefix}depth_reached_total{{depth={depth}}}"] for depth in range(1, 9)]
    assert reached == [7, 5, 4, 4, 1, 1, 1, 1]
    accepted = [found[f"{prefix}depth_accepted_total{{depth={depth}}}"] for depth in range(1, 9)]
    assert accepted == [5, 4, 4, 1, 1, 1, 1, 1]
    assert [found[f"{prefix}stage_seconds_total{{stage={stage}}}"] for stage in STAGES] == [1.5, 2.5, 0.25, 0.125]
    assert [found[f"{prefix}stage_runs_total{{stage={stage}}}"] for stage in STAGES] == [1, 1, 1, 1]
    assert [found[f"{prefix}decisions_total{{decision={decision}}}"] for decision in DECISIONS] == [7, 0, 2, 0, 0, 0, 0, 0]
    assert found[prefix + "load_trees_total{requests=2-3}"] == 4
    assert found[prefix + "load_nodes_total{requests=2-3}"] == 53
    assert found[prefix + "load_trees_total{requests=512+}"] == 1
    assert [load_label(bucket) for bucket in (0, 1, 2, 9)] == ["1", "2-3", "4-7", "512+"]


@pytest.mark.parametrize("options", [{"num_draft_tokens": 64}, {"num_draft_tokens": 3}, {"mode": "chain", "num_draft_tokens": 127}])
def test_buckets_fit_the_trees_of_the_engine(options: dict[str, Any]) -> None:
    metrics = TreeMetrics()
    most = options["num_draft_tokens"]
    metrics.count_verification(most, TreeConfig(**options).depth_limit, 1)
    found = samples(metrics, **options)
    for name, value in (("accepted_tokens", TreeConfig(**options).depth_limit), ("tree_nodes", most)):
        bounds = [float(x) for x in re.findall(rf"{name}_bucket{{le=([0-9.]+)}}", " ".join(found))]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == value
        assert len(bounds) <= 23
        assert found[f"vllm_eagle_{name}_bucket{{le={float(value)}}}"] == 1
        assert found[f"vllm_eagle_{name}_sum"] == value
    assert sum(name.startswith("vllm_eagle_depth_reached") for name in found) == TreeConfig(**options).depth_limit


def test_no_counter_falls_in_the_middle_of_an_update() -> None:
    """Prometheus takes a fall for a restart: whatever part of an update a scrape sees, nothing is below the scrape before."""
    before, after = counted(), counted()
    after.count_verification(16, 5, 3)
    fields = [name for name in COUNTS.names or () if (before.counts[name] != after.counts[name]).any()]
    first = samples(before)
    for seen in range(1 << len(fields)):
        torn = TreeMetrics(before.counts.copy())
        for i, name in enumerate(fields):
            if seen >> i & 1:
                torn.counts[name] = after.counts[name]
        assert all(value >= first[name] for name, value in samples(torn).items())


def test_counts_become_json_and_come_back() -> None:
    found = json.loads(json.dumps(counted().as_dict()))
    assert found["accepted_at_depth"] == [5, 4, 4, 1, 1, 1, 1, 1]
    assert found["tau"] == 1 + 18 / 7
    again = TreeMetrics.from_dict(found)
    assert again.counts == counted().counts
    assert again.as_dict() == counted().as_dict()


def test_since_counts_what_came_after_and_survives_a_reset() -> None:
    metrics = counted()
    before = TreeMetrics(metrics.counts.copy())
    metrics.counts["num_requests"] = 4
    metrics.count_verification(16, 2, 1)
    found = metrics.since(before)
    assert found.by_depth[:2] == [(1, 1), (1, 1)]
    assert (found.counts["num_verifications"], found.counts["num_verified"], found.counts["num_drafted"]) == (1, 16, 0)
    assert found.counts["num_requests"] == 4  # a state, not a count
    metrics.reset()
    metrics.add("num_passes", 50)  # more than before
    metrics.count_verification(16, 1, 1)
    assert metrics.since(before).counts["num_verifications"] == 1
    assert metrics.since(before).counts["num_passes"] == 50


def test_the_file_shows_another_process_counters(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    with pytest.raises(OSError, match="stats"):
        stats_file.look(path)
    metrics = TreeMetrics(stats_file.create(path))
    metrics.count_verification(16, 3, 1)
    seen = stats_file.look(path)
    metrics.count_verification(16, 3, 1)
    assert (seen.counts["num_verifications"], stats_file.look(path).counts["num_verifications"]) == (1, 2)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"."):
        stats_file.look(path)


def test_the_file_has_its_space_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting into a file that finds no space would end the engine with SIGBUS."""
    path = tmp_path / "stats"
    stats_file.create(path)
    assert path.stat().st_size == COUNTS.itemsize <= 512 * path.stat().st_blocks

    def no_space(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OSError, match="No space left"):
        stats_file.create(path)
    assert not path.exists()


def test_files_of_killed_engines_are_removed_and_others_kept(tmp_path: Path) -> None:
    names = {kind: tmp_path / f"vllm_eagle-{os.getuid()}-{kind}.stats" for kind in ("killed", "running", "young", "new")}
    stranger = tmp_path / "vllm_eagle-99999-other.stats"
    running = stats_file.create(names["running"])
    code = (
        f"import os, pathlib; from vllm_eagle.metrics import stats_file as s; x = s.create(pathlib.Path({str(names['killed'])!r}))"
    )
    code += "; os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    names["young"].touch()
    stranger.touch()
    for path in (names["killed"], names["running"], stranger):
        os.utime(path, (1, 1))
    stats_file.create(names["new"])
    assert {path.name for path in tmp_path.iterdir()} == {names[kind].name for kind in ("running", "young", "new")} | {
        stranger.name
    }
    running["num_passes"] += 1  # still mapped
    assert stats_file.look(names["running"]).counts["num_passes"] == 1


@contextmanager
def stat_logger(engine: Engine) -> Iterator[EagleStatLogger]:
    stats = EagleStatLogger(engine.vllm_config, [0])
    yield stats
    unregister()
    stats_file.remove(engine.file)


def unregister() -> None:
    for collector in list(REGISTRY._collector_to_names):
        if isinstance(collector, TreeCollector):
            REGISTRY.unregister(collector)


def exposed() -> str:
    return "\n".join(line for line in generate_latest(REGISTRY).decode().split("\n") if line.startswith("vllm_eagle_"))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the logger of the module says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_eagle.serving.stat_logger")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_in_tree_mode_the_metrics_stand_beside_vllms(said: list[str]) -> None:
    engine = Engine()
    engine.create_file()
    with stat_logger(engine) as stats:
        # vLLM makes its own logger after ours, which removes metrics that are called `vllm:`.
        unregister_vllm_metrics()
        engine.metrics.count_verification(16, 3, 1)
        line = 'vllm_eagle_nodes_accepted_total{engine="0",model_name="shipped-pair"} 3.0'
        assert line in exposed()
        engine.metrics.count_verification(16, 3, 1)
        assert line.replace("3.0", "6.0") in exposed()  # made at each scrape
        stats.record(SchedulerStats(num_running_reqs=2, num_waiting_reqs=1, num_skipped_waiting_reqs=4, kv_cache_usage=0.5), None)
        assert stats.load == Load(running=2, waiting=5, kv_usage=0.5)
    assert said == []


def test_a_second_engine_in_the_process_takes_the_place_of_the_first() -> None:
    first, second = Engine(), Engine()
    for engine, accepted in ((first, 3), (second, 5)):
        engine.create_file()
        engine.metrics.count_verification(16, accepted, 1)
    with stat_logger(first), stat_logger(second):
        assert re.findall(r"nodes_accepted_total{.*} (.*)", exposed()) == ["5.0"]


def test_without_trees_nothing_is_registered_or_said(said: list[str]) -> None:
    before = set(REGISTRY._collector_to_names)
    with stat_logger(Engine(tree_mode=False)) as stats:
        assert set(REGISTRY._collector_to_names) == before
        stats.log()
        assert exposed() == ""
    assert said == []


def test_a_missing_file_is_said_once_and_leaves_metrics_alone(said: list[str]) -> None:
    with stat_logger(Engine()) as stats:
        for _ in range(3):
            assert exposed() == ""
            stats.log()
        assert b"python_info" in generate_latest(REGISTRY)
    assert len(said) == 1
    assert "must run on this machine" in said[0]


def test_the_end_of_a_worker_is_no_news(said: list[str]) -> None:
    """Its file goes with it, while threads of the front ends still look."""
    engine = Engine()
    engine.create_file()
    with stat_logger(engine):
        assert exposed() != ""
        stats_file.remove(engine.file)
        assert exposed() == ""
    assert said == []


def comes_true(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happens()


def test_files_of_shared_metrics_hold_the_same_samples(tmp_path: Path) -> None:
    metrics = counted()
    files = multiprocess.Files(tmp_path)
    for _ in range(3):
        files.write(TreeCollector(lambda: metrics, TreeConfig(16), LABELS).collect())
        assert shared(tmp_path) == samples(metrics)
        metrics.count_verification(16, 2, 1)
        metrics.counts["speculation_off"] = 1 - metrics.counts["speculation_off"]


def test_where_processes_share_metrics_ours_are_among_them(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(multiprocess, "EVERY_S", 0.01)
    engine = Engine()
    engine.create_file()
    with stat_logger(engine):
        for accepted in (3, 0, 8):
            engine.metrics.count_verification(16, accepted, 1)
            assert comes_true(lambda: shared(tmp_path) == samples(engine.metrics))
        engine.metrics.counts["speculation_off"] = 1
        assert comes_true(lambda: shared(tmp_path)["vllm_eagle_speculation_off"] == 1)
        assert exposed() == ""
    assert said == []


def test_the_first_of_several_api_servers_speaks_for_all(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a configuration of its own; the engine has that of the process which started them."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("EAGLE_TREES_INSTANCE", "another server's")
    starting, first, second = Engine(), Engine(), Engine()
    for rank, engine in enumerate((starting, first, second), start=-1):
        engine.vllm_config.parallel_config = SimpleNamespace(_api_process_count=2, _api_process_rank=rank)
        instances.remember(engine.vllm_config)
    starting.create_file()
    starting.metrics.count_verification(16, 3, 1)
    with stat_logger(first) as stats, stat_logger(second) as other:
        assert comes_true(lambda: shared(tmp_path).get("vllm_eagle_nodes_accepted_total") == 3)
        starting.metrics.add("num_passes", 5)
        stats.log()
        other.log()
    stats_file.remove(starting.file)
    assert len(said) == 1
    assert said[0].startswith("Draft trees: tau 4.00 over 1 trees in 5 target passes")


def test_one_api_server_has_the_name_of_its_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLE_TREES_INSTANCE", "another server's")
    config = Engine().vllm_config
    instances.remember(config)
    assert instances.instance_id(config) == config.instance_id


def test_a_missing_folder_of_shared_metrics_is_said(said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "missing"))
    engine = Engine()
    engine.create_file()
    with stat_logger(engine):
        assert len(said) == 1
    assert f"PROMETHEUS_MULTIPROC_DIR={tmp_path}/missing cannot be written" in said[0]


def test_the_front_end_removes_the_file_of_a_worker_that_was_killed() -> None:
    engine = Engine()
    engine.create_file()
    stats = EagleStatLogger(engine.vllm_config, [0])
    assert engine.file.exists()
    del stats
    gc.collect()
    unregister()
    assert not engine.file.exists()


def test_the_log_has_one_line_per_interval_and_none_when_idle(said: list[str]) -> None:
    engine = Engine()
    engine.create_file()
    with stat_logger(engine) as stats:
        stats.log()
        assert said == []
        engine.metrics.counts[...] = counted().counts
        stats._last_s = time.monotonic() - 10
        stats.log()
        stats.log()
        engine.metrics.add("num_passes", 5)
        engine.metrics.count_decision("switched_off", 5)
        stats.log()
    assert said == [
        "Draft trees: tau 3.57 over 7 trees in 9 target passes, 14.3 nodes per tree, acceptance by depth "
        "0.71 0.80 1.00 0.25 1.00 1.00 1.00 1.00, draft 15 % verify 25 % accept 2 % compact 1 % of the time",
        "Draft trees: none in 5 target passes (switched_off 5)",
    ]


def test_the_log_says_when_speculation_is_off() -> None:
    metrics = TreeMetrics()
    metrics.add("num_passes")
    metrics.counts["speculation_off"] = 1
    assert log_line(metrics, 10) == "Draft trees: none in 1 target passes (speculation is off after an error in drafting)"


def test_vllm_finds_the_plugins_under_one_name() -> None:
    for group, kind in (("vllm.stat_logger_plugins", "EagleStatLogger"), ("vllm.endpoint_plugins", "EaglePage")):
        (found,) = [entry for entry in entry_points(group=group) if entry.name == "eagle_trees"]
        assert found.load().__name__ == kind
    assert EagleStatLogger in loggers.load_stat_logger_plugin_factories()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    names = set(re.findall(r"vllm[_:][a-z_]+", " ".join(asked)))
    ours = {sample.name for family in families(TreeMetrics(), TreeConfig(16), LABELS) for sample in family.samples}
    vllms = Path(loggers.__file__).read_text() + Path(spec_decode.__file__).read_text()
    assert len(names & ours) >= 15
    for name in names - ours:
        assert f'"{name.removesuffix("_total")}"' in vllms, name
    assert any(name.startswith("vllm:spec_decode") for name in names)
    stages = {stage for expr in asked for stage in re.findall(r'stage="(\w+)"', expr)}
    assert stages <= set(STAGES)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_cells_are_aligned_so_that_no_number_is_seen_half_written() -> None:
    assert all(offset % 8 == 0 for _, offset, *_ in (COUNTS.fields or {}).values())
    assert all(np.dtype(dtype).base.itemsize == 8 for dtype, *_ in (COUNTS.fields or {}).values())
