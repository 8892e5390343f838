"""The compose file's parts fit together, and its commands are ones that there are."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import pytest

from router.server import DRAIN_S
from sglang_stream.cli.serve import WORKER_GRACE_S
from tests.docker.files import (
    DOCKER,
    DOCKERFILES,
    assert_flags_exist,
    command_line,
    compose,
    exposed,
    interpolated,
    read_yaml,
    values,
)
from tests.docker.nginx import SITE

SERVICES: dict[str, Any] = compose()["services"]
PREFILL, DECODE = ["prefill-1", "prefill-2"], ["decode-1", "decode-2"]
WORKERS, ROUTERS = [*PREFILL, *DECODE], ["router-1", "router-2"]


def command_of(service: str) -> list[str]:
    role = "router" if service in ROUTERS else "worker"
    return command_line(role, SERVICES[service]["command"])


def test_the_services_are_a_whole_deployment() -> None:
    others = {"model", "nginx", "prometheus", "grafana"}
    assert set(SERVICES) == {*WORKERS, *ROUTERS, *others}


@pytest.mark.parametrize("service", [*WORKERS, *ROUTERS])
def test_commands_have_flags_that_exist(service: str) -> None:
    assert_flags_exist(command_of(service))


@pytest.mark.parametrize("service", WORKERS)
def test_workers_listen_where_their_image_says(service: str) -> None:
    command = command_of(service)
    assert values(command, "--role") == [[service.partition("-")[0]]]
    flags = ["--port", "--stream-port"]
    if service in PREFILL:
        flags.append("--disaggregation-bootstrap-port")
    ports = {int(word) for flag in flags for [word] in values(command, flag)}
    assert ports <= exposed("worker")
    assert len(ports) == len(flags)
    assert "--enable-metrics" in command


@pytest.mark.parametrize("service", ROUTERS)
def test_routers_name_every_worker(service: str) -> None:
    command = command_of(service)
    prefill, decode = values(command, "--prefill"), values(command, "--decode")
    assert [urlsplit(words[0]).hostname for words in prefill] == PREFILL
    assert [urlsplit(words[0]).hostname for words in decode] == DECODE
    for words in [*prefill, *decode]:
        worker = command_of(str(urlsplit(words[0]).hostname))
        assert values(worker, "--port") == [[str(urlsplit(words[0]).port)]]
        assert values(worker, "--disaggregation-bootstrap-port") == [words[1:]][: len(words) - 1]


def test_workers_and_routers_share_secret_and_models() -> None:
    environments = [SERVICES[service]["environment"] for service in [*WORKERS, *ROUTERS]]
    assert len({environment["SGLANG_STREAM_SECRET"] for environment in environments}) == 1
    for service in [*WORKERS, *ROUTERS, "model"]:
        assert SERVICES[service]["volumes"] == ["models:/models"]


def test_nobody_is_killed_while_it_ends() -> None:
    for services, needed_s in ((WORKERS, 2 * WORKER_GRACE_S), (ROUTERS, DRAIN_S)):
        for service in services:
            assert float(SERVICES[service]["stop_grace_period"].removesuffix("s")) > needed_s


def test_nginx_and_prometheus_reach_what_there_is() -> None:
    routers = re.findall(r"^\s+server (router-\d):", SITE.read_text(), re.MULTILINE)
    assert routers == ROUTERS
    [port] = SERVICES["nginx"]["ports"]
    assert interpolated(port) == "30000:8080"
    assert "listen 8080;" in SITE.read_text()

    jobs = read_yaml(DOCKER / "prometheus" / "prometheus.yml")["scrape_configs"]
    scraped = [group for job in jobs for group in job["static_configs"]]
    targets = {target: group.get("labels") for group in scraped for target in group["targets"]}
    expected: dict[str, Any] = {f"{service}:30000": None for service in ROUTERS}
    for service in WORKERS:
        expected[f"{service}:30001"] = {"role": service.partition("-")[0]}
    assert targets == expected


def test_images_are_pinned_and_watched() -> None:
    for service, described in SERVICES.items():
        if "build" in described:
            dockerfile = DOCKER / described["build"]["context"] / described["build"]["dockerfile"]
            assert dockerfile.resolve() in DOCKERFILES.values()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+", described["image"]), service
            assert "healthcheck" in described, service


def test_mounted_files_and_named_volumes_exist() -> None:
    for service, described in SERVICES.items():
        for mount in described.get("volumes", []):
            source = mount.partition(":")[0]
            there = (
                (DOCKER / source).exists() if source[0] == "." else source in compose()["volumes"]
            )
            assert there, f"{service}: {mount}"


def test_the_gpu_variant_gives_each_worker_its_own() -> None:
    services = compose("compose.gpu.yaml")["services"]
    assert set(services) == {*WORKERS, "model"}
    devices = [
        device
        for worker in WORKERS
        for device in services[worker]["deploy"]["resources"]["reservations"]["devices"]
    ]
    assert all(device["capabilities"] == ["gpu"] for device in devices)
    assert sorted(id for device in devices for id in device["device_ids"]) == ["0", "1", "2", "3"]
