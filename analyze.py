"""Are the matrices that turn W0 into A, B and BA alike across layers?

    python analyze.py ckpt.pt                        # tables; the picture goes to ckpt.svg
    python analyze.py ckpt.pt --compare other.pt     # LoRA and CondLoRA, or two seeds
    python analyze.py FOLDER --init_from ENCODER     # a LoRA adapter that PEFT wrote

For each layer  C_A = W0^-1 A^T,  C_B = W0^-1 B,  C_BA = W0^-1 B A  (Kim et al. 2024,
arXiv:2403.14946, section 3), compared by the subspace similarity phi of the LoRA paper (Hu et al.
2022, arXiv:2106.09685, section 7.2): 0 for orthogonal subspaces, 1 where one holds the other.

LoRA:     the conversion matrices of every two layers. The control, which the paper lacks, is
          untrained A and B through the same W0^-1: it tells what W0 does by itself.
CondLoRA: with square W0 every layer has the same conversion matrices, the thetas. The question
          turns round: how alike are A and B, made by one theta from different W0? The control is
          untrained thetas.
"""

import json
import math
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from condlora import AdaptedLinear, convert, load_adapter
from data import checkpoint as checkpoints
from data import peft_format
from data.command import check_writable, naming, one_line, parser_of, write
from model import Transformer

DRAWS = 10  # of each random baseline


# The formulas ------------------------------------------------------------------------------------

class Solver:
    """solver(X) is the C with W0 C = X, for any X, from one factorization of W0.

    Where W0 is rectangular or singular, C is the smallest least-squares solution.
    """

    def __init__(self, W0):
        values = torch.linalg.svdvals(W0)
        rounding = max(W0.shape) * torch.finfo(W0.dtype).eps
        self.condition = (values[0] / values[-1]).item()
        self.is_exact = W0.shape[0] == W0.shape[1] and bool(values[-1] > values[0] * rounding)
        if self.is_exact:
            self.factors = torch.linalg.lu_factor(W0)
        else:
            self.inverse = torch.linalg.pinv(W0, rtol=rounding)

    def __call__(self, X):
        return torch.linalg.lu_solve(*self.factors, X) if self.is_exact else self.inverse @ X


def conversion_matrices(W0, A, B, solve=None):
    """{"A": C_A (d, r), "B": C_B (d, r), "BA": C_BA (d, d)}, float64.

    For W0 (d_out, d_in), A (r, d_in), B (d_out, r):  W0 C_A = A^T,  W0 C_B = B,  W0 C_BA = B A.
    CondLoRA reads A from the columns of a rectangular W0: there W0^T C_A = A^T, C_A (d_out, r).
    `solve` is Solver(W0), for those who have it already.
    """
    W0, A, B = (torch.as_tensor(x).double() for x in (W0, A, B))
    solve = solve or Solver(W0)
    square = W0.shape[0] == W0.shape[1]
    C_A = solve(A.T) if square else solve.inverse.T @ A.T  # the inverse of W0^T
    C_B = solve(B)
    return {"A": C_A, "B": C_B, "BA": C_B @ A}


def subspace_similarity(X, Y, i, j, side="left"):
    """phi(X, Y, i, j), from 0 to 1 (Hu et al. 2022, equation 4).

    How much of the span of X's first i singular vectors lies in that of Y's first j, or the other
    way round. side: "left" or "right" singular vectors. Raises ValueError where X or Y has no i-th
    or j-th singular vector, or where their vectors differ in length.
    """
    X, Y = (torch.as_tensor(x).double() for x in (X, Y))
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}: use 'left' or 'right'")
    for name, k, matrix in (("i", i, X), ("j", j, Y)):
        if not 1 <= k <= min(matrix.shape):
            raise ValueError(f"{name} is {k}: a matrix of shape {tuple(matrix.shape)} has "
                             f"{min(matrix.shape)} singular vectors")
    X, Y = singular_vectors(X, side), singular_vectors(Y, side)
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"the singular vectors have lengths {X.shape[0]} and {Y.shape[0]}")
    return phi(X, Y, i, j).item()


