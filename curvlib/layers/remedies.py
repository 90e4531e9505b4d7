"""What to write in place of a call that is not understood, by the call."""

from __future__ import annotations

RECURRENCE = "write the recurrence as a loop over linear calls"
OUTSIDE = "make the result itself the parameter: compute it outside of model_fn"
NORM_OF_WEIGHT = "fold the parametrization into the weight first (torch.nn.utils.parametrize.remove_parametrizations)"

REMEDIES: dict[str, str] = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"), RECURRENCE),
    **dict.fromkeys(("embedding_bag",), "use embedding, and sum or average its output"),
    **dict.fromkeys(("bilinear",), "use einsum with one parameter and the product of both inputs"),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide"), "multiply by a parameter that is the reciprocal"),
    **dict.fromkeys(("prelu",), "enter it into the layer table (the example in curvlib.layers.table)"),
    **dict.fromkeys(("cat", "stack", "concatenate", "hstack", "vstack"), "make the joined tensor the parameter"),
    **dict.fromkeys(("_weight_norm", "norm_except_dim", "norm", "linalg_norm", "vector_norm"), NORM_OF_WEIGHT),
    **dict.fromkeys(("exp", "__pow__", "pow", "softplus", "softmax", "sigmoid", "tanh", "relu", "abs"), OUTSIDE),
    **dict.fromkeys(("masked_fill", "where"), f"{OUTSIDE} (a pruned module: torch.nn.utils.prune.remove)"),
    "register_hook": "change gradients outside of model_fn",
}
REWRITE = "rewrite it with linear, matmul, einsum, addmm, convolution, embedding, a norm, add, sub or mul"
EXACT = "cv.ggn, cv.fisher, cv.hessian and cv.jacobian need no layers: they take what autograd differentiates twice"


def remedy(call: str) -> str:
    """What to do about a use of a parameter by a call that is not understood."""
    return (
        f"{REMEDIES.get(call, REWRITE)}; or add an entry to the layer table (curvlib.layers), leave the parameter out "
        "of params by closing over it in model_fn, or detach it if this use is to carry no gradient"
    )
