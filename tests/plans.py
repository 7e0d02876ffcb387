"""Plans that fit a model, written by hand."""

from gainstage.plan import ParameterPlan, Plan


def plan_that_fits(model, fields):
    """Every parameter once, ties under their first name; ``fields(name, parameter)``: its distribution, and what else differs."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters())
    return Plan(
        policy="test",
        fingerprint="",
        training=True,
        parameters={
            name: ParameterPlan(
                **{
                    "name": name,
                    "aliases": tuple(aliases),
                    "shape": tuple(parameters[name].shape),
                    "dtype": str(parameters[name].dtype).removeprefix("torch."),
                    "role": "weight",
                    **fields(name, parameters[name]),
                }
            )
            for name, *aliases in names.values()
        },
    )
