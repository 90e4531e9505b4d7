"""Gradient transformations: pairs of pure functions that turn gradients into updates, and chains of them.

The form is optax's. A transformation never changes what it is given; its state is a pytree that the caller holds. The
sign belongs to the chain: `scale_by_learning_rate` multiplies by -lr, so that updates are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from curvlib.errors import ArgumentError, PytreeError, ShapeError
from curvlib.linalg.eager import may_look_at
from curvlib.pytree import Domain, Tree, flatten, names, register, unflatten

State = Any
S = TypeVar("S")


class Init(Protocol):
    """Makes the state that belongs to parameters."""

    def __call__(self, params: Tree, /) -> State: ...


class Update(Protocol):
    """Turns gradients into updates, and a state into the next one."""

    def __call__(self, grads: Tree, state: State, params: Tree | None = None, **extra: Any) -> tuple[Tree, State]: ...


@dataclass(frozen=True)
class GradientTransformation:
    """A rule that turns gradients into updates.

    Args:
        init: params -> state.
        update: (grads, state, params=None, **extra) -> (updates, state). Gradients and updates are pytrees like params.
            Only some transformations need params; those that do say so when they miss them. ``extra`` is for those
            that know what it means (``value=``, the loss, say); all others take it and leave it alone.

            One is understood by every transformation that decides something by its number of steps: ``step=``, the
            number of this update, 1 first. Where the state's count can be read, it need not be given. Under a trace or
            a transform, where it cannot, it is what the host decides by: whether a refresh is due, say.

    Example:
        >>> from curvlib.pytree import scale
        >>> halve = GradientTransformation(
        ...     lambda params: Stateless(), lambda grads, state, params=None, **extra: (scale(0.5, grads), state)
        ... )
        >>> params = {"w": torch.ones(2)}
        >>> updates, state = halve.update({"w": torch.tensor([2.0, 4.0])}, halve.init(params), params)
        >>> updates
        {'w': tensor([1., 2.])}
    """

    init: Init
    update: Update


@register
class PerLeaf:
    """What a state knows of every leaf of params, one entry a leaf: the states of single leaves can be taken apart.

    Whatever of a state is not in a `PerLeaf`, such as the number of steps, is shared by all leaves.

    Args:
        entries: in the order of ``flatten(params)``: tensors, or registered dataclasses or tuples of tensors.

    Example:
        >>> moments = PerLeaf((torch.zeros(2), torch.zeros(3)))
        >>> [leaf.shape for leaf in flatten(moments)[0]]
        [torch.Size([2]), torch.Size([3])]
    """

    entries: tuple[Any, ...]


@register
class Stateless:
    """The state of a transformation that remembers nothing.

    Example:
        >>> flatten(Stateless())[0]
        []
    """


@register
class ChainState:
    """The states of the members of a `chain`, in order."""

    states: tuple[State, ...]


def stateless(name: str, update: Any) -> GradientTransformation:
    """The transformation of this name, without a state, that maps (grads, params) to updates.

    Example:
        >>> stateless("minus", lambda grads, params: -grads).update(torch.ones(2), Stateless())[0]
        tensor([-1., -1.])
    """

    def apply(grads: Tree, state: Stateless, params: Tree | None = None, **extra: Any) -> tuple[Tree, Stateless]:
        return update(grads, params), own_state(state, Stateless, name)

    return GradientTransformation(lambda params: Stateless(), apply)


def identity() -> GradientTransformation:
    """Updates are the gradients.

    Example:
        >>> identity().update(torch.ones(2), Stateless())[0]
        tensor([1., 1.])
    """
    return stateless("identity", lambda grads, params: grads)


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """One transformation after the other, each fed with the updates of the one before.

    Example:
        >>> import curvlib.optim as optim
        >>> sgd = chain(optim.heavy_ball(0.9), optim.scale_by_learning_rate(0.1))
        >>> params = torch.tensor([1.0])
        >>> updates, state = sgd.update(torch.tensor([2.0]), sgd.init(params))
        >>> apply_updates(params, updates)
        tensor([0.8000])
    """

    def init(params: Tree) -> ChainState:
        return ChainState(tuple(transformation.init(params) for transformation in transformations))

    def update(grads: Tree, state: ChainState, params: Tree | None = None, **extra: Any) -> tuple[Tree, ChainState]:
        if len(own_state(state, ChainState, "chain").states) != len(transformations):
            raise ArgumentError(
                f"state is of a chain of {len(state.states)} transformations and this one has {len(transformations)}; "
                "make it with this chain's init"
            )
        states = []
        for transformation, old in zip(transformations, state.states, strict=True):
            grads, new = transformation.update(grads, old, params, **extra)
            states.append(new)
        return grads, ChainState(tuple(states))

    return GradientTransformation(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Params + updates, in the dtypes of params; the sum itself is formed in the wider of the two dtypes.

    Raises:
        PytreeError, ShapeError: updates are not a pytree like params; the message names the leaf.

    Example:
        >>> apply_updates({"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.tensor([0.5, -1.0])})
        {'w': tensor([1.5000, 0.0000], dtype=torch.bfloat16)}
    """
    leaves, structure = flatten(params)
    steps = leaves_like(params, updates)
    return unflatten(structure, [(p + u).to(p.dtype) for p, u in zip(leaves, steps, strict=True)])