def singular_vectors(matrix, side):
    """Orthonormal columns, the largest singular value's first, of a matrix (..., m, n)."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U if side == "left" else Vh.mT


def thin_svd(P, Q):
    """U (..., m, r), S (..., r), V (..., n, r) of P Q, which is never formed: P (..., m, r)."""
    U, R = torch.linalg.qr(P)
    V, T = torch.linalg.qr(Q.mT)
    u, S, vh = torch.linalg.svd(R @ T.mT, full_matrices=False)
    return U @ u, S, V @ vh.mT


def phi(X, Y, i, j):
    """||X_i^T Y_j||_F^2 / min(i, j) of orthonormal columns X (..., d, m) and Y (..., d, n)."""
    return (X[..., :i].mT @ Y[..., :j]).square().sum((-2, -1)) / min(i, j)


# What is compared --------------------------------------------------------------------------------

class Layer(NamedTuple):
    """One adapted layer of a checkpoint, float64."""

    number: str  # in the encoder
    W0: torch.Tensor  # (d_out, d_in)
    A: torch.Tensor  # (r, d_in)
    B: torch.Tensor  # (d_out, r)
    scale: float
    thetas: tuple  # (theta_A, theta_B), the same in all layers; () in LoRA
    solve: Solver  # of W0


def factors_of(layers, rng=None):
    """A (L, r, d_in) and B (L, d_out, r) of the layers.

    With `rng` untrained ones; CondLoRA's then come from one untrained theta.
    """
    if rng and layers[0].thetas:
        thetas = untrained_factors(*layers[0].thetas, rng)
        return convert(torch.stack([layer.W0 for layer in layers]), *thetas)
    pairs = [untrained_factors(layer.A, layer.B, rng) if rng else (layer.A, layer.B)
             for layer in layers]
    return [torch.stack(factors) for factors in zip(*pairs)]


def untrained_factors(A, B, rng):
    """Fresh A and B of these shapes: A uniform as adapt has it, B Gaussian (zero has no span)."""
    bound = 1 / math.sqrt(A.shape[1])
    fresh_A = torch.empty(A.shape, dtype=torch.float64).uniform_(-bound, bound, generator=rng)
    return fresh_A.to(A.device), gaussian(B.shape, rng).to(B.device)


def gaussian(shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def conversions_of(layers, A, B):
    """{"A": C_A, "B": C_B}, each (L, d, r), of the layers' W0 and these factors."""
    C = [conversion_matrices(layer.W0, a, b, layer.solve) for layer, a, b in zip(layers, A, B)]
    return {name: torch.stack([matrices[name] for matrices in C]) for name in "AB"}


def compared_matrices(layers, rng=None):
    """Three stacks: X_A (L, d, r), X_B (L, d, r) and the A (L, r, d) with which BA is X_B A.

    LoRA: the conversion matrices. CondLoRA: A^T and B themselves, made from each layer's W0.
    """
    A, B = factors_of(layers, rng)
    if layers[0].thetas:
        return A.mT, B, A
    C = conversions_of(layers, A, B)
    return C["A"], C["B"], A


# The figures -------------------------------------------------------------------------------------

def similarity_maps(X_A, X_B, A, i, j, side):
    """{"A", "B", "BA": phi of every two layers, (L, L)}; each matrix is decomposed once."""
    left, _, right = thin_svd(X_B, A)
    vectors = {
        "A": singular_vectors(X_A, side),
        "B": singular_vectors(X_B, side),
        "BA": left if side == "left" else right,
    }
    # Every layer beside every layer.
    return {name: phi(X[:, None], X[None], i, j) for name, X in vectors.items()}


def likeness(layers, i, j, side):
    """{"A", "B", "BA": a row of the main table}, a dict of figures and of the maps behind them.

    Where i and j are the rank, BA and B have the same left vectors, and BA's row is left out.
    """
    rng = torch.Generator().manual_seed(0)
    maps = lambda stacks: similarity_maps(*stacks, i, j, side)
    compared, (A, B) = compared_matrices(layers), factors_of(layers)
    trained, raw = maps(compared), maps((A.mT, B, A))
    controls = [maps(compared_matrices(layers, rng)) for _ in range(DRAWS)]
    randoms = [maps([gaussian(x.shape, rng).to(x.device) for x in compared])
               for _ in range(DRAWS)]
    is_full = i == j == rank_of(layers[0]) and side == "left"
    rows = {}
    for name in ("A", "B") if is_full else ("A", "B", "BA"):
        mean = mean_of_pairs(trained[name])
        control = mean_and_deviation(mean_of_pairs(x[name]) for x in controls)
        rows[name] = {
            "trained": mean,
            "control": control,
            # Where phi is 1 by definition, rounding is all the deviation there is.
            "distance": (mean - control[0]) / control[1] if control[1] > 1e-9 else 0.0,
            "raw": mean_of_pairs(raw[name]),
            "random": mean_and_deviation(mean_of_pairs(x[name]) for x in randoms),
            "map": trained[name].tolist(),
            "control_map": torch.stack([x[name] for x in controls]).mean(0).tolist(),
        }
    return rows


