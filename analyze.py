"""The conversion-matrix analysis: are the matrices that turn W0 into the trained A, B and BA alike across layers?

    python analyze.py ckpt.pt                        # of a LoRA checkpoint; the picture goes to ckpt.svg
    python analyze.py ckpt.pt --compare other.pt     # beside another one: LoRA and CondLoRA, or two seeds

For each layer  C_A = W0^-1 A^T,  C_B = W0^-1 B,  C_BA = W0^-1 B A  (Kim et al. 2024, arXiv:2403.14946, section 3), compared by the
subspace similarity of the LoRA paper (Hu et al. 2022, arXiv:2106.09685, section 7.2): phi is 0 for orthogonal subspaces and 1 where
one holds the other. Beside the trained factors stand three baselines: untrained ones through the same W0^-1, which tell what W0
does by itself; the trained ones without W0^-1 ("raw"); and random matrices, the only baseline of the paper.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from condlora import LoRALinear, adapt
from model import Transformer, check_encoder, load_checkpoint

MATRICES = ("A", "B", "BA")
SEEDS = 10                          # draws of each random baseline


# The formulas --------------------------------------------------------------------------------------------------------

def regular(W0, values):
    """Whether W0, with these singular values, is square and of full rank within rounding: then it can be solved with."""
    return W0.shape[0] == W0.shape[1] and bool(values[-1] > values[0] * max(W0.shape) * torch.finfo(W0.dtype).eps)


def solve(W0, X, is_regular):
    """C with W0 C = X, or the smallest least-squares solution where W0 is rectangular or singular."""
    if is_regular:
        return torch.linalg.solve(W0, X)
    return torch.linalg.pinv(W0, rtol=max(W0.shape) * torch.finfo(W0.dtype).eps) @ X


def conversion_matrices(W0, A, B):
    """{"A": C_A (d, r), "B": C_B (d, r), "BA": C_BA (d, d)}, float64, for W0 (d_out, d_in), A (r, d_in), B (d_out, r).

    W0 C_A = A^T, W0 C_B = B and W0 C_BA = B A, solved and not inverted. In a rectangular W0 CondLoRA's A comes from the columns, so
    C_A (d_out, r) is the solution of W0^T C_A = A^T; that and the others are least squares there, and where W0 is singular.
    """
    W0, A, B = (torch.as_tensor(x).double() for x in (W0, A, B))
    is_regular = regular(W0, torch.linalg.svdvals(W0))
    C_B = solve(W0, B, is_regular)
    return {"A": solve(W0 if W0.shape[0] == W0.shape[1] else W0.T, A.T, is_regular), "B": C_B, "BA": C_B @ A}


def singular_vectors(matrix, side):
    """Orthonormal columns, the largest singular value's first, of a matrix (..., m, n)."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U if side == "left" else Vh.mT


def thin_svd(P, Q):
    """The SVD U (m, r), S (r), V (n, r) of the product of P (..., m, r) and Q (..., r, n), which is never formed."""
    (U, R), (V, T) = torch.linalg.qr(P), torch.linalg.qr(Q.mT)
    u, S, vh = torch.linalg.svd(R @ T.mT)
    return U @ u, S, V @ vh.mT


def phi(X, Y, i, j):
    """||X_i^T Y_j||_F^2 / min(i, j) of orthonormal columns X (..., d, >= i) and Y (..., d, >= j), of which the first i and j count."""
    return (X[..., :i].mT @ Y[..., :j]).square().sum((-2, -1)) / min(i, j)


def subspace_similarity(X, Y, i, j, side="left"):
    """phi(X, Y, i, j), from 0 to 1: how much of the span of X's first i singular vectors lies in that of Y's first j, or the
    other way round (Hu et al. 2022, equation 4). side "left" or "right" singular vectors. Raises ValueError where X or Y has no
    i-th or j-th singular vector, or their lengths differ."""
    X, Y = (torch.as_tensor(x).double() for x in (X, Y))
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}: use 'left' or 'right'")
    for name, k, matrix in (("i", i, X), ("j", j, Y)):
        if not 1 <= k <= min(matrix.shape):
            raise ValueError(f"{name} is {k}: a matrix of shape {tuple(matrix.shape)} has {min(matrix.shape)} singular vectors")
    X, Y = singular_vectors(X, side), singular_vectors(Y, side)
    if X.shape[0] != Y.shape[0]:
        raise ValueError(f"the singular vectors have lengths {X.shape[0]} and {Y.shape[0]}")
    return phi(X, Y, i, j).item()


