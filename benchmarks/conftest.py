"""Options of the suite, how a test times a case, and the tables at its end."""

import io

import pytest

import fastopt
from fastopt.bench import peers, report, run
from fastopt.bench.workloads import RULES, WORKLOADS

RESULTS = pytest.StashKey[list]()
SECONDS, FULL_SECONDS = 1.0, 6.0  # that the rounds of a case may take


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every case: hours")


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.option.benchmark_quiet = True  # its table has the times of rows of steps, ours of steps


@pytest.fixture
def time_case(benchmark, request):
    """Return a function that times fastopt with pytest-benchmark, in turns with its peers."""

    def time_case(workload, rule, dtype, threads):
        count = 1 if threads == "one" else fastopt.get_num_threads()
        case = run.Case(WORKLOADS[workload], RULES[rule], dtype, count)
        seconds = FULL_SECONDS if request.config.option.full else SECONDS
        taking_part, absent = run.entries(case, peers.NAMES[1:], [count])
        rows = []
        for batch in fitting(case, taking_part):
            interleaved, own = batch.interleaved, batch.fastopt

            def others(interleaved=interleaved, own=own):
                interleaved.round(without=[own])
                interleaved.ready(own)

            rounds = interleaved.rounds(seconds, *run.ROUNDS) if benchmark.enabled else 1
            if not rows:
                benchmark.pedantic(interleaved.row, args=(own,), setup=others, rounds=rounds)
            else:
                for _ in range(rounds):
                    interleaved.round()
            rows += batch.rows(with_own=not rows)
        result = run.Result(case, tuple(rows), tuple(absent))
        request.config.stash[RESULTS].append(result)
        benchmark.group = f"{workload}, {rule}, {dtype}, {threads}"
        benchmark.extra_info.update(result.as_dict())

    return time_case


def fitting(case, taking_part):
    """Yield the batches of a case, or skip it."""
    try:
        yield from run.batches(case, taking_part)
    except MemoryError as error:
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter, config):
    groups = {}
    for result in config.stash[RESULTS]:
        case = result.case
        groups.setdefault((case.rule.name, case.dtype, case.threads), []).append(result)
    for results in groups.values():
        text = io.StringIO()
        report.print_tables(results, file=text, width=120)
        terminalreporter.write(text.getvalue())
