"""Are the matrices that turn W0 into A, B and BA similar across layers?

    python analyze.py ckpt.pt                        # tables; the picture goes to ckpt.svg
    python analyze.py ckpt.pt --compare other.pt     # LoRA and CondLoRA, or two seeds
    python analyze.py FOLDER --init_from ENCODER     # a LoRA adapter that PEFT wrote

For each layer  C_A = W0^-1 A^T,  C_B = W0^-1 B,  C_BA = W0^-1 B A  (Kim et al. 2024,
arXiv:2403.14946, section 3), compared by the subspace similarity phi of the LoRA paper (Hu et al.
2022, arXiv:2106.09685, section 7.2): 0 for orthogonal subspaces, 1 if one contains the other.

LoRA:     the conversion matrices of every pair of layers. The control, which the paper lacks, is
          untrained A and B through the same W0^-1: it tells what W0 does by itself. With the
          default --i, --j and --side C_BA has no row, since its left vectors span what C_B's do.
CondLoRA: with square W0 every layer has the same conversion matrices, theta^T. The question is
          reversed: how similar are A and B, made by one theta from different W0? The control is
          untrained thetas.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from condlora import adapted_layers, convert, load_adapter
from data import checkpoint, peft_format, pretrained
from data.command import check_outputs, one_line, parser_of, reading, write
from data.picture import maps

DRAWS = 100  # of each random baseline


# The formulas ------------------------------------------------------------------------------------

def inverse_of(W0):
    """W0's inverse (..., d_in, d_out), condition number (...), and whether it is invertible (...).

    If W0 (..., d_out, d_in) is rectangular or singular, it is the pseudo-inverse: the smallest
    least-squares solution.
    """
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    rounding = max(W0.shape[-2:]) * torch.finfo(W0.dtype).eps
    is_kept = S > S[..., :1] * rounding
    inverse = Vh.mT @ (torch.where(is_kept, 1 / S, 0.0)[..., None] * U.mT)
    is_square = W0.shape[-2] == W0.shape[-1]
    return inverse, S[..., 0] / S[..., -1], is_kept.all(-1) & is_square


def conversion_matrices(W0, A, B, inverse=None):
    """{"A": C_A (d, r), "B": C_B (d, r), "BA": C_BA (d, d)}, float64, of one layer or of a stack.

    For W0 (d_out, d_in), A (r, d_in), B (d_out, r):  W0 C_A = A^T,  W0 C_B = B,  W0 C_BA = B A,
    by least squares if W0 is not invertible.
    CondLoRA reads A from the columns of a rectangular W0: there W0^T C_A = A^T, C_A (d_out, r).
    `inverse` is W0's, for callers that have it.
    """
    W0, A, B = (torch.as_tensor(x).double() for x in (W0, A, B))
    if inverse is None:
        inverse, _, _ = inverse_of(W0)
    square = W0.shape[-2] == W0.shape[-1]
    C_A = (inverse if square else inverse.mT) @ A.mT
    C_B = inverse @ B
    return {"A": C_A, "B": C_B, "BA": C_B @ A}


def subspace_similarity(X, Y, i, j, side="left"):
    """phi(X, Y, i, j), from 0 to 1, of two matrices (Hu et al. 2022, equation 4).

    The share of the span of X's first i singular vectors that lies in that of Y's first j, or, if
    i > j, the other way round. side: "left" or "right" singular vectors. Raises ValueError if X or
    Y has no i-th or j-th singular vector, or if their vectors differ in length.
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

class Target(NamedTuple):
    """The L adapted layers of one name ("query"), as stacks in float64."""

    numbers: list  # of the layers in the encoder, as text: "0", "1", ...
    W0: torch.Tensor  # (L, d_out, d_in)
    A: torch.Tensor  # (L, r, d_in)
    B: torch.Tensor  # (L, d_out, r)
    scale: float
    thetas: tuple  # CondLoRA's (theta_A, theta_B), the same in all layers; () in LoRA
    inverse: torch.Tensor  # of W0 (L, d_in, d_out)
    condition: torch.Tensor  # W0's condition numbers (L,)
    is_exact: torch.Tensor  # False where `inverse` is a pseudo-inverse (L,)

    @property
    def factors(self):
        return {"A": self.A.mT, "B": self.B}  # (L, d, r) both

    @property
    def conversions(self):
        C = conversion_matrices(self.W0, self.A, self.B, self.inverse)
        return {"A": C["A"], "B": C["B"]}

    @property
    def compared(self):
        """What the main table compares: LoRA's conversion matrices, or CondLoRA's A^T and B."""
        return self.factors if self.thetas else self.conversions

    def untrained(self, rng):
        """The same layers with new factors; CondLoRA's come from one new pair of thetas.

        A is uniform, as adapt has it; B is Gaussian, since zero spans nothing.
        """
        first, second = (x.shape for x in self.thetas or (self.A, self.B))  # what is trained
        bound, device = 1 / math.sqrt(first[-1]), self.A.device
        A = torch.empty(first, dtype=torch.float64).uniform_(-bound, bound, generator=rng)
        A, B = A.to(device), gaussian(second, rng, device)
        if self.thetas:  # A and B are thetas so far
            A, B = convert(self.W0, A, B)
        return self._replace(A=A, B=B)


