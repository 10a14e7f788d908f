"""The scripts for Hugging Face Jobs: their help, and their local mode against the local Hub, as a user runs them."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from finished_run import settings, write
from hub_server.server import TOKEN


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "hub_scripts").glob("*.py"))
REPO = "tester/model"


def header(script: Path) -> dict:
    block = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.DOTALL | re.MULTILINE)[1]
    return tomllib.loads("".join(line.removeprefix("# ") for line in block.splitlines(keepends=True)))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Function that gives the interpreter of an environment made from a script's own header."""
    made = {}

    def make(script: Path) -> list[str]:
        dependencies = tuple(header(script)["dependencies"])
        if dependencies not in made:
            folder = tmp_path_factory.mktemp("environment")
            # This source instead of the published package of the same name.
            found = [name.replace("trl-interfere", str(ROOT), 1) for name in dependencies]
            made[dependencies] = str(folder / "bin" / "python")
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [made[dependencies], "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *found]
            subprocess.run(install, check=True)
        return made[dependencies]

    return make


def start(python: str, script: str, *arguments, hub=None, folder: Path | None = None):
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "PYTHONPATH": ""}
    if hub is not None:
        variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    command = [python, str(ROOT / "hub_scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_and_header(script):
    result = start(sys.executable, script.name, "--help")
    assert result.returncode == 0, result.stderr
    assert "hf jobs uv run --flavor" in result.stdout and "uv run hub_scripts/" + script.name in result.stdout
    assert f"/{script.name}" in re.search(r"https://\S+", result.stdout)[0]
    assert header(script)["requires-python"] == ">=3.11"
    assert header(script)["dependencies"][0].startswith("trl-interfere")


def check(result, *parts):
    assert result.returncode == 0, result.stdout + result.stderr
    for part in parts:
        assert part in result.stdout
    assert TOKEN not in result.stdout + result.stderr


@pytest.mark.slow  # installs torch and everything else into two new environments
def test_all_scripts_in_environments_of_their_own(hub, tmp_path, environment):
    """Train, heal, analyse, roll back, publish the metrics and an app."""

    def run(script, *arguments):
        return start(environment(ROOT / "hub_scripts" / script), script, *arguments, hub=hub, folder=folder)

    folder = tmp_path
    recipe = write(folder, settings(folder, learning_rate=2e-3, max_steps=4))
    arguments = ("--recipe", recipe, "--output-dir", folder / "out", "--repo", REPO)
    branches = ("stage-1-math", "stage-2-writing", "main")
    check(run("train_sequential.py", *arguments), *(f"verified: {REPO}@{branch}" for branch in branches))
    weights = hub.files(REPO, "stage-1-math")["model.safetensors"]
    assert weights == (folder / "out/stages/1-math/model.safetensors").read_bytes()

    arguments = ("--peak", f"math={REPO}@stage-1-math", "--final", f"{REPO}@stage-2-writing", "--later", "writing")
    arguments += ("--recipe", recipe, "--repo", "tester/report")
    check(run("analyze_checkpoints.py", *arguments), "verified: tester/report", "nats")
    content = json.loads(hub.files("tester/report")["interference/report.json"])
    assert (content["before"], content["after"]) == (f"{REPO}@stage-1-math", f"{REPO}@stage-2-writing")

    arguments = ("--report", "tester/report", "--repo", "tester/rollback", "--budget", 0.1)
    check(run("rollback_and_push.py", *arguments), "verified: tester/rollback")
    assert {"adapter_config.json", "adapter_model.safetensors", "repair.json"} <= hub.files("tester/rollback").keys()

    arguments = ("--folder", ROOT / "metrics", "--namespace", "tester")
    names = ("forgetting", "recovery", "route_overlap")
    check(run("publish_metrics.py", *arguments), *(f"verified: tester/{name}" for name in names))
    assert hub.repo("tester/forgetting", "space").sdk == "gradio"

    deploy_app(hub, folder, environment(ROOT / "hub_scripts" / "deploy_space.py"))


def deploy_app(hub, folder, python):
    app = folder / "space"
    (app / "assets").mkdir(parents=True)
    (app / "README.md").write_text("---\ntitle: App\nsdk: gradio\napp_file: app.py\n---\n")
    (app / "app.py").write_text("print('app')\n")
    (app / "assets" / "a.png").write_bytes(b"\0\1")
    (app / ".env").write_text("HF_TOKEN=hf_secret")
    arguments = ("--folder", app, "--repo", "tester/app", "--collection", "A study")
    check(start(python, "deploy_space.py", *arguments, hub=hub, folder=folder), "verified: 3 files of tester/app")
    assert set(hub.files("tester/app", kind="space")) == {".gitattributes", "README.md", "app.py", "assets/a.png"}
    (app / "app.py").unlink()
    result = start(python, "deploy_space.py", *arguments, hub=hub, folder=folder)
    assert result.returncode == 1 and "Error: " in result.stderr and "expected app.py" in result.stderr


def test_an_app(hub, tmp_path):
    deploy_app(hub, tmp_path, sys.executable)
