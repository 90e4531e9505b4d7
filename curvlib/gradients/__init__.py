"""The pass over data: batches, plans, and gradients of single examples."""