def gaussian(shape, rng, device):
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(device)


# The figures -------------------------------------------------------------------------------------

def similarity_maps(matrices, A, i, j, side):
    """{"A", "B", "BA": phi of every pair of layers, (L, L)}, where BA is matrices["B"] @ A.

    A map is left out if i or j is its vectors' length, so that phi is always 1; and BA's if it is
    B's again, since all of BA's left singular vectors span what B's do.
    """
    left, S, right = thin_svd(matrices["B"], A)
    vectors = {name: singular_vectors(matrices[name], side) for name in "AB"}
    if not (side == "left" and i == j == S.shape[-1]):
        vectors["BA"] = left if side == "left" else right
    return {name: phi(X[:, None], X[None], i, j) for name, X in vectors.items()
            if max(i, j) < X.shape[-2]}


def similarity(target, i, j, side):
    """{"A", "B", "BA": a row}: a dict of phi's mean over pairs of layers, and its baselines.

    trained     of target.compared; "map" has every pair of layers
    control     (mean, sd) of untrained factors through the same W0; "control_map" their mean
    random      (mean, sd) of Gaussian matrices of these shapes; of a product of two for BA
    z           of trained, in sd of the control
    raw         of A^T, B and B A themselves; raw_random, raw_z: as above, against Gaussian ones

    Raises ValueError if no row is left.
    """
    rng, device = torch.Generator().manual_seed(0), target.W0.device

    def maps_of(matrices, A):
        return similarity_maps(matrices, A, i, j, side)

    def noise(matrices):  # Gaussian matrices of these shapes
        return {name: gaussian(x.shape, rng, device) for name, x in matrices.items()}

    compared, factors = target.compared, target.factors
    trained, raw = maps_of(compared, target.A), maps_of(factors, target.A)
    names = [name for name in trained if name in raw]
    if not names:
        raise ValueError(f"with --i {i} --j {j}, all directions, phi is 1 by definition: use less")
    draws = {"control": [], "random": [], "raw_random": []}  # of maps_of
    for _ in tqdm(range(DRAWS), "drawing baselines", leave=False, delay=1, disable=None):
        control = target.untrained(rng)
        draws["control"].append(maps_of(control.compared, control.A))
        A = gaussian(target.A.shape, rng, device)
        draws["random"].append(maps_of(noise(compared), A))
        draws["raw_random"].append(maps_of(noise(factors), A))
    rows = {}
    for name in names:
        row = {"trained": mean_of_pairs(trained[name]), "raw": mean_of_pairs(raw[name])}
        for kind, drawn in draws.items():
            row[kind] = mean_and_deviation(mean_of_pairs(phis[name]) for phis in drawn)
        row["z"] = z_score(row["trained"], row["control"])
        row["raw_z"] = z_score(row["raw"], row["raw_random"])
        row["map"] = trained[name].tolist()
        row["control_map"] = torch.stack([phis[name] for phis in draws["control"]]).mean(0).tolist()
        rows[name] = row
    return rows


def mean_of_pairs(square):
    """Mean over pairs of different layers of an (L, L) matrix."""
    L = len(square)
    return ((square.sum() - square.trace()) / (L * (L - 1))).item()


def mean_and_deviation(values):
    values = torch.tensor(list(values), dtype=torch.float64)
    return values.mean().item(), values.std().item()


def z_score(value, baseline):
    mean, deviation = baseline
    # If all layers share one W0 (ALBERT), CondLoRA's phi is 1 and its deviation is rounding.
    return (value - mean) / deviation if deviation > 1e-9 else 0.0