# What a checkpoint holds ---------------------------------------------------------------------------------------------

class Factors:
    """One target of a checkpoint, its L layers stacked, in float64: W0 (L, d_out, d_in), A (L, r, d_in), B (L, d_out, r), and C_A
    and C_B with them. Everything that is solved with a W0, the untrained factors too, is solved at once."""

    def __init__(self, layers, bar):
        self.W0 = torch.stack([layer.W0 for layer in layers])
        self.A, self.B = (torch.stack(factors) for factors in zip(*(layer.factors() for layer in layers)))
        self.scale = layers[0].scale
        self.theta = layers[0].shared[0] if layers[0].shared else None
        (L, r, d_in), d_out = self.A.shape, self.B.shape[1]
        device = self.A.device
        # fresh factors as `adapt` starts them, B Gaussian: zero has no subspace. Uniform or Gaussian, any scale gives the same phi
        draw = torch.Generator().manual_seed(0)
        rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(device)
        uniform = lambda *shape: (2 * torch.rand(*shape, generator=draw, dtype=torch.float64) - 1).to(device)
        untrained = [(uniform(L, r, d_in), rand(L, d_out, r)) for _ in range(SEEDS)]
        A = torch.cat([self.A, *(a for a, _ in untrained)], 1).mT     # (L, d_in, (1 + SEEDS) r)
        B = torch.cat([self.B, *(b for _, b in untrained)], 2)
        self.condition, self.regular, C_A, C_B = [], [], [], []
        for W0, a, b in zip(self.W0, A, B):
            values = torch.linalg.svdvals(W0)
            self.condition.append((values[0] / values[-1]).item())
            self.regular.append(regular(W0, values))
            if d_out == d_in:
                both = solve(W0, torch.cat([a, b], 1), self.regular[-1])
                C_A.append(both[:, :a.shape[1]])
                C_B.append(both[:, a.shape[1]:])
            else:
                C_A.append(solve(W0.T, a, False))
                C_B.append(solve(W0, b, False))
            bar.update()
        C_A, C_B = torch.stack(C_A), torch.stack(C_B)
        (self.C_A, *fresh_A), (self.C_B, *fresh_B) = C_A.split(r, 2), C_B.split(r, 2)
        # each way of making three matrices a layer: (C_A, C_B, A), and C_BA is the product of the last two
        self.trained = self.C_A, self.C_B, self.A
        self.raw = self.A.mT, self.B, self.A
        self.control = [(a, b, fresh) for a, b, (fresh, _) in zip(fresh_A, fresh_B, untrained)]
        self.random = [(rand(*self.C_A.shape), rand(*self.C_B.shape), rand(*self.A.shape)) for _ in range(SEEDS)]


def read(file, init_from, device):
    """({target: Factors}, checkpoint) of a checkpoint's file."""
    checkpoint = load_checkpoint(file)
    settings = checkpoint["settings"]
    if settings["method"] not in ("lora", "condlora"):
        raise ValueError(f"{file} was trained with --method {settings['method']}, which has no A and B: "
                         f"train one with --method lora or condlora")
    folder = Path(init_from or checkpoint["encoder"]["path"])
    if not folder.is_dir():
        raise FileNotFoundError(f"the encoder of {file} is not at {folder} any more: say where it is with --init_from")
    check_encoder(folder, checkpoint, file)
    model = Transformer.from_pretrained(folder, checkpoint["config"]["n_out"])
    adapt(model, settings["method"], settings["targets"], settings["rank"], settings["alpha"])
    model.load_state_dict(checkpoint["weights"], strict=False)
    model.double().to(device)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            layers.setdefault(name.rpartition(".")[2], []).append(module)
    with tqdm(total=sum(map(len, layers.values())), desc="solving", unit="layer", leave=False, delay=1) as bar:
        return {target: Factors(some, bar) for target, some in layers.items()}, checkpoint