def leaves_like(params: Tree, tree: Tree) -> list[Any]:
    """The leaves of a tree that has the structure and shapes of params.

    Raises:
        PytreeError, ShapeError: it does not; the message names the leaf.
    """
    expected, structure = flatten(params)
    try:
        leaves: list[Any] = structure.flatten_up_to(tree)
    except (ValueError, TypeError):
        leaves = []
    if [getattr(leaf, "shape", None) for leaf in leaves] != [leaf.shape for leaf in expected]:
        return list(Domain.of(params).leaves(tree))  # words the error
    return leaves


def gradients_like(grads: Tree, known: PerLeaf, params: Tree | None) -> tuple[list[Tensor], Any]:
    """The leaves of the gradients, one for each entry of a state, and their structure.

    Raises:
        PytreeError, ShapeError: they are not like params, if those are given, or not as many as the entries, or an
            entry that is a tensor has another shape; the message names the leaf.
    """
    leaves, structure = flatten(grads)
    if params is not None:
        leaves = leaves_like(params, grads)
    if len(leaves) != len(known.entries):
        raise PytreeError(
            f"the gradients have {len(leaves)} leaves, and the state is one of {len(known.entries)}; make it with init "
            "of these parameters"
        )
    for i, (leaf, entry) in enumerate(zip(leaves, known.entries, strict=True)):
        if isinstance(entry, Tensor) and leaf.numel() != entry.numel():
            raise ShapeError(
                f"the gradient {names(grads)[i]!r} has shape {tuple(leaf.shape)}, and the state is one of "
                f"{entry.numel()} elements; make it with init of these parameters"
            )
    return leaves, structure


def own_state(state: State, kind: type[S], name: str) -> S:
    """The state, if it is of the kind that the transformation ``name`` makes.

    Raises:
        ArgumentError: it is of another transformation.

    Example:
        >>> own_state(Stateless(), Stateless, "identity")
        Stateless()
    """
    if not isinstance(state, kind):
        raise ArgumentError(
            f"{name} needs the {kind.__name__} that its init makes, and was given a {type(state).__name__}, which "
            "another transformation makes"
        )
    return state


def number_of(count: Tensor, step: int | None) -> int:
    """The number of this update, 1 first, for the host: one more than the count of updates so far.

    Args:
        count: of the state.
        step: what the caller says it is; None: the count is read.

    Raises:
        ArgumentError: the count cannot be read, or is another.

    Example:
        >>> number_of(torch.tensor(2), None)
        3
    """
    if step is None:
        try:
            return int(count) + 1
        except RuntimeError:
            raise ArgumentError(
                "the state's number of steps cannot be read under a transform or a trace: give the number of this "
                "update, update(grads, state, params, step=...), which is 1 for the first"
            ) from None
    if may_look_at(count) and int(count) + 1 != step:
        raise ArgumentError(f"the state has seen {int(count)} updates, and this one is said to be number {step}")
    return step


def first_step() -> Tensor:
    """The count of a fresh state: a 0-d int64 tensor on the CPU, where reading it waits for no device.

    Example:
        >>> first_step()
        tensor(0)
    """
    return torch.zeros((), dtype=torch.int64, device="cpu")
