"""What of a module must be as it was after a training."""


def trace(module):
    """Attributes, hooks, submodules and keys, comparable by ==."""
    return {
        "attributes": {name: set(part.__dict__) for name, part in module.named_modules()},
        "hooks": {
            name: {key: len(value) for key, value in part.__dict__.items() if "hooks" in key}
            for name, part in module.named_modules()
        },
        "keys": list(module.state_dict()),
        "parameters": [id(parameter) for parameter in module.parameters()],
        "step": module.__dict__.get("training_step"),
    }
