"""What the activations of a model read, seen without the code under test: by hooks, and by stand-ins for functions."""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from mp_lightning.sites import attach

FUNCTIONS = (
    *("celu", "elu", "gelu", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu", "relu6", "rrelu", "selu"),
    *("silu", "softplus"),
)


def inputs_at(plan, model, forward):
    """The tensor that the activation of each site reads while ``forward()`` runs the model as it is, by site.

    The last call of a block counts where it is called several times.
    """
    of_modules, of_functions, of_scopes = defaultdict(list), defaultdict(list), {}
    running = []
    handles = []

    def begin(scope):
        def hook(module, args):
            running.append(scope)
            if not module._modules:  # it may keep the function that it calls, so that no stand-in is seen
                of_scopes[scope] = args[0].clone()
            for calls in (of_modules, of_functions):
                for key in [key for key in calls if key[0] == scope]:
                    del calls[key]

        return hook

    def end(module, args, output):
        running.pop()

    def note(name):
        def hook(module, args):
            for scope in set(running):
                of_modules[scope, name].append(args[0].clone())

        return hook

    for scope in {site.scope for site in plan}:
        module = model.get_submodule(scope)
        handles.append(module.register_forward_pre_hook(begin(scope)))
        handles.append(module.register_forward_hook(end))
    for name in {site.activation for site in plan} - {None}:
        handles.append(model.get_submodule(name).register_forward_pre_hook(note(name)))

    @contextmanager
    def standing_in(name):
        original = getattr(F, name)

        def stand_in(x, *args, **kwargs):
            if not inside:
                for scope in set(running):
                    of_functions[scope, None].append(x.clone())
            inside.append(name)  # some of these call others of them
            try:
                return original(x, *args, **kwargs)
            finally:
                inside.pop()

        with patch.object(F, name, stand_in):
            yield

    inside = []
    with ExitStack() as stack:
        for name in FUNCTIONS:
            stack.enter_context(standing_in(name))
        forward()
    for handle in handles:
        handle.remove()
    calls = {**of_modules, **of_functions}
    return {
        site.name: calls[site.scope, site.activation][site.call]
        if (site.scope, site.activation) in calls
        else of_scopes[site.scope]
        for site in plan
    }


class Unchanged:
    """A perturbation that leaves every map as it is."""

    name = "unchanged"

    def initial_statistics(self, channels):
        return {}

    def measure(self, x, running, synchronize):
        return {}, None

    def multiplier(self, x, eps, statistics, norms):
        return x.new_ones(())


def seen_by_sites(attachment, forward):
    """The tensor that each site of an attached model gets, by site; the last call counts."""
    seen = {}
    handles = [
        site.register_forward_pre_hook(lambda site, args: seen.__setitem__(site.spec.name, args[0].clone()))
        for site in attachment.sites
    ]
    forward()
    for handle in handles:
        handle.remove()
    return seen


def check_sites_get_what_activations_read(plan, model, forward):
    """Bit for bit, with a perturbation that changes nothing; the model stays attached."""
    expected = inputs_at(plan, model, forward)
    seen = seen_by_sites(attach(model, perturbation=Unchanged(), clip=None), forward)
    assert seen.keys() == expected.keys() == set(plan.names)
    for name in plan.names:
        assert torch.equal(seen[name], expected[name]), name