def rank_of(layer):
    """How many singular vectors A and B have."""
    return min(*layer.A.shape, *layer.B.shape)


def mean_of_pairs(square):
    """Mean over pairs of different layers of an (L, L) matrix."""
    L = len(square)
    return ((square.sum() - square.trace()) / (L * (L - 1))).item()


def mean_and_deviation(values):
    values = torch.tensor(list(values), dtype=torch.float64)
    return values.mean().item(), values.std().item()


def theta_check(layers):
    """How far all layers' conversion matrices are from theta^T, and theta's singular values."""
    C = conversions_of(layers, *factors_of(layers))
    rows = {}
    for name, theta in zip("AB", layers[0].thetas):
        deviation = (C[name] - theta.T).abs().max() / theta.abs().max()
        rows[name] = {"largest_deviation": deviation.item(),
                      "singular_values": torch.linalg.svdvals(theta).tolist()}
    return rows


def comparison(one, two, i, j):
    """{matrix: phi between two checkpoints' layers, mean over layers, and its baselines}.

    The control of C_A and C_B is untrained ones, drawn apart. Of A the right singular vectors are
    compared, which are A^T's left ones; of the others the left.
    """
    rng = torch.Generator().manual_seed(2)

    def mean_phi(X, Y):  # (L, d, r) both
        return phi(singular_vectors(X, "left"), singular_vectors(Y, "left"), i, j).mean().item()

    def row(X, Y):
        randoms = gaussian((DRAWS, 2, *X.shape), rng)
        return {"phi": mean_phi(X, Y), "random": mean_and_deviation(mean_phi(*x) for x in randoms)}

    (A, B), (other_A, other_B) = factors_of(one), factors_of(two)
    C, other_C = conversions_of(one, A, B), conversions_of(two, other_A, other_B)
    rows = {"A": row(A.mT, other_A.mT), "B": row(B, other_B)}
    controls = [[conversions_of(layers, *factors_of(layers, rng)) for layers in (one, two)]
                for _ in range(DRAWS)]
    for name in "AB":
        control = mean_and_deviation(mean_phi(x[name], y[name]) for x, y in controls)
        rows[f"C_{name}"] = row(C[name], other_C[name]) | {"control": control}
    return rows


def amplification(layers):
    """A dict a layer: how far dW amplifies directions that W0 has (Hu et al. 2022, section 7.3).

    kept is ||U^T W0 V||_F in dW's directions, random the same in random ones. A large factor says
    that dW adds what W0 has little of.
    """
    rng = torch.Generator().manual_seed(1)
    rows = []
    for layer in layers:
        kept_in = lambda U, V: (U.T @ layer.W0 @ V).norm().item()
        U, S, V = thin_svd(layer.scale * layer.B, layer.A)
        delta, kept = S.norm().item(), kept_in(U, V)
        bases = [[torch.linalg.qr(gaussian((d, len(S)), rng))[0].to(S.device)
                  for d in layer.W0.shape] for _ in range(DRAWS)]
        random = sum(kept_in(U, V) for U, V in bases) / DRAWS
        rows.append({"delta": delta, "W0": layer.W0.norm().item(), "kept": kept,
                     "factor": delta / kept if kept else math.inf,
                     "random": random, "random_factor": delta / random})
    return rows


def analyze(targets, others, i, j, side):
    """Every figure, as JSON takes it: a dict of tables, each by target."""
    result = {"condition": {}, "least_squares": {}, "likeness": {}, "amplification": {}}
    result["layers"] = [layer.number for layer in next(iter(targets.values()))]
    for target, layers in targets.items():
        result["condition"][target] = [layer.solve.condition for layer in layers]
        result["least_squares"][target] = [layer.number for layer in layers
                                           if not layer.solve.is_exact]
        result["likeness"][target] = likeness(layers, i, j, side)
        result["amplification"][target] = amplification(layers)
        if layers[0].thetas:
            result.setdefault("theta", {})[target] = theta_check(layers)
        if others:
            compared = comparison(layers, others[target], i, j)
            result.setdefault("compare", {})[target] = compared
    return result