def comparison(one, two, i, j):
    """{matrix: phi between two adapters' layers, mean over layers, and its baselines}.

    The control is untrained factors, drawn separately for each side. Of A the right singular
    vectors are compared, which are A^T's left ones; of the others the left.
    """
    rng = torch.Generator().manual_seed(2)
    matrices_of = lambda target: target.factors | {
        f"C_{name}": C for name, C in target.conversions.items()}

    def mean_phi(X, Y):  # (L, d, r) both
        return phi(singular_vectors(X, "left"), singular_vectors(Y, "left"), i, j).mean().item()

    matrices, others = matrices_of(one), matrices_of(two)
    controls = [[matrices_of(target.untrained(rng)) for target in (one, two)]
                for _ in range(DRAWS)]
    rows = {}
    for name, X in matrices.items():
        pairs = (gaussian((2, *X.shape), rng, X.device) for _ in range(DRAWS))  # (2, L, d, r)
        rows[name] = {
            "phi": mean_phi(X, others[name]),
            "control": mean_and_deviation(mean_phi(x[name], y[name]) for x, y in controls),
            "random": mean_and_deviation(mean_phi(*pair) for pair in pairs)}
    return rows


def amplification(target):
    """{"own", "random": one factor per layer}: ||dW|| / ||U^T W0 V|| (Hu et al. 2022, section 7.3).

    U and V are dW's own singular vectors, or random ones. A large factor along its own says that dW
    adds what W0 has little of.
    """
    rng = torch.Generator().manual_seed(1)
    U, S, V = thin_svd(target.scale * target.B, target.A)
    along = lambda U, V: (U.mT @ target.W0 @ V).flatten(1).norm(dim=1)
    L, d_out, d_in = target.W0.shape
    basis = lambda d: torch.linalg.qr(gaussian((L, d, S.shape[1]), rng, S.device))[0]
    random = sum(along(basis(d_out), basis(d_in)) for _ in range(DRAWS)) / DRAWS
    return {"own": (S.norm(dim=1) / along(U, V)).nan_to_num().tolist(),
            "random": (S.norm(dim=1) / random).nan_to_num().tolist()}


def theta_deviation(target):
    """Largest deviation of a conversion matrix from theta^T, relative to theta's largest entry."""
    C = target.conversions
    return max(((C[name] - theta.T).abs().max() / theta.abs().max()).item()
               for name, theta in zip("AB", target.thetas))


def analyze(targets, others, i, j, side):
    """Every number that is printed, as JSON takes it: tables by target, and the verdict."""
    result = {"layers": next(iter(targets.values())).numbers}
    for name, target in targets.items():
        # Infinity, a singular W0's, is not JSON: the largest number stands for it.
        tables = {"condition": target.condition.nan_to_num().tolist(),
                  "least_squares": [number for number, is_exact
                                    in zip(target.numbers, target.is_exact) if not is_exact],
                  "similarity": similarity(target, i, j, side),
                  "amplification": amplification(target)}
        if target.thetas:
            tables["theta"] = theta_deviation(target)
        if others:
            tables["compare"] = comparison(target, others[name], i, j)
        for table, value in tables.items():
            result.setdefault(table, {})[name] = value
    result["verdict"] = verdict(result["similarity"], "theta" in result)
    return result


# What is shown -----------------------------------------------------------------------------------

def flat(table):
    """[("query A", row), ...] of {"query": {"A": row}}."""
    return [(f"{target} {name}", row) for target, rows in table.items()
            for name, row in rows.items()]


def verdict(table, is_condlora):
    """What training makes similar and what it does not: sentences, the finding first."""
    names = lambda holds: ", ".join(name for name, row in flat(table) if holds(row))
    # phi is about 1 if CondLoRA's adapter was exported to PEFT and is read back as LoRA.
    is_same = lambda row: not is_condlora and row["trained"] > 0.99 and row["z"] > 3
    same, shared = names(is_same), names(lambda row: row["raw"] > 0.99 and row["raw_z"] > 3)
    more = names(lambda row: row["z"] > 3 and not is_same(row))
    less = names(lambda row: row["z"] < -3)
    raw = names(lambda row: row["raw_z"] > 3 and row["raw"] <= 0.99)
    sentences = [
        (same, f"All layers have the same conversion matrices, by construction: {same}."),
        (same, "That is how CondLoRA makes A and B, not something training found."),
        (more, f"Beyond the control by more than 3 sd: {more}."),
        (more, "No other row exceeds its control by 3 sd."),
        (not (same or more),
         "No row exceeds its control by 3 sd: no similarity beyond what W0 produces."),
        (less, f"Less similar than the control by more than 3 sd: {less}."),
        (shared, f"All layers share one factor, by construction: {shared}."),
        (raw and not is_condlora,
         f"A and B themselves, without W0^-1, exceed random by more than 3 sd in: {raw}."),
        (not (raw or shared or is_condlora),
         "A and B themselves, without W0^-1, exceed random in no row by 3 sd."),
    ]
    return [sentence for holds, sentence in sentences if holds]


