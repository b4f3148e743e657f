"""LoRA and CondLoRA for any nn.Module, in plain PyTorch.

    model = adapt(model, method="condlora", targets=("query", "value"), rank=8, alpha=8.0)

W0 (d_out, d_in) is a linear layer's frozen weight, r the rank, s = alpha / r. Both methods compute

    y = x W0^T + b + s (x A^T) B^T          which adds  dW = s B A  to W0.

LoRA (Hu et al. 2022, arXiv:2106.09685) trains an A (r, d_in) and a B (d_out, r) in every layer.
CondLoRA (Kim et al. 2024, arXiv:2403.14946) makes A and B from a square W0 (d, d):

    A^T = W0 theta_A^T,    B = W0 theta_B^T            (a linear layer on the rows of W0)

and trains only theta_A and theta_B, both (r, d). All layers of a target ("query", say) share one
pair: with L layers, 1/L of LoRA's parameters. Two controls ask whether W0 matters, with another
matrix in its place: "random", a fixed Gaussian one for each layer; "tied", the identity for all.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

METHODS = ("lora", "condlora", "tied", "random")


def convert(M, theta_A, theta_B):
    """A (r, d_in) and B (d_out, r) from M (d_out, d_in), or from a stack of them (L, d_out, d_in).

    M is W0 or a control's matrix, None the identity. theta_A is (r, d_out), theta_B (r, d_in): both
    are (r, d) in the paper, where M is square.
    """
    if M is None:
        return theta_A, theta_B.T
    M = M.to(theta_A.dtype)
    B = M @ theta_B.T
    if M.shape[-2] == M.shape[-1]:
        A = (M @ theta_A.T).mT  # the paper's formula
    else:
        A = (M.mT @ theta_A.T).mT  # ours, where the paper's does not fit A (r, d_in)
    return A, B


class Conversion(nn.Module):
    """The paper's single linear layer on W0's rows, d -> 2r, as its halves theta_A and theta_B."""

    def __init__(self, W0, rank):
        super().__init__()
        d_out, d_in = W0.shape
        self.theta_A = nn.Parameter(torch.empty(rank, d_out, device=W0.device).float())
        self.theta_B = nn.Parameter(torch.zeros(rank, d_in, device=W0.device).float())
        # nn.Linear's default initialization. Zeros in theta_B make B and dW start at zero.
        nn.init.kaiming_uniform_(self.theta_A, a=math.sqrt(5))


class AdaptedLinear(nn.Linear):
    """An nn.Linear with a low-rank update; subclasses have factors(), which gives (A, B).

    adapt changes the class of an existing nn.Linear to such a subclass, then calls `start`: so the
    layer remains the same object, with its W0 and its hooks.
    """

    def start(self, settings):
        self.settings = settings  # adapt's arguments
        self.scale = settings["alpha"] / settings["rank"]
        # W0 + dW, or None: merge and train.py's with_summed_weights set it, for forward to use.
        self.register_buffer("merged", None, persistent=False)

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        A, B = (factor.to(x.dtype) for factor in self.factors())
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, A), B)

    def delta(self):
        """dW = s B A, (d_out, d_in), in float32 or wider: bfloat16 would lose small updates."""
        with torch.autocast(self.weight.device.type, enabled=False):  # which would narrow it
            A, B = self.factors()
            wide = torch.promote_types(A.dtype, torch.float32)
            return self.scale * B.to(wide) @ A.to(wide)


class LoRALinear(AdaptedLinear):
    """Owns A (r, d_in) and B (d_out, r). B starts at zero, and so does dW."""

    def start(self, settings):
        super().start(settings)
        (d_out, d_in), rank, device = self.weight.shape, settings["rank"], self.weight.device
        self.A = nn.Parameter(torch.empty(rank, d_in, device=device).float())
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=device).float())
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def factors(self):
        return self.A, self.B


class CondLoRALinear(AdaptedLinear):
    """Has no factors of its own: a Conversion makes them from M, this layer's W0 or a control's.

    Layers share a Conversion. Only the first, its owner, has it as a submodule, and so moves and
    saves it for all: safetensors and Hugging Face's Trainer refuse a tensor under two names.
    """

    def start(self, settings, owner, generator):
        super().start(settings)
        if owner is self:
            self.conversion = Conversion(self.weight, settings["rank"])
        else:
            object.__setattr__(self, "conversion", owner.conversion)  # but not as a submodule
        self.register_buffer("random", None)
        if settings["method"] == "random":  # Gaussian, with W0's mean square
            W0 = self.weight.detach().float()
            noise = torch.randn(W0.shape, generator=generator, device="cpu", dtype=torch.float32)
            self.random = noise.to(W0.device) * W0.square().mean().sqrt()

    @property
    def M(self):  # (d_out, d_in), or None for the identity
        return dict(condlora=self.weight, random=self.random, tied=None)[self.settings["method"]]

    def factors(self):
        return convert(self.M, self.conversion.theta_A, self.conversion.theta_B)


def refuse(is_wrong, message):
    if is_wrong:
        raise ValueError(message)


def adapt(model, method="condlora", targets=("query", "value"), rank=8, alpha=8.0, seed=0):
    """Freeze `model` and adapt, in place, each nn.Linear whose name ends with one of `targets`.

    method  "lora", "condlora", or a control, "tied" or "random" (these need square weights).
    targets one or more names, dotted or not: "out" matches every layer of that name,
            "attention.out" only those in a module named "attention".
    rank    from 1 to min(d_in, d_out); alpha: dW is scaled by alpha / rank.
    seed    of method "random"'s matrices: drawn on the CPU, they get the mean square of W0.

    Layers share a Conversion if target and shape agree. Returns the model; the caller unfreezes
    anything else that should train (its head). Adapters are float32. Raises ValueError, leaving the
    model untouched, if an argument or the model does not fit.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    linears = find_linears(model, method, targets, rank, alpha)
    settings = {"method": method, "targets": targets, "rank": int(rank), "alpha": float(alpha),
                "seed": int(seed)}
    generator = torch.Generator().manual_seed(settings["seed"])
    model.requires_grad_(False)
    owners = {}  # the first layer of each target and shape, which owns the Conversion
    for name, layer in linears.items():
        if method == "lora":
            layer.__class__ = LoRALinear
            layer.start(settings)
        else:
            layer.__class__ = CondLoRALinear
            key = target_of(name, targets), layer.weight.shape
            owner = owners.setdefault(key, layer)  # itself, if it is the first
            layer.start(settings, owner, generator)
    return model


