"""Property-based tests for curvature of your own: strategies for hypothesis, and checks of the algebra's identities.

`check_operator` asks an operator for every identity of the algebra, `check_curvature` compares an estimator with brute
force, `check_transformation` says whether an optimizer is pure and does what optimizers do. They raise an
`AssertionError` that names the identity and shows the smallest example that is found. The strategies draw what
they can be called with: `trees` of parameters, `operators` of every kind with their dense twins, small `problems`.

Needs the extra ``curvlib[testing]``.
"""

from curvlib.testing.curvature import check_curvature
from curvlib.testing.operators import check_operator
from curvlib.testing.problems import Problem, problems
from curvlib.testing.report import Report
from curvlib.testing.transformations import check_transformation
from curvlib.testing.trees import trees, vectors
from curvlib.testing.twins import Twin, operators

__all__ = [
    "Problem",
    "Report",
    "Twin",
    "check_curvature",
    "check_operator",
    "check_transformation",
    "operators",
    "problems",
    "trees",
    "vectors",
]
