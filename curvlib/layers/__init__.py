"""The layer table and its entries; importing this package fills the table."""

from curvlib.layers import convolution, embedding, pointwise, products
from curvlib.layers.base import KroneckerLayer, Layer
from curvlib.layers.table import TABLE, Inspection, Use, entry

__all__ = [
    "TABLE",
    "Inspection",
    "KroneckerLayer",
    "Layer",
    "Use",
    "convolution",
    "embedding",
    "entry",
    "pointwise",
    "products",
]