def print_tables(result, file, compared_file, verbose):
    for name, row in result["condition"].items():
        print(f"condition number of W0, {name}: {min(row):.1e} to {max(row):.1e}")
    inexact = [name for name, layers in result["least_squares"].items() if layers]
    if inexact:
        print(f"rectangular or singular, so by least squares: {', '.join(inexact)}")
    for name, deviation in result.get("theta", {}).items():
        if name not in inexact:
            print(f"{name}: every layer's conversion matrices are theta^T, to {deviation:.0e}")
    print()
    if "compare" in result:
        print(f"Similarity of {file} to {compared_file}, layer by layer\n(mean φ of left "
              f"singular vectors)")
        show(["", "between the two", "control (untrained)", "random"],
             [[name, f"{row['phi']:.4f}", plus_minus(row["control"]), plus_minus(row["random"])]
              for name, row in flat(result["compare"])])
    is_condlora = "theta" in result
    what = "A and B, made by one pair of thetas" if is_condlora else "conversion matrices"
    print(f"Subspace similarity φ between layers of {what},\nmean over pairs of layers: "
          f"0 orthogonal, 1 identical; unrelated ones as in the column 'random'")
    header = "", "trained", "control (untrained)", "z-score", "random", "φ of A and B", "z-score"
    rows = [[name, f"{row['trained']:.4f}", plus_minus(row["control"]), f"{row['z']:+.1f} sd",
             plus_minus(row["random"]), f"{row['raw']:.4f}", f"{row['raw_z']:+.1f} sd"]
            for name, row in flat(result["similarity"])]
    columns = 5 if is_condlora else 7  # of CondLoRA, A and B are what is compared already
    show(header[:columns], [row[:columns] for row in rows])
    print("\n".join(result["verdict"]) + "\n")
    if verbose:
        print("Each layer's condition number, and its amplification |dW| / |U^T W0 V|: dW's norm "
              "over that\nof W0's part along dW's own directions U, V, or along random ones")
        show(["layer", "condition", "own directions", "random directions"],
             [[f"{name} {number}", f"{condition:.1e}", f"{own:.3g}", f"{random:.3g}"]
              for name, row in result["amplification"].items()
              for number, condition, own, random
              in zip(result["layers"], result["condition"][name], row["own"], row["random"])])