@torch.no_grad()
def merge(model):
    """Cache W0 + dW, in W0's dtype, in each adapted layer: no computation for the adapter is left.

    Until unmerge the adapter gets no gradient. After load_state_dict, merge again.
    """
    for layer in adapted_layers(model).values():
        layer.merged = (layer.weight + layer.delta()).to(layer.weight.dtype)
    return model


def unmerge(model):
    """Drop the cached W0 + dW. W0 itself was never changed, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.merged = None
    return model


def merge_and_unload(model):
    """Turn each adapted layer, in place, into a plain nn.Linear that holds W0 + dW."""
    for layer in adapted_layers(merge(model)).values():
        layer.weight = nn.Parameter(layer.merged, requires_grad=False)
        for name in ("A", "B", "conversion", "random", "merged", "settings", "scale"):
            if hasattr(layer, name):
                delattr(layer, name)
        layer.__class__ = nn.Linear
    return model


def save_adapter(model, file):
    """Write the adapter, each theta once, and every other parameter that requires a gradient.

    The file also holds adapt's arguments, whose seed redraws "random"'s matrices, and the layers'
    names. Raises ValueError without an adapter, or if layers' settings differ.
    """
    weights = {name: p.detach().cpu().clone() for name, p in trained_tensors(model).items()}
    torch.save({"settings": settings_of(model), "layers": list(adapted_layers(model)),
                "weights": weights}, file)


def load_adapter(model, file):
    """Load what save_adapter or train.py wrote into `model`, which is adapted first if need be.

    Every parameter in the file, the head's included, is copied into the parameter of that name,
    which then requires a gradient. Merged layers are merged again. Returns the model. Raises
    FileNotFoundError, or ValueError if settings, layers, names or shapes differ, with the model's
    weights untouched; a fresh model may be adapted by then. Never runs code (weights_only=True).
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        theirs, weights = saved["settings"] | {"layers": saved["layers"]}, saved["weights"]
        if not adapted_layers(model):
            names = "method", "targets", "rank", "alpha", "seed"  # train.py's file has more
            adapt(model, **{name: theirs[name] for name in names})
        ours = settings_of(model) | {"layers": list(adapted_layers(model))}
        seed = ["seed"] if theirs["method"] == "random" else []
        for name in ["method", "rank", "alpha", "layers", *seed]:  # layers tell the targets
            refuse(theirs[name] != ours[name],
                   f"{name} is {theirs[name]!s:.80}, in the model {ours[name]!s:.80}")
        # The file must have all that trains in the model, and may have what is frozen (a head).
        in_file = {name: p for name, p in model.named_parameters() if name in weights}
        copy_tensors(weights, trained_tensors(model) | in_file)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load alone raises half a dozen types
        kind = type(error).__name__
        reason = str(error) if kind == "ValueError" else f"reading it failed ({kind})"
        raise ValueError(f"{file} holds no adapter of this model: {reason:.200}") from error
    for layer in adapted_layers(model).values():
        if layer.merged is not None:
            merge(layer)  # a layer, too, is a module with adapted layers
    return model


