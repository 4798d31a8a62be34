"""What fastopt warns of."""

__all__ = ["FallbackWarning"]


class FallbackWarning(UserWarning):
    """fastopt's kernels update less than half of a model: a slower update runs instead.

    The optimizers of ``fastopt.torch`` and ``fastopt.keras`` issue it once each, before the first
    such step writes anything. The text says why, and what makes the training fast again.

    Examples
    --------
    As an error, it stops such a training before it begins:

    >>> import warnings, fastopt
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", fastopt.FallbackWarning)
    ...     # train here
    """
