"""The ``fastopt bench`` command: fastopt beside other optimizers and beside the limit of memory.

``workloads`` says what is updated and by which rule; ``peers`` has a file for each candidate;
``check`` holds each to ``fastopt.reference`` before it is timed; ``measure`` lets candidates take
turns; ``run`` puts these together for one case; ``report`` makes the table and files. ``storage``
and ``storage_report`` are the same for ``--storage``.

The suite in ``benchmarks/`` and the command both stand on this. Needs the ``bench`` extra, so
nothing here is imported by ``import fastopt``.
"""