# The picture -------------------------------------------------------------------------------------

VIRIDIS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
BLUE_WHITE_RED = [(33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43)]


def colour(value, low, high, scale):
    """The scale's colour for a value between low and high, as #rrggbb."""
    position = (len(scale) - 1) * min(max((value - low) / (high - low), 0.0), 1.0)
    index = min(int(position), len(scale) - 2)
    share = position - index
    mixed = [round(a + share * (b - a)) for a, b in zip(scale[index], scale[index + 1])]
    return "#%02x%02x%02x" % tuple(mixed)


def svg(table, title, numbers):
    """A self-contained picture: for each matrix the maps of trained, control and their difference.

    The colours span the cells shown, from the random baseline up; the diagonal, 1 by definition, is
    blank. numbers: the layers'.
    """
    names, rows = zip(*flat(table))
    L = len(numbers)
    maps = torch.tensor([[row["map"], row["control_map"]] for row in rows])
    maps = torch.cat([maps, maps[:, :1] - maps[:, 1:]], 1)  # (matrices, 3, L, L)
    shown = maps[:, :, ~torch.eye(L, dtype=torch.bool)]
    low = min(row["random"][0] for row in rows)
    high = max(low + 1e-6, shown[:, :2].max().item())
    most = shown[:, 2].abs().max().item() + 1e-6
    columns = [("trained", low, high, " (random)", VIRIDIS),
               ("control", low, high, " (random)", VIRIDIS),
               ("trained \u2212 control", -most, most, "", BLUE_WHITE_RED)]

    legend, left, top = 168, 100, 96
    cell = max(14, legend // L)
    size = L * cell
    column_width, row_height = max(size, legend) + 40, size + 44
    width, height = left + 3 * column_width, top + len(names) * row_height + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif">',
        "<!-- made by analyze.py -->",
        "<style>.paper{fill:#ffffff} .ink{fill:#1f2328} @media (prefers-color-scheme: dark)"
        "{.paper{fill:#0d1117} .ink{fill:#e6edf3}}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
    ]

    def label(x, y, text, points=12, anchor="start"):
        parts.append(f'<text class="ink" x="{x}" y="{y}" font-size="{points}" '
                     f'text-anchor="{anchor}">{escape(text)}</text>')

    def box(x, y, width, height, fill, inside=""):
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" '
                     f'fill="{fill}">{inside}</rect>')

    label(16, 28, title, 16)
    label(16, 50, f"\u03c6 of every two layers; control: the mean of {DRAWS} untrained draws "
                  f"through the same W0")
    for n, name in enumerate(names):
        label(16, top + n * row_height + size / 2, name, 14)
    for k, (heading, bottom, end, note, scale) in enumerate(columns):
        x = left + k * column_width
        label(x, top - 18, heading, 14)
        for n, name in enumerate(names):
            y = top + n * row_height
            for a in range(L):
                label(x - 5, y + (a + 0.7) * cell, numbers[a], 9, "end")
                label(x + (a + 0.5) * cell, y + size + 12, numbers[a], 9, "middle")
                for b in set(range(L)) - {a}:
                    value = maps[n, k, a, b].item()
                    box(x + b * cell, y + a * cell, cell - 1, cell - 1,
                        colour(value, bottom, end, scale),
                        f"<title>{name}, layers {numbers[a]} and {numbers[b]}: {value:.4f}</title>")
        for step in range(legend // 2):
            box(x + 2 * step, height - 40, 2.5, 10, colour(step, 0, legend // 2 - 1, scale))
        label(x, height - 16, f"{bottom:.3f}{note}", 11)
        label(x + legend, height - 16, f"{end:.3f}", 11, "end")
    return "\n".join([*parts, "</svg>"])


# The tables --------------------------------------------------------------------------------------

def print_tables(result, what, compared_file):
    inexact = result["least_squares"]
    show(["condition number of W0", *result["layers"]],
         [[target, *(f"{value:.1e}" + (" *" if layer in inexact[target] else "")
                     for layer, value in zip(result["layers"], row))]
          for target, row in result["condition"].items()])
    if any(inexact.values()):
        print("* rectangular or singular: least squares, which sees only what W0 lets through\n")
    if "compare" in result:
        print(f"beside {compared_file}: phi between the two, mean over layers")
        show(["", "between the two", "control (untrained)", "random"],
             [[name, f"{row['phi']:.4f}", plus_minus(row.get("control")), plus_minus(row["random"])]
              for name, row in flat(result["compare"])])
    if "theta" in result:
        print("C_A and C_B of every layer against the one theta they share")
        show(["", "largest deviation", "theta's singular values"],
             [[name, f"{row['largest_deviation']:.1e}" + " *" * bool(inexact[name.split()[0]]),
               " ".join(f"{value:.3g}" for value in row["singular_values"])]
              for name, row in flat(result["theta"])])
    print(f"{what}: mean phi over pairs of layers")
    header = ["", "trained", "control (untrained)", "distance", "random", "A, B themselves"]
    rows = [[name, f"{row['trained']:.4f}", plus_minus(row["control"]),
             f"{row['distance']:+.1f} sd", plus_minus(row["random"]), f"{row['raw']:.4f}"]
            for name, row in flat(result["likeness"])]
    if "theta" in result:  # CondLoRA's last column would be its first
        header, rows = header[:-1], [row[:-1] for row in rows]
    show(header, rows)
    print(verdict(result["likeness"]) + "\n")
    print("dW beside W0, which it changes")
    columns = ("delta", "W0", "kept", "factor", "random", "random_factor")
    show(["layer", "|dW|", "|W0|", "|U'W0 V| along dW", "factor", "along random", "factor"],
         [[f"{target} {number}", *(f"{row[k]:.3f}" for k in columns)]
          for target, rows in result["amplification"].items()
          for number, row in zip(result["layers"], rows)])


def verdict(table):
    """What training adds to the likeness, in a sentence."""
    beyond = [name for name, row in flat(table) if row["distance"] > 3]
    if not beyond:
        return ("Nowhere more alike than untrained ones by 3 deviations: "
                "what likeness there is comes from W0.")
    return (f"More alike than untrained ones by more than 3 deviations: {', '.join(beyond)}. "
            f"The rest of the likeness comes from W0.")


def flat(table):
    """[("query A", row), ...] of {"query": {"A": row}}."""
    return [(f"{target} {name}", row) for target, rows in table.items()
            for name, row in rows.items()]


def show(header, rows):
    """Print a table, its columns as wide as they need."""
    rows = [header, *rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    print()


def plus_minus(pair):
    return f"{pair[0]:.4f} \u00b1 {pair[1]:.4f}" if pair else ""


# Checkpoints and the command line ----------------------------------------------------------------

def read(file, init_from, device):
    """(task, method, {target: its Layers}) of a checkpoint, or of a folder that PEFT wrote."""
    with naming(file):
        task, method, adapted = (read_peft if file.is_dir() else read_checkpoint)(file, init_from)
        targets = {}
        for name, W0, A, B, scale, thetas in tqdm(adapted, "factorizing W0", leave=False, delay=1,
                                                  disable=None):
            W0, A, B, *thetas = (x.double().to(device) for x in (W0, A, B, *thetas))
            for what, x in (("W0", W0), ("A", A), ("B", B)):
                if not x.isfinite().all() or not x.any():
                    raise ValueError(f"the {what} of {name} is zero, as before training, or not "
                                     f"finite: it has no subspace to compare")
            layer = Layer(name.split(".")[1], W0, A, B, scale, tuple(thetas), Solver(W0))
            targets.setdefault(name.rpartition(".")[2], []).append(layer)
        numbers = {tuple(layer.number for layer in layers) for layers in targets.values()}
        if len(numbers) != 1 or len(numbers.pop()) < 2:
            raise ValueError(f"there are no pairs to compare, unless each target is in the same "
                             f"layers, two or more; it has {describe(targets)}")
        for target, layers in targets.items():
            if any(not torch.equal(a, b) for layer in layers
                   for a, b in zip(layer.thetas, layers[0].thetas)):
                raise ValueError(f"layers named {target} have different thetas: adapt them under "
                                 f"one target")
    return task, method, targets


def read_checkpoint(file, init_from):
    """(task, method, [(name, W0, A, B, scale, thetas) of each adapted layer])"""
    checkpoint = checkpoints.load(file)
    method = checkpoint["settings"]["method"]
    if method not in ("lora", "condlora"):
        raise ValueError(f"--method {method:.20} has no A and B: train one with --method lora or "
                         f"condlora")
    model = Transformer.from_pretrained(checkpoints.verified_encoder(checkpoint, init_from))
    load_adapter(model, file).double()
    # Every CondLoRALinear of a target has the same Conversion.
    thetas_of = lambda layer: layer.conversion.parameters() if method == "condlora" else ()
    adapted = [(name, layer.weight, *layer.factors(), layer.scale, thetas_of(layer))
               for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)]
    return checkpoint["task"], method, adapted


def read_peft(folder, init_from):
    """The same of a folder."""
    if not init_from:
        raise ValueError("a folder is read as PEFT's adapter: say where its encoder is with "
                         "--init_from")
    model = Transformer.from_pretrained(init_from)
    adapted = [(name, model.get_submodule(name).weight, *A_B_scale, ())
               for name, A_B_scale in peft_format.read(folder, model).items()
               if name.startswith("layers.")]  # a head has no second layer to compare
    if not adapted:
        raise ValueError("it adapts no layer of the encoder")
    return folder.resolve().name, "lora", adapted


def run(argv):
    args = make_parser().parse_args(argv)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if args.device not in devices:
        raise ValueError(f"--device {args.device} is not there: use {' or '.join(devices)}")
    file = args.checkpoint
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint {file}: python train.py writes one")
    picture = Path(f"{file.resolve()}.svg") if file.is_dir() else file.with_suffix(".svg")
    picture = args.svg or picture
    check_writable(picture, "--svg", b"made by analyze.py")
    if args.json and args.json.resolve() == picture.resolve():
        raise ValueError(f"--svg and --json are one file, {picture}")
    if args.json:
        check_writable(args.json, "--json", b'{\n "checkpoint"')
    task, method, targets = read(args.checkpoint, args.init_from, args.device)
    others = None
    if args.compare:
        _, _, others = read(args.compare, args.init_from, args.device)
        if describe(targets) != describe(others):
            raise ValueError(f"{args.checkpoint} and {args.compare} are of different shapes: "
                             f"{describe(targets)}, and {describe(others)}")
    rank = min(rank_of(layer) for layers in targets.values() for layer in layers)
    i, j = (rank if k is None else k for k in (args.i, args.j))
    if not (1 <= i <= rank and 1 <= j <= rank):
        raise ValueError(f"--i {i} --j {j}: A and B of rank {rank} have 1 to {rank} singular "
                         f"vectors")
    result = analyze(targets, others, i, j, args.side)
    what = "conversion matrices" if method == "lora" else "A and B, made by one theta"
    title = f"{task}, {method} rank {rank}, \u03c6 with i = {i}, j = {j}, {args.side} vectors"
    drawn = svg(result["likeness"], f"{what}: {title}", result["layers"])
    write(picture, drawn.encode())
    if args.json:
        settings = {"checkpoint": str(args.checkpoint), "task": task, "method": method, "i": i,
                    "j": j, "side": args.side}
        write(args.json, (json.dumps(settings | result, indent=1) + "\n").encode())
    print(title + "\n")
    print_tables(result, what, args.compare)
    print(f"picture: {picture}")


def describe(targets):
    return ", ".join(
        f"{target} of layers {' '.join(layer.number for layer in layers)}, "
        f"{'x'.join(map(str, layers[0].W0.shape))} rank {len(layers[0].A)}"
        for target, layers in targets.items())


def make_parser():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint of train.py --method lora or condlora, or a "
        "folder with a LoRA adapter that PEFT wrote")
    add("--i", type=int, help="how many singular vectors of the one matrix count; default the rank")
    add("--j", type=int, help="and of the other; default the rank")
    add("--side", choices=("left", "right"), default="left",
        help="singular vectors of the main table's matrices; default left")
    add("--compare", type=Path, metavar="CKPT", help="a second checkpoint, of the same shape")
    add("--json", type=Path, help="write every figure to this file")
    add("--svg", type=Path, help="where the picture goes; default beside the checkpoint")
    add("--init_from", help="folder of the encoder, if it has moved")
    add("--device", default="cpu", help="cpu (the default) or cuda; in float64 either way")
    return parser


def main(argv=None):
    with one_line("analyze.py"), torch.no_grad():
        run(argv)


if __name__ == "__main__":
    main()
