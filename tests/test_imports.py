"""Importing a module of the library is light, goes down only and changes nothing in the process.

Each import happens in a process of its own: in this one, other tests have imported everything.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "lib").rglob("*.py")
    if path.name != "__init__.py"
)
HEAVY = {"faiss", "keras", "matplotlib", "openvino", "seaborn", "sklearn", "tensorflow"}
# Batches are a keras.utils.PyDataset. Keras loads its backend, and the other two if installed.
NEEDED = {"lib.data.dataset": {"keras", "tensorflow", "matplotlib", "sklearn"}}

# What of a process an import may not change: each as a value that can be compared.
STATE = """
import decimal, faulthandler, locale, logging, os, signal, socket, sys, threading, warnings

def loggers():
    yield "root", logging.getLogger()
    yield from list(logging.Logger.manager.loggerDict.items())

def state():
    umask = os.umask(0o22)
    os.umask(umask)
    values = {
        "umask": umask,
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "sys.path": list(sys.path),
        "warnings' filters": [str(entry) for entry in warnings.filters],
        "excepthooks": [sys.excepthook, threading.excepthook, sys.unraisablehook],
        "signal handlers": [signal.getsignal(n) for n in signal.valid_signals()],
        "locale": locale.setlocale(locale.LC_ALL),
        "socket timeout": socket.getdefaulttimeout(),
        "loggers": {
            name: (logger.level, logger.propagate, list(logger.filters), list(logger.handlers))
            for name, logger in loggers()
            if isinstance(logger, logging.Logger)
        },
    }
    if "PIL.Image" in sys.modules:
        from PIL import Image, ImageFile
        values["Pillow"] = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(Image.ID))
    if "numpy" in sys.modules:
        import numpy
        values["NumPy's errors"] = numpy.geterr()
    if "matplotlib" in sys.modules:
        import matplotlib
        values["Matplotlib's settings"] = {k: str(v) for k, v in matplotlib.rcParams.items()}
    if "keras" in sys.modules:
        import keras
        values["Keras' types"] = (keras.config.floatx(), str(keras.config.dtype_policy()))
    return values
"""


def run(code: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def of_others(module: str) -> set[str]:
    """The modules of other packages that a module imports when it is imported itself."""
    path = ROOT / (module.replace(".", "/") + ".py")
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] not in ("lib", "__future__")}


def test_the_order_of_imports_is_kept():
    """The contracts stand in pyproject.toml."""
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [program, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("lib.data.")])
def test_data_loads_no_search_library_no_network_and_no_figures(module):
    """lib.data.sampling used to load Faiss, and the lists of labelled photos seaborn."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    loaded = set(run(code, module).split()) & HEAVY
    assert loaded - NEEDED.get(module, set()) == set()


@pytest.mark.long
def test_importing_the_library_changes_nothing_in_the_process():
    """Other packages come first, so that what they change themselves does not count."""
    others = sorted(set().union(*map(of_others, MODULES)))
    code = f"""{STATE}
import contextlib, importlib, json
for name in json.loads(sys.argv[1]):
    with contextlib.suppress(ModuleNotFoundError):  # a name in a module
        importlib.import_module(name)
before = state()
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
after = state()
def different(a, b):
    if isinstance(a, dict):  # loggers, settings and variables that are there by now
        return {{k: (a.get(k), b[k]) for k in b if k not in a or a[k] != b[k]}}
    if isinstance(a, list):
        return [item for item in b if item not in a] + [item for item in a if item not in b]
    return (a, b)
changed = {{k: different(before[k], after[k]) for k in before if before[k] != after[k]}}
changed["loggers"] = {{
    k: v for k, v in changed.get("loggers", {{}}).items() if v[0] or not k.startswith("lib")
}}
print({{k: v for k, v in changed.items() if v}})
"""
    changed = run(code, json.dumps(others), json.dumps(MODULES)).strip()
    assert changed == "{}", changed


@pytest.mark.long
def test_what_only_some_need_is_not_loaded_by_all():
    """Where PyTorch is installed, the writer of TensorBoard's files used to load it, in 1.6 s."""
    code = (
        "import importlib, sys; [*map(importlib.import_module, sys.argv[1:])]; print(*sys.modules)"
    )
    loaded = set(run(code, *MODULES).split())
    assert "keras" in loaded and not loaded & {"torch", "ray", "pymilvus", "keras_hub", "openvino"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_its_functions_are_short(module):
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node, clean=False) or "").splitlines()
            assert node.end_lineno - node.lineno + 1 - len(docstring) <= 60, node.name