# The tables ----------------------------------------------------------------------------------------------------------

def similarities(matrices, i, j, side):
    """{"A", "B", "BA": phi of every pair of layers, (L, L)} of (C_A, C_B, A), each stacked over layers and decomposed once."""
    C_A, C_B, A = matrices
    U, _, V = thin_svd(C_B, A)
    vectors = {"A": singular_vectors(C_A, side), "B": singular_vectors(C_B, side), "BA": U if side == "left" else V}
    return {name: phi(x[:, None], x[None], i, j) for name, x in vectors.items()}


def mean_of_pairs(square):
    """Mean over pairs of different layers of an (L, L) matrix."""
    L = len(square)
    return ((square.sum() - square.trace()) / (L * (L - 1))).item()


def mean_and_deviation(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item()


def likeness(factors, i, j, side):
    """A dict a matrix: the figures of the main table, and the (L, L) maps behind it."""
    found = {kind: similarities(getattr(factors, kind), i, j, side) for kind in ("trained", "raw")}
    drawn = {kind: [similarities(x, i, j, side) for x in getattr(factors, kind)] for kind in ("control", "random")}
    rows = {}
    for name in MATRICES:
        trained, raw = (mean_of_pairs(found[kind][name]) for kind in ("trained", "raw"))
        control, random = (mean_and_deviation([mean_of_pairs(x[name]) for x in drawn[kind]]) for kind in ("control", "random"))
        # where phi is 1 by definition (all r of r right singular vectors), rounding is all the deviation there is
        distance = (trained - control[0]) / control[1] if control[1] > 1e-9 else 0.0
        rows[name] = {"trained": trained, "control": control, "distance": distance, "raw": raw, "random": random,
                      "map": found["trained"][name].tolist(),
                      "control_map": torch.stack([x[name] for x in drawn["control"]]).mean(0).tolist()}
    return rows


def verdict(table):
    """What the figures of the main table say, in a sentence or two."""
    alike, beyond, less = [], [], []
    for target, rows in table.items():
        for name, row in rows.items():
            if row["trained"] > row["random"][0] + 3 * row["random"][1]:
                alike.append(f"{target} {name}")
                if row["distance"] > 3:
                    share = (row["trained"] - row["control"][0]) / (row["trained"] - row["random"][0])
                    beyond.append(f"{target} {name} ({share:.0%} of its likeness)")
            if row["distance"] < -3:
                less.append(f"{target} {name}")
    if not alike:
        text = "No conversion matrices are more alike across layers than random ones, by more than 3 deviations."
    elif not beyond:
        text = (f"More alike across layers than random ones: {', '.join(alike)}; but untrained factors behind the same W0^-1 are as "
                f"alike, within 3 deviations: the likeness is W0's, not training's.")
    else:
        text = (f"More alike across layers than random ones: {', '.join(alike)}. Training adds to what W0^-1 does by itself, by more "
                f"than 3 deviations, in {', '.join(beyond)}; the rest of the likeness is W0's.")
    return text + (f" Less alike than the control: {', '.join(less)}." if less else "")


def random_basis(shape, draw):
    """Orthonormal columns (..., d, r) that span random subspaces."""
    return torch.linalg.qr(torch.randn(shape, generator=draw, dtype=torch.float64))[0]


def amplification(factors):
    """A dict a layer: ||dW||_F, ||U^T W0 V||_F in dW's directions and in random ones, and the factors between (Hu et al. 2022,
    section 7.3)."""
    draw = torch.Generator().manual_seed(1)
    U, S, V = thin_svd(factors.scale * factors.B, factors.A)
    rows = []
    for W0, u, s, v in zip(factors.W0, U, S, V):
        delta, kept = s.norm().item(), (u.T @ W0 @ v).norm().item()
        bases = [[random_basis((d, len(s)), draw).to(W0.device) for d in W0.shape] for _ in range(SEEDS)]
        at_random = sum((a.T @ W0 @ b).norm().item() for a, b in bases) / SEEDS
        rows.append({"delta": delta, "W0": W0.norm().item(), "kept": kept, "factor": delta / kept,
                     "random": at_random, "random_factor": delta / at_random})
    return rows


def theta_check(factors):
    """How far every layer's C_A and C_B are from the one theta_A^T and theta_B^T, relative to its largest number, and theta's
    singular values."""
    found = {}
    for name, C, theta in (("A", factors.C_A, factors.theta.theta_A), ("B", factors.C_B, factors.theta.theta_B)):
        found[name] = {"largest_deviation": ((C - theta.T).abs().max() / theta.abs().max()).item(),
                       "singular_values": torch.linalg.svdvals(theta).tolist()}
    return found


def comparison(one, two, i, j):
    """{matrix: the mean over layers of phi between two checkpoints, and mean and deviation of the same between random matrices and, of
    conversion matrices, between untrained ones}. A's are right singular vectors, the others' left."""
    def vectors(f):
        return {"A": singular_vectors(f.A, "right"), "B": singular_vectors(f.B, "left"), "dW": thin_svd(f.B, f.A)[0],
                "C_A": singular_vectors(f.C_A, "left"), "C_B": singular_vectors(f.C_B, "left")}

    def untrained(f, k):                                              # CondLoRA's conversion matrices start as random ones, whatever W0 is
        C_A, C_B, _ = f.random[k] if f.theta else f.control[k]
        return {"C_A": singular_vectors(C_A, "left"), "C_B": singular_vectors(C_B, "left")}
    draw = torch.Generator().manual_seed(2)
    X, Y = vectors(one), vectors(two)
    drawn = [(untrained(one, k), untrained(two, (k + 1) % SEEDS)) for k in range(SEEDS)]          # not the same draw on both sides
    rows = {}
    for name in X:
        random = [[random_basis(x[name].shape, draw) for x in (X, Y)] for _ in range(SEEDS)]
        rows[name] = {"phi": phi(X[name], Y[name], i, j).mean().item(),
                      "random": mean_and_deviation([phi(x, y, i, j).mean().item() for x, y in random])}
        if name in ("C_A", "C_B"):
            rows[name]["control"] = mean_and_deviation([phi(x[name], y[name], i, j).mean().item() for x, y in drawn])
    return rows


# The picture ---------------------------------------------------------------------------------------------------------

COLOURS = [(0.0, (68, 1, 84)), (0.25, (59, 82, 139)), (0.5, (33, 145, 140)), (0.75, (94, 201, 98)), (1.0, (253, 231, 37))]


def colour(value):
    """Of a figure from 0 to 1: dark violet over green to yellow."""
    value = min(max(value, 0.0), 1.0)
    low, high = next((a, b) for a, b in zip(COLOURS, COLOURS[1:]) if value <= b[0])
    share = (value - low[0]) / (high[0] - low[0])
    return "#%02x%02x%02x" % tuple(round(a + share * (b - a)) for a, b in zip(low[1], high[1]))


def svg(table, title):
    """A self-contained picture: for each target a row of maps, layer by layer, trained beside control, for A, B and BA."""
    L = len(next(iter(table.values()))["A"]["map"])
    cell, gap, left, top = max(26, 160 // L), 34, 96, 84               # wide enough for the words above a map of few layers
    side = L * cell
    width, height = left + 6 * (side + gap), top + len(table) * (side + 72) + 46
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
             f'font-family="system-ui, sans-serif" font-size="13">',
             "<style>.paper{fill:#ffffff} .ink{fill:#1f2328} "
             "@media (prefers-color-scheme: dark){.paper{fill:#0d1117} .ink{fill:#e6edf3}}</style>",
             f'<rect class="paper" width="{width}" height="{height}"/>']

    def write(x, y, text, size=13, anchor="start", fill=None):
        ink = f'fill="{fill}"' if fill else 'class="ink"'
        parts.append(f'<text {ink} x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{text}</text>')
    write(left, 28, title, 17)
    write(left, 50, f"similarity of the conversion matrices of every two layers; control: the mean of {SEEDS} draws of untrained factors "
                    f"through the same W0\u207b\u00b9")
    for number, (target, rows) in enumerate(table.items()):
        y0 = top + number * (side + 72) + 24
        write(12, y0 + side / 2, target, 15)
        for column, (name, kind) in enumerate((name, kind) for name in MATRICES for kind in ("trained", "control")):
            x0 = left + column * (side + gap) - (8 if kind == "control" else 0)
            row = rows[name]
            mean, values = (row["trained"], row["map"]) if kind == "trained" else (row["control"][0], row["control_map"])
            write(x0, y0 - 8, f"{name} {kind}, mean {mean:.3f}")
            for a in range(L):
                write(x0 - 4, y0 + (a + 0.5) * cell + 4, a, 10, "end")
                write(x0 + (a + 0.5) * cell, y0 + side + 13, a, 10, "middle")
                for b, value in enumerate(values[a]):
                    parts.append(f'<rect class="cell" x="{x0 + b * cell}" y="{y0 + a * cell}" width="{cell - 1}" height="{cell - 1}" '
                                 f'fill="{colour(value)}"><title>{target} {name} {kind}, layers {a} and {b}: {value:.4f}</title></rect>')
                    write(x0 + (b + 0.5) * cell - 0.5, y0 + (a + 0.5) * cell + 3.5, f"{value:.2f}".lstrip("0") if value < 0.995 else "1",
                          10, "middle", "#000000" if value > 0.6 else "#ffffff")
    y = height - 34
    for k in range(151):
        parts.append(f'<rect x="{left + k * 2}" y="{y}" width="2.5" height="12" fill="{colour(k / 150)}"/>')
    for value in (0, 0.25, 0.5, 0.75, 1):
        write(left + 300 * value, y + 27, f"{value:g}", 11, "middle")
    write(left + 320, y + 11, "\u03c6: 0 orthogonal, 1 the same subspace; rows and columns are layers")
    parts.append("</svg>")
    return "\n".join(parts)


# The command line ----------------------------------------------------------------------------------------------------

def show(header, rows):
    """Print a table, its columns as wide as they need."""
    rows = [header, *rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    for row in rows:
        print("  ".join(text.ljust(width) if k == 0 else text.rjust(width) for k, (text, width) in enumerate(zip(row, widths))).rstrip())
    print()


def pm(pair):
    return f"{pair[0]:.4f} \u00b1 {pair[1]:.4f}"


def analyze(args):
    if args.device.partition(":")[0] not in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        raise ValueError(f"--device {args.device} is not there: use {'cuda or ' * torch.cuda.is_available()}cpu")
    targets, checkpoint = read(args.checkpoint, args.init_from, args.device)
    settings = checkpoint["settings"]
    if args.svg and settings["method"] == "condlora":
        raise ValueError(f"--svg shows pairs of layers, and in {args.checkpoint}, trained with condlora, all pairs are the same: give a lora one")
    rank = settings["rank"]
    i, j = args.i or rank, args.j or rank
    for name, k in (("--i", i), ("--j", j)):
        if not 1 <= k <= rank:
            raise ValueError(f"{name} is {k}: A and B of rank {rank} have 1 to {rank} singular vectors")
    result = {"checkpoint": str(args.checkpoint), "task": checkpoint["task"], "method": settings["method"], "i": i, "j": j, "side": args.side}
    title = f"{checkpoint['task']}, {settings['method']} rank {rank}, phi with i = {i}, j = {j}, {args.side} singular vectors"
    print(title + "\n")

    result["condition"] = {target: f.condition for target, f in targets.items()}
    result["least_squares"] = {target: [l for l, ok in enumerate(f.regular) if not ok] for target, f in targets.items()}
    show(["condition number of W0", *map(str, range(len(next(iter(targets.values())).condition)))],
         [[target, *(f"{c:.1e}" + " *" * (not ok) for c, ok in zip(f.condition, f.regular))] for target, f in targets.items()])
    if any(result["least_squares"].values()):
        print("* rectangular or singular: least squares\n")

    if args.compare:
        others, other = read(args.compare, args.init_from, args.device)
        shapes = [{t: (*f.A.shape, *f.B.shape) for t, f in some.items()} for some in (targets, others)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{args.checkpoint} and {args.compare} are of different shapes: {describe(targets)}, and {describe(others)}")
        result["compare"] = {"checkpoint": str(args.compare), "method": other["settings"]["method"],
                             "targets": {t: comparison(targets[t], others[t], i, j) for t in targets}}
        print(f"beside {args.compare} ({other['task']}, {other['settings']['method']}): phi between the two, mean over layers")
        show(["", "between the two", "control (untrained)", "random"],
             [[f"{t} {name}", f"{row['phi']:.4f}", pm(row["control"]) if "control" in row else "", pm(row["random"])]
              for t, rows in result["compare"]["targets"].items() for name, row in rows.items()])
    if settings["method"] == "lora":
        if len(next(iter(targets.values())).A) < 2:
            raise ValueError(f"{args.checkpoint} has adapted layers of one depth only: there are no pairs to compare")
        table = result["likeness"] = {target: likeness(f, i, j, args.side) for target, f in targets.items()}
        print("mean phi over pairs of layers")
        show(["", "trained", "control (untrained)", "distance", "raw", "random"],
             [[f"{target} {name}", f"{row['trained']:.4f}", pm(row["control"]), f"{row['distance']:+.1f} sd", f"{row['raw']:.4f}", pm(row["random"])]
              for target, rows in table.items() for name, row in rows.items()])
        result["verdict"] = verdict(table)
        print(result["verdict"] + "\n")
    else:
        result["theta"] = {target: theta_check(f) for target, f in targets.items()}
        print("C_A and C_B of every layer against the one theta they share")
        show(["", "largest deviation", "theta's singular values"],
             [[f"{target} {name}", f"{row['largest_deviation']:.1e}", " ".join(f"{v:.3g}" for v in row["singular_values"])]
              for target, rows in result["theta"].items() for name, row in rows.items()])

    result["amplification"] = {target: amplification(f) for target, f in targets.items()}
    print("dW beside W0, which it changes")
    show(["layer", "|dW|", "|W0|", "|U'W0 V| along dW", "factor", "along random", "factor"],
         [[f"{target} {l}", *(f"{row[k]:.3f}" for k in ("delta", "W0", "kept", "factor", "random", "random_factor"))]
          for target, rows in result["amplification"].items() for l, row in enumerate(rows)])

    if settings["method"] == "lora":
        file = args.svg or args.checkpoint.with_suffix(".svg")
        file.write_text(svg(table, title.replace("phi", "\u03c6")), encoding="utf-8")
        print(f"picture: {file}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def describe(targets):
    return ", ".join(f"{target} of {len(f.A)} layers {f.B.shape[1]}x{f.A.shape[2]} rank {f.A.shape[1]}" for target, f in targets.items())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.partition("\n")[2])
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint of train.py --method lora or condlora")
    add("--i", type=int, help="how many singular vectors of the one matrix count; default the rank")
    add("--j", type=int, help="and of the other")
    add("--side", choices=("left", "right"), default="left", help="singular vectors of the main table's matrices")
    add("--compare", type=Path, metavar="CKPT", help="a second checkpoint, of the same shape")
    add("--json", type=Path, help="write every figure to this file")
    add("--svg", type=Path, help="where the picture goes; default beside the checkpoint")
    add("--init_from", help="folder of the encoder, if it has moved")
    add("--device", default="cpu", help="cpu (the default) or cuda; in float64 either way")
    parser.error = lambda message: sys.exit(fail(message))
    try:
        with torch.no_grad():
            analyze(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(fail(error))


def fail(message):
    print(f"analyze.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
