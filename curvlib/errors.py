"""Every error curvlib raises: each is a `CurvlibError` and the built-in exception that fits.

Messages name the parameter or block and say what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CurvlibError(Exception):
    """Base class of all errors raised by curvlib.

    Example:
        >>> import curvlib as cv
        >>> issubclass(cv.errors.DampingError, (cv.errors.CurvlibError, ValueError))
        True
    """


class PytreeError(CurvlibError, ValueError):
    """A pytree does not have the structure that was expected."""


class ShapeError(CurvlibError, ValueError):
    """A tensor does not have the shape that was expected."""


class DtypeError(CurvlibError, TypeError):
    """A tensor has a dtype that curvature is not defined for, or dtypes are mixed."""


class DeviceError(CurvlibError, ValueError):
    """Tensors that must meet live on different devices."""


class NonFiniteError(CurvlibError, ValueError):
    """A factor or an eigenvalue is infinite or not a number."""


class EmptyBatchError(CurvlibError, ValueError):
    """A batch, a loader or a set of targets holds no example."""


class TargetError(CurvlibError, ValueError):
    """Targets do not fit the loss or the model's outputs."""


class DampingError(CurvlibError, ValueError):
    """A damping is negative, or does not apply to the operator."""


class SingularError(CurvlibError, ValueError):
    """The operation needs positive eigenvalues and the operator has others."""


class NotKroneckerError(CurvlibError, TypeError):
    """The operation needs one factor a side, and the operator has none."""


class CaptureError(CurvlibError, ValueError):
    """A parameter is used in a way that capture cannot account for."""


class UnusedParameterError(CaptureError):
    """The model never used a parameter of its domain."""


class BatchAxisError(CaptureError):
    """The first axis of a model's outputs does not count the examples of its inputs."""


class ArgumentError(CurvlibError, ValueError):
    """An argument has a value that is not one of the documented ones."""


class BlockNameError(CurvlibError, KeyError):
    """An operator has no block of this name."""

    __str__ = Exception.__str__  # a KeyError would quote its message


class FormatError(CurvlibError, ValueError):
    """A file does not hold a curvature object that can be read, or an object cannot be stored in one."""


class EigendecompositionError(CurvlibError, RuntimeError):
    """A symmetric eigendecomposition failed in working and in double precision."""


class ConvergenceError(CurvlibError, RuntimeError):
    """An iterative solver did not reach its tolerance."""


@contextmanager
def naming(block: str) -> Iterator[None]:
    """Prefixes the message of any `CurvlibError` raised inside with the block's name."""
    try:
        yield
    except CurvlibError as error:
        inner = getattr(error, "unnamed", None)  # the outermost name is the one the caller knows
        message = str(error) if inner is None else inner
        named = type(error)(f"block {block!r}: {message}")
        named.unnamed = message  # type: ignore[attr-defined]
        raise named from error
