"""Spectra of operators that are too large to decompose: densities, leading eigenpairs, traces and plots of them."""

from curvlib.spectrum.density import Density, density
from curvlib.spectrum.eigenpairs import Eigenpairs, low_rank, top_eigenvalues
from curvlib.spectrum.estimates import Estimate, diagonal, trace
from curvlib.spectrum.plots import plot_comparison, plot_density, plot_top_eigenvalues

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "density",
    "diagonal",
    "low_rank",
    "plot_comparison",
    "plot_density",
    "plot_top_eigenvalues",
    "top_eigenvalues",
    "trace",
]
