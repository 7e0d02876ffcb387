"""Put the activations that a plan proposes into a model: the only call that changes a model's structure."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from gainstage.apply.write import check_kinds
from gainstage.errors import InputError, PlanMismatchError
from gainstage.plan import ActivationPlan, Plan, TailoredActivation

_Model = TypeVar("_Model", bound=nn.Module)


def tailor(model: _Model, plan: Plan) -> _Model:
    """Replace activation modules by ``gamma f(alpha x + beta) + delta``, as ``plan.activations`` lists them. In place.

    The plan was made for the model as it was: make another one of the tailored model, and apply that.

    Args:
        model: what the plan was made for.
        plan: of a policy that proposes activations (isometric).

    Returns:
        The model.

    Raises:
        InputError: no plan is given, or one that proposes no change; its notes say why.
        PlanMismatchError: a module is not there, or of another type. The model is then unchanged.

    Example::

        gs.tailor(model, gs.plan(model, (x,), policy="isometric"))
        plan = gs.initialize(model, (x,), policy="isometric")
    """
    check_kinds("tailor", model, plan)
    if not plan.activations:
        said = " ".join(note for note in plan.notes if note.startswith("activations"))
        raise InputError(f"the plan of policy {plan.policy!r} proposes no change to any activation. {said}".strip())
    replacements = [(_found(model, change), change) for change in plan.activations]
    for old, change in replacements:
        new = _made(old, change).train(old.training)
        for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
            model.set_submodule(path, new)
    return model


def _found(model: nn.Module, change: ActivationPlan) -> nn.Module:
    try:
        module = model.get_submodule(change.module)
    except AttributeError as error:
        raise PlanMismatchError(f"the plan changes the activation {change.module!r}, which the model has not: {error}") from error
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind != change.module_type:
        raise PlanMismatchError(f"the plan changes {change.module!r}, a {change.module_type}, but the model has a {kind} there")
    if module is model:
        raise PlanMismatchError("the model is nothing but the activation to be changed: put it into a module")
    return module


def _made(old: nn.Module, change: ActivationPlan) -> TailoredActivation:
    inner = old if change.negative_slope is None else nn.LeakyReLU(change.negative_slope)
    return TailoredActivation(inner, alpha=change.alpha, beta=change.beta, gamma=change.gamma, delta=change.delta)
