"""The deployment files: valid by their schemas, and with the flags that the backend itself sets."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("docker", reason="the extra 'docker' is not installed")

from rlm_sandbox import Limits
from rlm_sandbox.backends.docker.container import container_settings
from rlm_sandbox.backends.docker.profile import seccomp_profile
from rlm_sandbox.options import DockerOptions

DEPLOY = Path(__file__).parents[2] / "images" / "deploy"


@pytest.fixture(scope="module")
def service() -> Any:
    yaml = importlib.import_module("yaml")
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["session"]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    yaml = importlib.import_module("yaml")
    return {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_compose_file_is_valid_by_its_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_has_the_flags_of_a_session(service: dict[str, Any]) -> None:
    wanted = container_settings(DockerOptions(runtime=None), Limits(), recovery=True)
    assert service["network_mode"] == wanted["network_mode"]
    assert service["read_only"] is wanted["read_only"] is True
    assert service["cap_drop"] == wanted["cap_drop"]
    assert service["security_opt"][0] == wanted["security_opt"][0]
    assert service["security_opt"][1].startswith("seccomp=")
    assert set(service["tmpfs"][0].removeprefix("/tmp:").split(",")) == set(wanted["tmpfs"]["/tmp"].split(","))
    assert service["ulimits"] == {item["Name"]: item["Hard"] for item in wanted["ulimits"]}
    assert service["ipc"] == wanted["ipc_mode"]
    assert service["mem_limit"] == service["memswap_limit"] == wanted["mem_limit"] == wanted["memswap_limit"]
    assert service["pids_limit"] == wanted["pids_limit"]
    assert int(service["cpus"] * 1e9) == wanted["nano_cpus"]
    assert service["logging"]["driver"] == wanted["log_config"]["Type"]
    assert service["image"].endswith(f"{DockerOptions().image}}}")
    # With gVisor, as the comment says.
    gvisor = container_settings(DockerOptions(runtime="runsc"), Limits(), recovery=True)
    text = (DEPLOY / "compose.yaml").read_text()
    assert f"pids_limit to {gvisor['pids_limit']} and mem_limit to {gvisor['mem_limit']}" in text


def test_the_kubernetes_objects_are_valid_by_their_schemas(objects: dict[str, Any]) -> None:
    assert set(objects) == {"Namespace", "RuntimeClass", "NetworkPolicy", "Pod"}
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    for item in objects.values():
        kubernetes_validate.validate(item, desired_version="1.33", strict=True)


def test_the_pod_has_the_flags_of_a_session(objects: dict[str, Any]) -> None:
    pod, policy = objects["Pod"]["spec"], objects["NetworkPolicy"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == DockerOptions().image
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 65534
    assert pod["securityContext"]["seccompProfile"]["type"] == "Localhost"
    assert container["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["stdin"] is container["stdinOnce"] is True
    assert pod["runtimeClassName"] == objects["RuntimeClass"]["metadata"]["name"]
    assert objects["RuntimeClass"]["handler"] == "runsc"
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}  # no rule: nothing in, nothing out
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    wanted = container_settings(DockerOptions(runtime="runsc"), Limits(), recovery=True)
    assert container["resources"]["limits"]["memory"].removesuffix("Mi") == wanted["mem_limit"].removesuffix("m")
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/ctx"}


def test_the_seccomp_profile_can_be_written() -> None:
    command = [sys.executable, "-m", "rlm_sandbox.backends.docker.profile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == json.loads(seccomp_profile())
