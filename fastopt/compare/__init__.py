"""The ``fastopt compare`` command: which optimizer serves one's data best.

``data`` reads the handwritten digits or a CSV file, ``model`` is the network in plain NumPy (and
the example of how to embed fastopt), ``algorithms`` says what is compared, ``run`` chooses the
learning rates and trains, ``progress`` shows it, ``summary`` makes the rows of the table,
``figure`` and ``report`` draw and write what remains.

Needs the ``compare`` extra (scikit-learn, threadpoolctl, rich, matplotlib), so nothing here is
imported by ``import fastopt``.
"""
