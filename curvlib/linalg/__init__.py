"""Pure tensor functions: Gram matrices, eigendecompositions, conjugate gradients."""
