"""The layer table and its entries; importing this package fills the table."""

from curvlib.layers import attention, convolution, embedding, pointwise, products
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.table import REWRITES, TABLE, Inspection, Use, entry

__all__ = [
    "REWRITES",
    "TABLE",
    "Inspection",
    "KroneckerLayer",
    "Layer",
    "Use",
    "attention",
    "convolution",
    "embedding",
    "entry",
    "pointwise",
    "products",
]
