"""A step of every rule on every workload, beside its peers and the limit: ``pytest benchmarks``.

By itself this runs a selection, in about a minute; ``--full`` runs everything, and ``-k`` a part of
it, as in ``pytest benchmarks --full -k 'gpt2 and adam-float32'``. A case first holds each candidate
to the reference. ``--benchmark-json`` keeps it all: ``extra_info`` has the elements and bytes of a
step, and of each candidate its threads, microseconds, GB/s, and the ratios to limit and fastopt.
"""

import pytest

from fastopt.bench.workloads import DTYPES, RULES, WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # when skipped

STEPS = [name for name, rule in RULES.items() if rule.clip_norm is None]
TAILS = ("mlp", "many", "gpt2")


def cases():
    return [
        (rule, dtype, workload, threads)
        for rule in RULES
        for dtype in DTYPES
        for workload in (WORKLOADS if rule in STEPS else TAILS)
        for threads in ("one", "all")
    ]


def selected(rule, dtype, workload, threads):
    """Whether a case runs without ``--full``."""
    if rule == "adam" and dtype == "float32":
        return workload in ("1e3", "1e5", "mlp", "many")
    if rule == "clip-adam":
        return workload == "mlp" and dtype == "float32"
    return workload == "1e5" and threads == "all" and (rule == "adam" or dtype == "float32")


def pytest_generate_tests(metafunc):
    full = metafunc.config.option.full
    chosen = [case for case in cases() if full or selected(*case)]
    names = ("rule", "dtype", "workload", "threads")
    metafunc.parametrize(names, chosen, ids=["-".join(case) for case in chosen])


def test_step(time_case, rule, dtype, workload, threads):
    time_case(workload, rule, dtype, threads)