def show(header, rows):
    """Print a table, its columns as wide as they need."""
    rows = [header, *rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    print()


def plus_minus(pair):
    return f"{pair[0]:.4f} ± {pair[1]:.4f}"


# Checkpoints and the command line ----------------------------------------------------------------

def read(file, init_from, device):
    """(task, method, {name: Target}) of a checkpoint, or of a folder that PEFT wrote."""
    with reading(file):
        if file.is_dir():
            if not init_from:
                raise ValueError("say where the encoder of PEFT's adapter is with --init_from")
            task, model = file.resolve().name, peft_format.read(file, pretrained.load(init_from))
        else:
            ckpt = checkpoint.load(file)
            task, method = ckpt["task"], ckpt["settings"]["method"]
            if method not in ("lora", "condlora"):
                raise ValueError(f"--method {method:.20} has no analysis: train lora or condlora")
            folder = checkpoint.verified_encoder(ckpt, init_from)
            model = load_adapter(pretrained.load(folder, len(ckpt["classes"]) or 1), file)
        groups = {}  # {"query": {"layers.0.attention.query": layer, ...}, ...}
        for name, layer in adapted_layers(model.double()).items():
            if name.startswith("layers."):  # a PEFT adapter's head has no second layer to compare
                groups.setdefault(name.rpartition(".")[2], {})[name] = layer
        bar = tqdm(groups.items(), "inverting W0", leave=False, delay=1, disable=None)
        targets = {name: stacked(layers, device) for name, layers in bar}
        numbers = {tuple(target.numbers) for target in targets.values()}
        if len(numbers) != 1 or len(numbers.pop()) < 2:
            raise ValueError(f"each target must be adapted in the same layers, at least two; here "
                             f"it is {describe(targets) or 'none'}")
    return task, layer.settings["method"], targets  # any layer's


def stacked(layers, device):
    """The Target of {name: adapted layer}, of one name in different layers of the encoder."""
    def stack(what, matrices):
        for name, x in zip(layers, matrices):
            if not x.isfinite().all() or not x.any():
                raise ValueError(f"the {what} of {name} is zero, as before training, or not finite")
        return torch.stack(matrices).double().to(device)

    every = list(layers.values())
    W0 = stack("W0", [layer.weight for layer in every])
    factors = [layer.factors() for layer in every]
    A, B = (stack("AB"[k], [pair[k] for pair in factors]) for k in (0, 1))
    conversion, *others = {getattr(layer, "conversion", None) for layer in every}
    if others:
        raise ValueError(f"{', '.join(layers):.100} have different thetas: name them by one target")
    thetas = (conversion.theta_A, conversion.theta_B) if conversion else ()
    return Target([name.split(".")[1] for name in layers], W0, A, B, every[0].scale,
                  tuple(theta.double().to(device) for theta in thetas), *inverse_of(W0))


def run(argv):
    args = make_parser().parse_args(argv)
    file = args.checkpoint
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint {file}: python train.py writes one")
    svg = args.svg or (Path(f"{file.resolve()}.svg") if file.is_dir() else file.with_suffix(".svg"))
    check_outputs({"--svg": (svg, b'<svg id="condlora"'), "--json": (args.json, b'"checkpoint"')})
    task, method, targets = read(file, args.init_from, args.device)
    others = None
    if args.compare:
        _, _, others = read(args.compare, args.init_from, args.device)
        if describe(targets) != describe(others):
            raise ValueError(f"{file} and {args.compare} are of different shapes: "
                             f"{describe(targets)}, and {describe(others)}")
    rank = min(target.A.shape[1] for target in targets.values())
    i, j = (rank if k is None else k for k in (args.i, args.j))
    if not (1 <= i <= rank and 1 <= j <= rank):
        raise ValueError(f"--i {i} --j {j}: both must be from 1 to the rank, {rank}")
    result = analyze(targets, others, i, j, args.side)
    title = f"{Path(task).name}, {method} rank {rank}, i = {i}, j = {j}, {args.side} vectors"
    write(svg, maps(result["verdict"][0], title, result["similarity"], result["layers"]).encode())
    if args.json:
        settings = {"checkpoint": str(file), "task": task, "method": method, "i": i, "j": j,
                    "side": args.side}
        write(args.json, (json.dumps(settings | result, indent=1) + "\n").encode())
    print(title + "\n")
    print_tables(result, file, args.compare, args.verbose)
    print(f"picture: {svg}")


def describe(targets):
    return ", ".join(f"{name} of layers {' '.join(target.numbers)}, "
                     f"{'x'.join(map(str, target.W0.shape[1:]))} rank {target.A.shape[1]}"
                     for name, target in targets.items())


def make_parser():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint of train.py --method lora or condlora, or a "
        "folder with a LoRA adapter that PEFT wrote")
    add("--i", type=int, help="how many singular vectors of the first matrix; default: the rank")
    add("--j", type=int, help="the same for the second matrix; default: the rank")
    add("--side", choices=("left", "right"), default="left",
        help="singular vectors of the main table's matrices; default: left")
    add("--compare", type=Path, metavar="CKPT", help="a second checkpoint, of the same shape")
    add("--verbose", action="store_true", help="also show each layer's numbers")
    add("--json", type=Path, help="write every number to this file")
    add("--svg", type=Path, help="where the picture goes; default: next to the checkpoint")
    add("--init_from", help="folder of the encoder, if it has moved; needed with a PEFT folder")
    add("--device", default="cpu", choices=["cpu"] + ["cuda"] * torch.cuda.is_available(),
        help="cpu (the default) or cuda; in float64 either way")
    return parser


def main(argv=None):
    with one_line("analyze.py"), torch.no_grad():
        run(argv)


if __name__ == "__main__":
    main()
