"""The dashboard's queries parse, and ask for metrics that the code has."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.metrics import RouterMetrics
from sglang_stream.engine.metrics import EngineMetrics
from tests.docker.files import DOCKER, compose, read_yaml

GRAFANA = DOCKER / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "sglang-stream.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]

_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}


@cache
def own_series() -> frozenset[str]:
    """The names of all series of our own that a worker or a router can have."""
    registry = CollectorRegistry()
    EngineMetrics(registry=registry)
    pages = (generate_latest(registry), RouterMetrics().page())
    return frozenset(
        family.name.removesuffix("_total") + suffix
        for page in pages
        for family in text_string_to_metric_families(page.decode())
        for suffix in _SUFFIXES.get(family.type, [""])
    )


@cache
def sglang_source() -> str:
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    collector = Path(package.origin).parent / "srt" / "observability" / "metrics_collector.py"
    return collector.read_text()


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_series_that_exist(query: str) -> None:
    names: set[str] = set()

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(str(node.name))

    promql_parser.walk(promql_parser.parse(query.replace("$__rate_interval", "1m")), note)
    assert names
    for name in names:
        if name.startswith("sglang:"):
            assert f'name="{name.removesuffix("_bucket")}"' in sglang_source()
        else:
            assert name in own_series()


def test_panels_have_distinct_ids_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)


def test_it_is_provisioned_where_compose_mounts_it() -> None:
    grafana = compose()["services"]["grafana"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"] if mount[0] == ".")
    provisioning = GRAFANA / "provisioning"
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    [provider] = read_yaml(provisioning / "dashboards" / "sglang-stream.yml")["providers"]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/sglang-stream.json"

    [source] = read_yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    for panel in PANELS:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": source["uid"]}
