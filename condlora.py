"""LoRA and CondLoRA for any nn.Module, in plain PyTorch.

    model = adapt(model, method="condlora", targets=("query", "value"), rank=8, alpha=8.0)

W0 (d_out, d_in) is the frozen weight of a linear layer, r the rank, s = alpha / r. Both compute

    y = x W0^T + b + s (x A^T) B^T          which adds  dW = s B A  to W0.

LoRA (Hu et al. 2022, arXiv:2106.09685) trains an A (r, d_in) and a B (d_out, r) in every layer.
CondLoRA (Kim et al. 2024, arXiv:2403.14946) makes A and B from W0:

    A = (W0 theta_A^T)^T,    B = W0 theta_B^T

and trains only theta_A and theta_B, both (r, d) for a square W0. One pair serves all layers of a
target ("query", say): with L layers that is 1/L of LoRA's numbers.
"""

import math
import pickle

import torch
import torch.nn as nn
import torch.nn.functional as F


def convert(W0, theta_A, theta_B):
    """CondLoRA's A (r, d_in) and B (d_out, r) from W0 (d_out, d_in); also from a stack of W0."""
    # Square, as the paper's: W0 theta_A^T. Rectangular: W0^T theta_A^T, so that A has d_in columns.
    square = W0.shape[-2] == W0.shape[-1]
    A = ((W0 if square else W0.mT) @ theta_A.T).mT
    B = W0 @ theta_B.T
    return A, B


class Conversion(nn.Module):
    """The paper's single linear layer: theta_A and theta_B turn any layer's W0 into its A and B."""

    def __init__(self, W0, rank):
        super().__init__()
        d_out, d_in = W0.shape
        self.theta_A = nn.Parameter(torch.empty(rank, d_out, device=W0.device))
        self.theta_B = nn.Parameter(torch.zeros(rank, d_in, device=W0.device))
        nn.init.kaiming_uniform_(self.theta_A, a=math.sqrt(5))  # as nn.Linear begins

    def forward(self, W0):
        return convert(W0.to(self.theta_A.dtype), self.theta_A, self.theta_B)


class AdaptedLinear(nn.Module):
    """A linear layer with an update; the methods differ in where factors() takes A and B from.

    settings: a dict of adapt's method, targets, rank and alpha.
    """

    def __init__(self, weight, bias, settings):
        super().__init__()
        self.weight, self.bias, self.settings = weight, bias, settings
        self.scale = settings["alpha"] / settings["rank"]
        # W0 + dW while the layer is merged. It is not saved in the state dict.
        self.register_buffer("merged", None, persistent=False)

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        A, B = (factor.to(x.dtype) for factor in self.factors())
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, A), B)

    def delta(self):
        """dW = s B A, (d_out, d_in), in float32 or wider: bfloat16 would lose small updates."""
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scale * B.to(wide) @ A.to(wide)


