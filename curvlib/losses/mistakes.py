"""What is to be written in place of something that is no loss of curvlib's."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

from curvlib.errors import ArgumentError
from curvlib.losses.base import REDUCTIONS, Loss

OWN = "cv.CustomLoss(fn), with fn(outputs, targets) -> one value an example, [N]"
ANY = f"cv.CrossEntropy(), cv.MSE(), cv.BernoulliLogits(), cv.Identity() or {OWN}"

COUNTERPARTS: dict[Any, str] = {
    nn.CrossEntropyLoss: "CrossEntropy",
    nn.MSELoss: "MSE",
    nn.BCEWithLogitsLoss: "BernoulliLogits",
    functional.cross_entropy: "CrossEntropy",
    functional.mse_loss: "MSE",
    functional.binary_cross_entropy_with_logits: "BernoulliLogits",
}
WITHOUT: dict[Any, str] = {
    nn.NLLLoss: "cv.CrossEntropy(), and leave log_softmax out of the model",
    nn.BCELoss: "cv.BernoulliLogits(), and leave the sigmoid out of the model",
    functional.nll_loss: "cv.CrossEntropy(), and leave log_softmax out of the model",
    functional.binary_cross_entropy: "cv.BernoulliLogits(), and leave the sigmoid out of the model",
}
WORDS = {
    "CrossEntropy": ("crossentropy", "ce", "xent", "classification", "categoricalcrossentropy", "softmax"),
    "MSE": ("mse", "meansquarederror", "squarederror", "l2", "regression", "gaussian"),
    "BernoulliLogits": ("bce", "bcewithlogits", "binarycrossentropy", "bernoulli", "binary", "logistic"),
    "Identity": ("identity", "none"),
}


def check_loss(loss: Any, name: str = "loss") -> None:
    """Refuses what is no loss.

    Raises:
        ArgumentError: says what to write in its place.
    """
    if not isinstance(loss, Loss):
        raise ArgumentError(f"{name} must be one of curvlib's losses, got {described(loss)}: write {instead(loss)}")


def described(loss: Any) -> str:
    """What was given."""
    if isinstance(loss, nn.Module):
        return f"a module of torch's, {loss}" if type(loss).__module__.startswith("torch.") else f"a module, {loss}"
    if isinstance(loss, (type(None), str)):
        return repr(loss)
    name = getattr(loss, "__name__", None)
    if isinstance(loss, type):
        return f"the class {name}"
    return f"the function {name}" if name else f"a {type(loss).__name__}"


def instead(loss: Any) -> str:
    """What to write, as code."""
    if isinstance(loss, type) and issubclass(loss, Loss):
        return f"an instance, {OWN if loss.__name__ == 'CustomLoss' else f'cv.{loss.__name__}()'}"
    if isinstance(loss, str):
        word = loss.lower().removesuffix("loss").translate(dict.fromkeys(map(ord, "_- ")))
        return next((f"cv.{name}()" for name, words in WORDS.items() if word in words), ANY)
    kind = type(loss) if isinstance(loss, nn.Module) else loss
    if not callable(loss):
        return ANY
    if kind in WITHOUT:
        return WITHOUT[kind]
    if kind in COUNTERPARTS:
        return counterpart(loss, COUNTERPARTS[kind]) if isinstance(loss, nn.Module) else f"cv.{COUNTERPARTS[kind]}()"
    return OWN


def counterpart(loss: nn.Module, name: str) -> str:
    """The loss that equals a module of torch's, with its options; those that have no counterpart are named."""
    options = {
        "reduction": (loss.reduction, "mean"),
        "ignore_index": (getattr(loss, "ignore_index", -100), -100),
        "label_smoothing": (getattr(loss, "label_smoothing", 0.0), 0.0),
    }
    missing = [option for option in ("weight", "pos_weight") if getattr(loss, option, None) is not None]
    if missing:
        return f"{OWN}: {name} has no counterpart of {' and '.join(f'{option}=' for option in missing)}"
    if loss.reduction not in REDUCTIONS:
        del options["reduction"]
    text = ", ".join(f"{option}={value!r}" for option, (value, default) in options.items() if value != default)
    images = ", with class_dim=1 too for outputs [N, C, ...] of more axes" if name == "CrossEntropy" else ""
    reductions = "" if loss.reduction in REDUCTIONS else f", as reduction={loss.reduction!r} is no objective"
    return f"cv.{name}({text}){images}{reductions}"
