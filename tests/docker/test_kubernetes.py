"""The Kubernetes manifests: valid by the API's own schemas, and consistent with one another."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml

from router.server import DRAIN_S
from sglang_stream.cli.serve import WORKER_GRACE_S
from tests.docker.files import (
    DOCKER,
    assert_flags_exist,
    command_line,
    exposed,
    read_yaml,
    values,
)

K8S = DOCKER / "k8s"
KUSTOMIZATION = read_yaml(K8S / "kustomization.yaml")
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (found["kind"], found["metadata"]["name"]): found
    for name in KUSTOMIZATION["resources"]
    for found in yaml.safe_load_all((K8S / name).read_text())
}
SETS = {role: OBJECTS["StatefulSet", f"sglang-stream-{role}"] for role in ("prefill", "decode")}
ROUTER = OBJECTS["Deployment", "sglang-stream-router"]
PODS = {name: found["spec"]["template"] for name, found in {**SETS, "router": ROUTER}.items()}


def container(role: str) -> dict[str, Any]:
    [only] = PODS[role]["spec"]["containers"]
    return dict(only)


def command_of(role: str) -> list[str]:
    return command_line("router" if role == "router" else "worker", container(role)["args"])


def test_every_manifest_is_used_and_valid() -> None:
    assert {path.name for path in K8S.iterdir()} == {
        "kustomization.yaml",
        *KUSTOMIZATION["resources"],
    }
    for found in OBJECTS.values():
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_valid_manifests() -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(K8S)], capture_output=True, text=True, check=True
    )
    found = [each for each in yaml.safe_load_all(built.stdout) if each]
    assert len(found) == len(OBJECTS) + len(KUSTOMIZATION["configMapGenerator"])
    for each in found:
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
        assert each["kind"] == "Namespace" or each["metadata"]["namespace"] == "sglang-stream"


@pytest.mark.parametrize("role", PODS)
def test_commands_have_flags_that_exist(role: str) -> None:
    assert_flags_exist(command_of(role))


@pytest.mark.parametrize("role", PODS)
def test_ports_are_the_images(role: str) -> None:
    image = "router" if role == "router" else "worker"
    assert container(role)["image"] == f"sglang-stream-{image}"
    ports = {port["name"]: port["containerPort"] for port in container(role)["ports"]}
    assert set(ports.values()) <= exposed(image)
    annotations = PODS[role]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["http"])
    if role != "router":
        assert values(command_of(role), "--role") == [[role]]
        service = OBJECTS["Service", f"sglang-stream-{role}"]["spec"]
        assert {port["name"]: port["port"] for port in service["ports"]} == ports


def test_routers_name_every_worker() -> None:
    command = command_of("router")
    for role, workers in SETS.items():
        name, service = workers["metadata"]["name"], workers["spec"]["serviceName"]
        assert OBJECTS["Service", service]["spec"]["clusterIP"] == "None"
        named = values(command, f"--{role}")
        hosts = [f"{name}-{i}.{service}" for i in range(workers["spec"]["replicas"])]
        assert [urlsplit(words[0]).hostname for words in named] == hosts
        assert {urlsplit(words[0]).port for words in named} == {30001}
        bootstrap = values(command_of(role), "--disaggregation-bootstrap-port")
        assert all([words[1:]] == (bootstrap or [[]]) for words in named)


@pytest.mark.parametrize("role", PODS)
def test_probes_ask_pages_that_exist_and_wait_long_enough(role: str) -> None:
    pages = ("/health", "/readiness", "/health") if role == "router" else ("/health",) * 3
    for kind, page in zip(("startup", "readiness", "liveness"), pages, strict=True):
        probe = container(role)[f"{kind}Probe"]
        assert probe["httpGet"] == {"path": page, "port": "http"}
        if role != "router":
            assert probe["timeoutSeconds"] > 20, "SGLang's own limit of /health"


def test_nobody_is_killed_while_it_ends() -> None:
    waits_s = {"router": DRAIN_S + 5, "prefill": 2 * WORKER_GRACE_S, "decode": 2 * WORKER_GRACE_S}
    for role, needed_s in waits_s.items():
        assert PODS[role]["spec"]["terminationGracePeriodSeconds"] > needed_s


@pytest.mark.parametrize("role", PODS)
def test_pods_have_one_secret_one_model_and_few_rights(role: str) -> None:
    found = container(role)
    environment = {each["name"]: each for each in found["env"]}
    secret = environment["SGLANG_STREAM_SECRET"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": "sglang-stream", "key": "secret"}
    generated = {each["name"] for each in KUSTOMIZATION["configMapGenerator"]}
    assert {each["configMapRef"]["name"] for each in found["envFrom"]} <= generated
    assert PODS[role]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert found["securityContext"]["allowPrivilegeEscalation"] is False


def test_selectors_find_their_pods() -> None:
    for (kind, name), found in OBJECTS.items():
        if kind == "Namespace":
            continue
        selector = found["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        matching = [
            role
            for role, pod in PODS.items()
            if wanted.items() <= pod["metadata"]["labels"].items()
        ]
        assert len(matching) == 1, f"{kind} {name}"
