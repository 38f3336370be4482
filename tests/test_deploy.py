"""The Kubernetes manifest fits KubeRay's own schema and this project's pins and recipes."""

from __future__ import annotations

import gzip
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from posttrain.cluster import gpus_needed
from posttrain.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads(gzip.decompress((ROOT / "tests/schemas/ray.io_rayjobs.v1.json.gz").read_bytes()))


def closed(schema: Any) -> Any:
    """The schema without room for unknown fields, which Kubernetes would drop, or refuse."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and schema["properties"]:
        strict.setdefault("additionalProperties", False)
    return strict


def problems(manifest: dict[str, Any]) -> list[str]:
    found = Draft7Validator(closed(SCHEMA)).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]


@pytest.fixture
def manifest() -> dict[str, Any]:
    manifest = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    manifest["metadata"] = {}  # the schema of every Kubernetes object's metadata is not in the definition
    return manifest


def test_the_manifest_fits_kuberays_schema(manifest: dict[str, Any]) -> None:
    assert problems(manifest) == []


def test_a_field_that_kuberay_does_not_have_is_seen(manifest: dict[str, Any]) -> None:
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    manifest["spec"]["backoffLimit"] = "none"
    assert len(problems(manifest)) == 2


def test_the_manifest_has_the_pinned_ray(manifest: dict[str, Any]) -> None:
    pins = (ROOT / "requirements/cuda.txt").read_text().splitlines()
    assert f"ray=={manifest['spec']['rayClusterSpec']['rayVersion']}" in pins


def test_there_are_as_many_gpus_as_the_recipe_needs(manifest: dict[str, Any]) -> None:
    program, command, path, *options = shlex.split(manifest["spec"]["entrypoint"])
    assert (program, command) == ("posttrain", "run")
    overrides = [value for flag, value in itertools.pairwise(options) if flag == "--set"]
    group = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus_needed(load_recipe(ROOT / path, overrides)) == gpus * group["replicas"]
