"""The ``fastopt compare`` command: five optimizers train the same network on the same data.

``data`` loads the handwritten digits, ``model`` is the network in plain NumPy (and the example of
how to embed fastopt), ``run`` trains it once per algorithm, ``report`` makes the table and files.

Needs the ``compare`` extra (scikit-learn, rich, matplotlib), so nothing here is imported by
``import fastopt``.
"""
