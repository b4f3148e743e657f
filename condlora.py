"""LoRA and CondLoRA for any nn.Module, in plain PyTorch.

    model = adapt(model, method="condlora", targets=("query", "value"), rank=8, alpha=8.0)

freezes the model and gives every targeted nn.Linear a trainable low-rank update  dW = s B A,  s = alpha / rank.

LoRA      Hu et al. 2022, arXiv:2106.09685: each layer trains an A (r, d_in) and a B (d_out, r) of its own.
CondLoRA  Kim et al. 2024, arXiv:2403.14946: A and B are linear functions of the frozen weight W0 (d_out, d_in),
          and one pair of functions, theta_A and theta_B, serves all layers of a target. L layers, 1/L of the numbers.
"""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """y = x W0^T + b + s (x A^T) B^T around a frozen nn.Linear, whose weight W0 (d_out, d_in) and bias b it keeps."""

    shared = ()                                                       # CondLoRA's conversion

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / rank                                     # s
        self.register_buffer("unmerged", None, persistent=False)      # W0 while `weight` holds W0 + dW: see merge
        self.formed = None                                            # W0 + dW within weights_at_once
        self.add_parameters()

    def add_parameters(self):
        self.A = nn.Parameter(self.weight.new_empty(self.rank, self.in_features))     # (r, d_in)
        self.B = nn.Parameter(self.weight.new_zeros(self.out_features, self.rank))    # (d_out, r), zero: dW = 0 at first
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def parameters_of_adapter(self):
        return [self.A, self.B]

    @property
    def W0(self):
        return self.weight if self.unmerged is None else self.unmerged

    def factors(self):
        """A (r, d_in) and B (d_out, r)."""
        return self.A, self.B

    def delta(self):
        """dW = s B A, (d_out, d_in)."""
        A, B = self.factors()
        return self.scale * B @ A

    def forward(self, x):                                             # (..., d_in) -> (..., d_out)
        if self.formed is not None:
            return F.linear(x, self.formed, self.bias)
        y = F.linear(x, self.weight, self.bias)
        if self.unmerged is not None:
            return y
        A, B = (factor.to(y.dtype) for factor in self.factors())
        h = F.linear(x, A)                                            # (..., r)
        y.view(-1, self.out_features).addmm_(h.view(-1, self.rank), B.T, alpha=self.scale)        # y += s h B^T, where y lies
        return y

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, alpha={self.alpha}"


class Conversion(nn.Module):
    """The paper's single linear layer: theta_A and theta_B turn the W0 of whichever layer into that layer's A and B.

    For square W0 both read its rows, as the authors define it: A = (W0 theta_A^T)^T, B = W0 theta_B^T. In a rectangular
    W0 (d_out, d_in) the rows cannot give A its d_in columns, so A reads the columns: A = (W0^T theta_A^T)^T.
    """

    def __init__(self, W0, rank):
        super().__init__()
        d_out, d_in = W0.shape
        self.theta_A = nn.Parameter(W0.new_empty(rank, d_out))        # (r, d); square W0 has d_out = d_in = d
        self.theta_B = nn.Parameter(W0.new_zeros(rank, d_in))         # (r, d_in), zero: dW = 0 at first
        nn.init.kaiming_uniform_(self.theta_A, a=math.sqrt(5))

    def forward(self, W0):
        return self.convert(W0, self.theta_A.to(W0.dtype), self.theta_B.to(W0.dtype))

    @staticmethod
    def convert(W0, theta_A, theta_B):                                # each (..., rows, columns), to convert several at once
        square = W0.shape[-2] == W0.shape[-1]
        A = ((W0 if square else W0.mT) @ theta_A.mT).mT               # (r, d_in)
        B = W0 @ theta_B.mT                                           # (d_out, r)
        return A, B


class CondLoRALinear(LoRALinear):
    """A LoRALinear that owns no A and B: a Conversion shared with the other layers makes them from its own W0."""

    def __init__(self, linear, rank, alpha, conversion):
        super().__init__(linear, rank, alpha)
        self.shared = (conversion,)       # in a tuple, which nn.Module does not look into: adapt registers it, once

    def add_parameters(self):
        pass

    def parameters_of_adapter(self):
        return list(self.shared[0].parameters())

    def factors(self):
        """A (r, d_in) and B (d_out, r), made from W0."""
        return self.shared[0](self.W0)


def adapt(model, method="condlora", targets=("query", "value"), rank=8, alpha=8.0):
    """Freeze `model` and adapt, in place, each nn.Linear whose last name is in `targets`; returns the model.

    method  "lora" or "condlora". CondLoRA's conversions, one for each target name and weight shape, become
            `model.condlora`, so that a state dict holds each theta once.
    targets a name or several: "query" finds "layers.0.attention.query", "layers.1.attention.query", ...
    rank    1 <= rank <= min(d_in, d_out);  alpha: dW is scaled by alpha / rank (Hu et al. 2022, section 4.1).

    The caller unfreezes what else shall train (its head). Raises ValueError, with the model untouched, where the model
    is adapted already, a target names no nn.Linear, or the rank or the method does not fit.
    """
    if method not in ("lora", "condlora"):
        raise ValueError(f"method is {method!r}: use 'lora' or 'condlora'")
    if adapted_layers(model):
        raise ValueError("the model is adapted already: adapt a fresh one")
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    # not nn.Linear's subclasses: what they add (quantised weights, a parent that reads .weight itself) would be lost
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    last = {name: name.rpartition(".")[2] for name in linears}
    for target in targets:
        if target not in last.values():
            raise ValueError(f"no nn.Linear is named {target!r}: the model has {', '.join(sorted(set(last.values()))) or 'none'}")
    if not targets:
        raise ValueError("targets is empty: name the linear layers to adapt")
    chosen = {name: linear for name, linear in linears.items() if last[name] in targets}
    for name, linear in chosen.items():
        if not (isinstance(rank, int) and 1 <= rank <= min(linear.weight.shape)):
            raise ValueError(f"rank is {rank}: for {name}, of shape {tuple(linear.weight.shape)}, "
                             f"it must be from 1 to {min(linear.weight.shape)}")

    model.requires_grad_(False)
    conversions, adapted = nn.ModuleDict(), {}
    for name, linear in chosen.items():
        if method == "lora":
            adapted[linear] = LoRALinear(linear, rank, alpha)
        else:
            key = f"{last[name]}_{linear.out_features}x{linear.in_features}"
            if key not in conversions:
                conversions[key] = Conversion(linear.weight, rank)
            adapted[linear] = CondLoRALinear(linear, rank, alpha, conversions[key])
    replace(model, adapted)
    if conversions:
        model.condlora = conversions
    return model


