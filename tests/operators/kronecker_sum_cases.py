"""Sums of Kronecker products for the tests."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from curvlib.operators import Dense, Kronecker, Sum
from curvlib.operators import sums as sums_module
from tests.operators.operator_cases import FACTORS, Random, generator, kronecker_block

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.tuples(*(st.integers(1, 3),) * 3)
thoroughly = settings(deadline=None, max_examples=20)
briefly = settings(deadline=None, max_examples=8)


def products(data: st.DataObject, count: int) -> tuple[Sum, Tensor]:
    """A sum of Kronecker products with sides of all kinds, and its dense twin."""
    shape, random = data.draw(shapes), Random(generator(data.draw(seeds)))
    terms = [kronecker_block(data.draw, shape, random, FACTORS) for _ in range(count)]
    return Sum(tuple(term for term, _, _ in terms)), torch.stack([dense for _, dense, _ in terms]).sum(0)


def dense_sum(*widths: int, count: int = 2, seed: int = 0) -> Sum:
    """Products of dense sides."""
    random = Random(generator(seed))
    return Sum(tuple(Kronecker(*(Dense(random.definite(width)) for width in widths)) for _ in range(count)))


def big() -> Any:
    """Every sum counts as too big for its dense matrix."""
    return mock.patch.object(sums_module, "MAX_DENSE", 0)


def eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype)
