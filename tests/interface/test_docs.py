"""What the documentation shows runs, and says what the code does."""

import doctest
import importlib
import pkgutil
import re
from functools import partial

import numpy as np
import pytest
from c_interface import FUNCTIONS
from support import CHECKOUT

import fastopt

ROOT = CHECKOUT
NEED_A_FRAMEWORK = (
    "fastopt._pytorch",
    "fastopt.bench.peers.",
    "fastopt.keras",
    "fastopt.mpi",
    "fastopt.torch",
)


def modules_below(paths, name):
    """Yield the names of a package's modules, and import none that needs a framework."""
    for module in pkgutil.iter_modules(paths, f"{name}."):
        if not module.name.startswith(NEED_A_FRAMEWORK):
            yield module.name
            if module.ispkg:
                yield from modules_below(importlib.import_module(module.name).__path__, module.name)


MODULES = ["fastopt"] + [
    name
    for name in modules_below(fastopt.__path__, "fastopt")
    if name not in ("fastopt.__main__", "fastopt._core")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", fastopt.__all__)
def test_every_public_name_has_an_example(name):
    if name != "__version__":
        assert ">>> " in getattr(fastopt, name).__doc__


def test_the_examples_of_embedding_run():
    text = (ROOT / "docs" / "embedding.md").read_text()
    namespace, ran = {}, 0
    for code in re.findall(r"```python\n(.*?)```", text.partition("## Dialects")[0], re.DOTALL):
        exec(code, namespace)
        ran += 1
    assert ran == 4
    assert (namespace["new"][0] == 1 - 0.1 / (1 + 1e-8)).all()
    assert namespace["P"].round(6)[:, 0].tolist() == [0.5, 1, 1, 0.5, 1]


def test_the_examples_of_rows_run_and_exact_is_the_dense_run():
    text = (ROOT / "docs" / "rows.md").read_text()
    lazy, exact, rowwise = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = []
    for change in (("", ""), ('rows="exact"', 'rows="lazy"'), ("fastopt.Rows(", "dense(")):
        names = {}
        exec(lazy, names)
        names["dense"] = partial(dense_of, names["table"])
        exec(exact.replace(*change), names)
        found.append(names["table"])
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])
    exec(rowwise, names)
    assert np.flatnonzero(names["sums"]).tolist() == np.unique(names["words"]).tolist()


def dense_of(table, rows, values):
    grad = np.zeros_like(table)
    np.add.at(grad, rows, values)
    return grad


def test_readme_example():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace = {}
    exec(code, namespace)
    X, y, w, b = (namespace[name] for name in "Xywb")
    best = np.linalg.lstsq(np.c_[X, np.ones(len(X))], y, rcond=None)[0]
    assert np.abs(np.append(w, b) - best).max() < 1e-2


def test_every_way_to_fail_has_a_row_and_every_test_named_there_exists():
    text = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\|$", text, re.MULTILINE)
    assert len(rows) >= 36
    assert rows == [str(number) for number in range(1, len(rows) + 1)]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len({*named}) > 40
    for file, test in named:
        code = (ROOT / "tests" / file).read_text()
        assert f"\ndef {test}(" in code, (file, test)


def test_every_function_of_the_c_interface_is_in_its_page():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "c-api.md").read_text(), re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == [name for name, *_ in FUNCTIONS]