def copy_tensors(given, parameters):
    """Copy {name: tensor} to {name: parameter}, to train; ValueError if names or shapes differ."""
    shape_in = lambda tensors, name: tuple(tensors[name].shape) if name in tensors else "missing"
    for name in sorted(parameters.keys() | given.keys()):
        theirs, ours = shape_in(given, name), shape_in(parameters, name)
        refuse(theirs != ours, f"{name:.60} is {theirs}, in the model {ours}")
        refuse(not given[name].is_floating_point(), f"{name:.60} is {given[name].dtype}, not float")
    for name, parameter in parameters.items():
        parameter.requires_grad_(True).data.copy_(given[name])


def adapted_layers(model):
    """{name: layer} of the adapted layers, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def settings_of(model):
    """adapt's arguments, which each layer keeps; ValueError if there are none, or several."""
    every = [layer.settings for layer in adapted_layers(model).values()]
    refuse(not every or any(settings != every[0] for settings in every), "the model has no adapter,"
           " or parts of it were adapted with different settings: save or load those one by one")
    return every[0]


def adapter_parameters(model):
    """The adapter's parameters, each theta once; ValueError if a Conversion's owner was removed."""
    present, parameters = {None, *model.modules()}, []  # None: LoRA has no Conversion
    for name, layer in adapted_layers(model).items():
        conversion = getattr(layer, "conversion", None)
        refuse(conversion not in present, f"the layer that holds {name}'s thetas was removed from "
               f"the model: keep the first layer of each target and shape")
        # "A" and "B"; or an owner's "conversion.theta_A" and "conversion.theta_B".
        parameters += [p for key, p in layer.named_parameters() if key not in ("weight", "bias")]
    return parameters


def trained_tensors(model):
    """{name: parameter} of the adapter, frozen or not, and of all that requires a gradient."""
    adapter = set(map(id, adapter_parameters(model)))
    return {name: p for name, p in model.named_parameters() if p.requires_grad or id(p) in adapter}


def target_of(name, targets):
    """The first of `targets` that `name` ends with, or None: "a.b.out" with "out", not "ut"."""
    return next((target for target in targets if f".{name}".endswith(f".{target}")), None)


def find_linears(model, method, targets, rank, alpha):
    """{name: nn.Linear} to adapt. ValueError if an argument, or a layer that is found, is wrong."""
    refuse(method not in METHODS, f"method is {method!r}: use {', '.join(METHODS)}")
    refuse(not 0 < alpha < math.inf, f"alpha is {alpha}: it must be a positive number")
    refuse(not targets, "targets is empty: name the linear layers to adapt")
    refuse(adapted_layers(model), "the model is already adapted: adapt a fresh one")
    modules = dict(model.named_modules())
    chosen = {name: module for name, module in modules.items() if target_of(name, targets)}
    known = {name.rpartition(".")[2] for name, m in modules.items() if type(m) is nn.Linear}
    for target in targets:  # each must be found
        refuse(not any(target_of(name, [target]) for name in chosen),
               f"no nn.Linear is named {target!r}: the model has {', '.join(sorted(known))}")
    for name, layer in chosen.items():
        refuse(type(layer) is not nn.Linear,
               f"{name} is a {type(layer).__name__}: only plain nn.Linear layers can be adapted")
        refuse(isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer),
               f"{name}: nn.TransformerEncoderLayer's fast path in eval mode ignores the adapter")
        # spectral_norm makes "weight" another attribute, accelerate replaces "forward".
        refuse("weight" not in layer._parameters or "forward" in vars(layer),
               f"{name} has a hook (spectral_norm's, accelerate's): remove that first")
        dtype, (d_out, d_in) = layer.weight.dtype, layer.weight.shape
        refuse(not dtype.is_floating_point, f"the weight of {name} is {dtype}, not floating point")
        refuse(rank not in range(1, min(d_out, d_in) + 1),
               f"rank is {rank}: for {name} it must be an int from 1 to {min(d_out, d_in)}")
        refuse(method in ("tied", "random") and d_out != d_in,
               f"{name} is not square: method {method} is for square weights only")
    return chosen
