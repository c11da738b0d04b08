"""What can be known of the deployment files without a cloud: they parse, name files and flags that exist, and the container's start finds its model."""

import configparser
import os
import pathlib
import re
import subprocess

import pytest
from absl import flags

from jaxlm.bin import serve

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "tools" / "deploy"


def started(tmp_path, *arguments, **environment):
    """What the container's start makes of an environment: the arguments of jaxlm, one a line."""
    fake = tmp_path / "bin" / "jaxlm"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(["sh", FOLDER / "entrypoint.sh", *arguments], capture_output=True, text=True,
                          env={"PATH": f"{fake.parent}:{os.environ['PATH']}", "JAXLM_ROOT": str(tmp_path), **environment})
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_the_container_finds_model_port_and_key(tmp_path):
    code, _, error = started(tmp_path)
    assert code == 2 and error.count("\n") == 1 and "mount a folder" in error
    (tmp_path / "opt" / "ml" / "model" / "checkpoints").mkdir(parents=True)
    code, found, _ = started(tmp_path, "serve", JAXLM_OPEN="1")  # SageMaker
    assert code == 0 and found == ["serve", f"--workdir={tmp_path}/opt/ml/model", "--host=0.0.0.0", "--port=8080", "--name=model", "--open"]
    (tmp_path / "azure" / "my run" / "checkpoints").mkdir(parents=True)
    found = started(tmp_path, "--rows=4", AZUREML_MODEL_DIR=str(tmp_path / "azure"))[1]
    assert f"--workdir={tmp_path}/azure/my run" in found and "--open" not in found and found[-1] == "--rows=4"
    assert "--port=7080" in started(tmp_path, AIP_HTTP_PORT="7080", PORT="5")[1] and "--port=5" in started(tmp_path, PORT="5")[1]


def test_flags_and_files_exist():
    known = flags.FlagValues()
    serve.define(known)
    texts = {path.name: path.read_text() for path in FOLDER.iterdir()} | {"docs": (ROOT / "docs" / "deploy.md").read_text()}
    for name in ("entrypoint.sh", "jaxlm.service", "kubernetes.yaml", "cloudrun.yaml", "tpu_vm.sh", "docs"):
        lines = re.findall(r"jaxlm serve.*|args:.*", texts[name])
        assert lines, name
        for flag in re.findall(r"--(\w+)", " ".join(lines)):
            assert flag in known, (name, flag)
    for line in re.findall(r"^COPY (?!--from)(.*)$", texts["Dockerfile"], re.MULTILINE):
        for file in line.split()[:-1]:
            assert (ROOT / file).exists(), file
    for file in re.findall(r"tools/deploy/[\w.]+", "\n".join(texts.values())):
        assert (ROOT / file).is_file(), file
    for path in FOLDER.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


def test_units_and_manifests_parse():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string((FOLDER / "jaxlm.service").read_text())
    drain = int(re.search(r"--drain=(\d+)", unit["Service"]["ExecStart"])[1])
    assert int(unit["Service"]["TimeoutStopSec"]) > drain
    yaml = pytest.importorskip("yaml")
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > 60 and container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["targetPort"]
    run = yaml.safe_load((FOLDER / "cloudrun.yaml").read_text())["spec"]["template"]["spec"]
    assert {m["name"] for m in run["containers"][0]["volumeMounts"]} == {v["name"] for v in run["volumes"]}
    routes = yaml.safe_load((FOLDER / "azureml.yml").read_text())["environment"]["inference_config"]
    assert [routes[f"{name}_route"]["path"] for name in ("liveness", "readiness", "scoring")] == ["/health", "/health", "/invocations"]