class LoRALinear(AdaptedLinear):
    """Owns A (r, d_in) and B (d_out, r). B starts at zero, so that dW does."""

    def __init__(self, weight, bias, settings):
        super().__init__(weight, bias, settings)
        (d_out, d_in), rank = weight.shape, settings["rank"]
        self.A = nn.Parameter(torch.empty(rank, d_in, device=weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def factors(self):
        return self.A, self.B


class CondLoRALinear(AdaptedLinear):
    """Owns no factors: a Conversion makes them from this layer's W0.

    Many layers have the same Conversion. It is a submodule of the first of them, which must stay in
    the model.
    """

    def __init__(self, weight, bias, settings, first=None):
        super().__init__(weight, bias, settings)
        if first is None:
            self.conversion = Conversion(weight, settings["rank"])
        else:
            # Not a submodule: else a state dict would repeat it for each layer.
            object.__setattr__(self, "conversion", first.conversion)

    def factors(self):
        return self.conversion(self.weight)


def adapt(model, method="condlora", targets=("query", "value"), rank=8, alpha=8.0):
    """Freeze `model` and adapt, in place, each nn.Linear whose name ends with one of `targets`.

    method  "lora" or "condlora", with one Conversion for each target and shape of weight.
    targets one name or several, of one part or more: "out" finds every layer of that name,
            "attention.out" only those in a module named "attention".
    rank    from 1 to min(d_in, d_out); alpha: dW is scaled by alpha / rank.

    Returns the model; the caller unfreezes what else shall train (its head). Adapters are float32.
    Raises ValueError, with the model untouched, where an argument or the model does not fit.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    linears = find_linears(model, method, targets, rank, alpha)
    model.requires_grad_(False)
    settings = dict(method=method, targets=targets, rank=rank, alpha=alpha)
    adapted, firsts = {}, {}
    for name, linear in linears.items():
        arguments = linear.weight, linear.bias, settings
        if method == "lora":
            adapted[linear] = LoRALinear(*arguments)
        else:
            alike = target_of(name, targets), linear.weight.shape
            adapted[linear] = CondLoRALinear(*arguments, firsts.get(alike))
            firsts.setdefault(alike, adapted[linear])
    replace(model, adapted)
    return model


@torch.no_grad()
def merge(model):
    """Let forward use W0 + dW, summed once and kept beside W0: no adapter arithmetic is left.

    Until unmerge the adapter gets no gradient. After load_state_dict, merge again.
    """
    for layer in adapted_layers(model):
        layer.merged = (layer.weight + layer.delta()).to(layer.weight.dtype)
    return model


def unmerge(model):
    """Forget W0 + dW. W0 was never touched, so it is there bit for bit."""
    for layer in adapted_layers(model):
        layer.merged = None
    return model


def merge_and_unload(model):
    """Turn each adapted layer, in place, into a plain nn.Linear that holds W0 + dW."""
    plain = {}
    for layer in adapted_layers(merge(model)):
        d_out, d_in = layer.weight.shape
        plain[layer] = nn.Linear(d_in, d_out, bias=False, device="meta")
        plain[layer].weight = nn.Parameter(layer.merged, requires_grad=False)
        plain[layer].bias = layer.bias
    replace(model, plain)
    return model


def to_lora(model):
    """Turn each CondLoRALinear, in place, into the LoRALinear with the A and B that it made.

    From there the layers train apart, and the adapter has the form that LoRA's tools know.
    """
    turned = {}
    for layer in adapted_layers(model):
        if isinstance(layer, CondLoRALinear):
            lora = LoRALinear(layer.weight, layer.bias, layer.settings | {"method": "lora"})
            A, B = layer.factors()
            lora.A.data, lora.B.data = A.detach().contiguous(), B.detach().contiguous()
            lora.merged = layer.merged
            turned[layer] = lora
    replace(model, turned)
    return model


def save_adapter(model, file):
    """Write the adapter's tensors, each theta once, and the settings that `adapt` was given."""
    if not adapter_tensors(model):
        raise ValueError("the model has no adapter of its own: there is nothing to save")
    weights = {name: p.detach().cpu().clone() for name, p in adapter_tensors(model).items()}
    torch.save({"settings": adapted_layers(model)[0].settings, "weights": weights}, file)


def load_adapter(model, file):
    """Read what save_adapter or train.py wrote into `model`, which is adapted first if need be.

    Raises ValueError where the file holds no adapter, where the model's has another method, target,
    rank or alpha, or where a tensor is missing, unexpected or of another shape; a fresh model is
    adapted then, too.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        names = "method", "targets", "rank", "alpha"
        settings = {name: saved["settings"][name] for name in names}
        # train.py's file holds the head, too.
        weights = {name: tensor for name, tensor in saved["weights"].items()
                   if name.rpartition(".")[2] in ("A", "B", "theta_A", "theta_B")}
        if not adapted_layers(model):
            adapt(model, **settings)
        for name, own in adapted_layers(model)[0].settings.items():
            if settings[name] != own:
                raise ValueError(f"{name} is {settings[name]}, in the model {own}")
        copy_tensors(weights, adapter_tensors(model))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:
        raise ValueError(f"{file} holds no adapter of this model: {str(error)[:150]}") from None
    return merge(model) if adapted_layers(model)[0].merged is not None else model


def copy_tensors(given, parameters):
    """Copy {name: tensor} to {name: parameter}; ValueError where names or shapes differ."""
    for name in sorted(parameters.keys() | given.keys()):
        shape = tuple(given[name].shape) if name in given else "not there"
        expected = tuple(parameters[name].shape) if name in parameters else "not there"
        if shape != expected:
            raise ValueError(f"{name:.60} is {shape}, in the model {expected}")
    for name, parameter in parameters.items():
        parameter.data.copy_(given[name])


def adapter_tensors(model):
    """{name: parameter} of the adapter, each theta once."""
    return {f"{prefix}.{name}": parameter for prefix, layer in model.named_modules()
            if isinstance(layer, AdaptedLinear)
            for name, parameter in layer.named_parameters() if name not in ("weight", "bias")}


def adapter_parameters(model):
    """The adapter's parameters, each theta once; without the head's."""
    return list(adapter_tensors(model).values())


def adapted_layers(model):
    """Every LoRALinear and CondLoRALinear of the model, in its order."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def replace(model, new):
    """Put new[old] wherever the module `old` stands."""
    for name, old in list(model.named_modules(remove_duplicate=False)):
        if old in new:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[old].train(old.training))


def target_of(name, targets):
    """The first of `targets` whose parts are the last of `name`, or None."""
    return next((target for target in targets if f".{name}".endswith(f".{target}")), None)


def find_linears(model, method, targets, rank, alpha):
    """{name: nn.Linear} of what `adapt` shall adapt. Raises ValueError where a request is wrong."""
    if method not in ("lora", "condlora"):
        raise ValueError(f"method is {method!r}: use 'lora' or 'condlora'")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}: it must be a positive number")
    if not targets:
        raise ValueError("targets is empty: name the linear layers to adapt")
    if adapted_layers(model):
        raise ValueError("the model is adapted already: adapt a fresh one")
    # Not nn.Linear's subclasses: what they add (quantised weights, say) would be lost.
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for target in targets:
        if not any(target_of(name, [target]) for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
            raise ValueError(f"no nn.Linear is named {target!r}: the model has {known}")
    chosen = {name: linear for name, linear in linears.items() if target_of(name, targets)}
    in_fast_path = {part for module in model.modules()
                    if isinstance(module, nn.TransformerEncoderLayer) for part in module.modules()}
    for name, linear in chosen.items():
        most = min(linear.weight.shape)
        if not (isinstance(rank, int) and 1 <= rank <= most):
            raise ValueError(f"rank is {rank}: for {name} it must be an int from 1 to {most}")
        if "weight" not in linear._parameters:
            raise ValueError(f"the weight of {name} is computed by a hook (spectral_norm, prune): "
                             f"remove that first")
        if linear in in_fast_path:
            raise ValueError(f"{name} is part of an nn.TransformerEncoderLayer, whose fast path in "
                             f"eval mode would pass over the adapter")
    return chosen