def weights_at_once(model, dtype):
    """A function that makes a context in which each adapted layer does one product, with its W0 + dW; entering it forms them all at once.

        at_once = weights_at_once(model, torch.bfloat16)
        with at_once():
            loss = model(...)                                         # the same function, with the same gradients

    For training on a GPU, where the thin products with A and B, forward and backward, wait for memory and so take longer than what they
    save: the gradient of all of W0 + dW. That sum is rounded to `dtype`, W0 itself is not: small updates would be lost in it.
    To be called where the model is to stay: the W0 of all layers are laid into one tensor. Raises ValueError where it is merged.
    """
    groups = {}                                                       # layers of one shape that share a conversion, or have none
    for layer in adapted_layers(model):
        if layer.unmerged is not None:
            raise ValueError("the model is merged: unmerge it first")
        groups.setdefault((*layer.shared, layer.weight.shape), []).append(layer)
    batches = {}                                                      # G groups of L layers each
    for (*conversion, shape), layers in groups.items():
        conversions, all_layers = batches.setdefault((shape, len(layers)), ([], []))
        conversions += conversion
        all_layers += layers
    prepared = []
    for (_, L), (conversions, layers) in batches.items():
        W0 = torch.stack([layer.weight.detach() for layer in layers])                     # (G L, d_out, d_in)
        for layer, its_own in zip(layers, W0):
            layer.weight.data = its_own
        prepared.append((layers, W0, conversions, W0.to(dtype).unflatten(0, (-1, L)) if conversions else None))

    @contextlib.contextmanager
    def at_once():
        for layers, W0, conversions, narrow_W0 in prepared:
            if conversions:
                thetas = zip(*(conversion.parameters() for conversion in conversions))
                A, B = Conversion.convert(narrow_W0, *(torch.stack(theta).to(dtype)[:, None] for theta in thetas))      # (G, L, ...)
                A, B = A.flatten(0, 1), B.flatten(0, 1)
            else:
                A, B = (torch.stack(factors).to(dtype) for factors in zip(*(layer.factors() for layer in layers)))
            for layer, formed in zip(layers, torch.add(W0, B @ A, alpha=layers[0].scale).to(dtype).unbind()):
                layer.formed = formed
        try:
            yield
        finally:
            for layer in adapted_layers(model):
                layer.formed = None
    return at_once


@torch.no_grad()
def merge(model):
    """Put W0 + dW in every adapted layer's weight: forward then costs what the plain model's does. Returns the model.

    W0 is kept beside it, for unmerge to give back bit for bit: taking dW off again would leave rounding behind.
    """
    for layer in adapted_layers(model):
        if layer.unmerged is None:
            A, B = layer.factors()
            wide = torch.promote_types(A.dtype, torch.float32)        # one rounding, at the end, for half precision
            layer.unmerged = layer.weight.data
            layer.weight.data = (layer.unmerged.to(wide) + layer.scale * B.to(wide) @ A.to(wide)).to(layer.weight.dtype)
    return model


@torch.no_grad()
def unmerge(model):
    """Undo merge: every weight is W0 again, bit for bit. Returns the model."""
    for layer in adapted_layers(model):
        if layer.unmerged is not None:
            layer.weight.data, layer.unmerged = layer.unmerged, None
    return model


@torch.no_grad()
def to_lora(model):
    """Turn each CondLoRALinear, in place, into the LoRALinear with the A and B it produced. Returns the model.

    From there the layers train apart, and the adapter is in the form that LoRA's tools know.
    """
    turned = {}
    for layer in adapted_layers(model):
        if isinstance(layer, CondLoRALinear):
            lora = turned[layer] = LoRALinear(layer, layer.rank, layer.alpha)
            for parameter, factor in zip(lora.parameters_of_adapter(), layer.factors()):
                parameter.copy_(factor)
            lora.unmerged = layer.unmerged
    replace(model, turned)
    if isinstance(getattr(model, "condlora", None), nn.ModuleDict):
        del model.condlora
    return model


def adapter_parameters(model):
    """The adapter's parameters, each once, however many layers share it. The head's are not among them."""
    return list({id(p): p for layer in adapted_layers(model) for p in layer.parameters_of_adapter()}.values())


def adapted_layers(model):
    """Every LoRALinear and CondLoRALinear of the model, in its order."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def replace(model, new):
    """Put new[old] wherever the module `old` stands, under every name it has."""
    for name, old in list(model.named_modules(remove_duplicate=False)):
        if old in new:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new[old].train(old.training))
