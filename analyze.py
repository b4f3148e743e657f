"""Are the matrices that turn W0 into A, B and BA similar across layers?

    python analyze.py ckpt.pt                        # tables; the picture goes to ckpt.svg
    python analyze.py ckpt.pt --compare other.pt     # LoRA and CondLoRA, or two seeds
    python analyze.py FOLDER --init_from ENCODER     # a LoRA adapter that PEFT wrote

Each layer has the conversion matrices  C_A = W0^-1 A^T,  C_B = W0^-1 B,  C_BA = W0^-1 B A  (Kim et
al. 2024, arXiv:2403.14946, section 3). Those of two layers are compared by the subspace similarity
phi of the LoRA paper (Hu et al. 2022, arXiv:2106.09685, section 7.2): 0 for orthogonal subspaces, 1
if one contains the other.

In CondLoRA C_A and C_B are the same in every layer: C_A = W0^-1 W0 theta_A^T = theta_A^T (if W0 is
invertible). There the question is how similar the A and B are that thetas make from different W0.

            compared          control, which the paper lacks: what the W0 do by themselves
LoRA        C_A, C_B, C_BA    untrained A and B, through the same W0^-1
CondLoRA    A, B, B A         A and B of untrained thetas
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

    If W0 (..., d_out, d_in) is rectangular or singular, it is the pseudo-inverse, which gives the
    least-squares solution of smallest norm.
    """
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    tolerance = max(W0.shape[-2:]) * torch.finfo(W0.dtype).eps
    is_kept = S > S[..., :1] * tolerance
    inverse = Vh.mT @ (torch.where(is_kept, 1 / S, 0.0)[..., None] * U.mT)  # V S^-1 U^T
    is_square = W0.shape[-2] == W0.shape[-1]
    return inverse, S[..., 0] / S[..., -1], is_kept.all(-1) & is_square


def conversion_matrices(W0, A, B, inverse=None):
    """{"A": C_A (d, r), "B": C_B (d, r), "BA": C_BA (d, d)}, float64, of one layer or of a stack.

    For W0 (d_out, d_in), A (r, d_in), B (d_out, r):  W0 C_A = A^T,  W0 C_B = B,  W0 C_BA = B A,
    by least squares if W0 is not invertible. For a rectangular W0, condlora.convert has W0^T in A:
    there W0^T C_A = A^T, C_A (d_out, r). `inverse` is W0's, for callers that have it.
    """
    W0, A, B = (torch.as_tensor(x).double() for x in (W0, A, B))
    if inverse is None:
        inverse, _, _ = inverse_of(W0)
    C_A = (inverse if W0.shape[-2] == W0.shape[-1] else inverse.mT) @ A.mT
    C_B = inverse @ B
    return {"A": C_A, "B": C_B, "BA": C_B @ A}


def subspace_similarity(X, Y, i, j, side="left"):
    """phi(X, Y, i, j), from 0 to 1, of two matrices (Hu et al. 2022, equation 4); tables use `phi`.

    The share of the span of X's first i singular vectors that lies in that of Y's first j, or, if
    i > j, the other way round. side: "left" or "right" singular vectors. Raises ValueError if X or
    Y has no i-th or j-th singular vector, if their vectors' lengths differ, or for another side.
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
    V, T = torch.linalg.qr(Q.mT)  # Q = T^T V^T, so that P Q = U (R T^T) V^T
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
    def factors(self):  # {"A": A^T, "B": B}, (L, d, r) both
        return {"A": self.A.mT, "B": self.B}

    @property
    def conversions(self):  # {"A": C_A, "B": C_B}, (L, d, r) both
        C = conversion_matrices(self.W0, self.A, self.B, self.inverse)
        return {"A": C["A"], "B": C["B"]}

    @property
    def compared(self):
        """What the main table compares: LoRA's conversion matrices, or CondLoRA's A^T and B."""
        return self.factors if self.thetas else self.conversions

    @property
    def matrices(self):  # all four: {"A", "B", "C_A", "C_B"}
        return self.factors | {f"C_{name}": C for name, C in self.conversions.items()}

    def untrained(self, rng):
        """The same layers with new A and B, or in CondLoRA with those that new thetas make."""
        if self.thetas:
            thetas = new_factors(*self.thetas, rng)
            A, B = convert(self.W0, *thetas)
        else:
            thetas, (A, B) = (), new_factors(self.A, self.B, rng)
        return self._replace(A=A, B=B, thetas=thetas)


def new_factors(A, B, rng):
    """New A and B, or thetas: A as adapt draws it, B Gaussian, since adapt's zeros span nothing."""
    bound = 1 / math.sqrt(A.shape[-1])  # kaiming_uniform_'s with a = sqrt(5)
    new_A = torch.empty(A.shape, dtype=torch.float64).uniform_(-bound, bound, generator=rng)
    return new_A.to(A.device), gaussian(B.shape, rng, B.device)


def gaussian(shape, rng, device):
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(device)


# The figures -------------------------------------------------------------------------------------

def similarity_maps(matrices, A, i, j, side):
    """{"A", "B", "BA": phi of every pair of layers, (L, L)}, less the maps that say nothing.

    matrices is {"A": A^T, "B": B} or {"A": C_A, "B": C_B}; BA is B A, or C_BA = C_B A.

    By default only A and B remain: with i = j = r, BA's left vectors span what B's do.
    """
    vectors = {name: singular_vectors(matrices[name], side) for name in "AB"}
    left, S, right = thin_svd(matrices["B"], A)
    if side == "right" or not i == j == S.shape[-1]:
        vectors["BA"] = left if side == "left" else right
    # phi is 1 if i or j is the vectors' length, as of the r right vectors of A and B.
    return {name: phi(X[:, None], X[None], i, j)  # (L, 1, ...) and (1, L, ...) give (L, L)
            for name, X in vectors.items() if max(i, j) < X.shape[-2]}


def similarity(target, i, j, side):
    """{"A", "B", "BA": a row}, a row a dict. Its phis are means over pairs of layers:

    trained              of what is compared
    control              the same with untrained factors: (mean, sd) of many draws
    random               Gaussian matrices of the same shapes, for BA two multiplied: (mean, sd)
    z                    the z-score of trained against control
    raw                  of A^T, B and B A themselves, which in CondLoRA are what is compared
    raw_random, raw_z    Gaussian matrices of their shapes: (mean, sd); raw's z-score against it
    map, control_map     trained, and the control's mean, of every pair of layers: (L, L)
    """
    compared, factors = target.compared, target.factors
    maps_of = lambda matrices, A: similarity_maps(matrices, A, i, j, side)
    trained, raw = maps_of(compared, target.A), maps_of(factors, target.A)
    names = [name for name in trained if name in raw]  # C_A and A^T may differ in length
    if not names:
        raise ValueError(f"with --i {i} --j {j}, all directions, phi is 1 by definition: use less")
    drawn = {"control": [], "random": [], "raw_random": []}  # maps
    rng = torch.Generator().manual_seed(0)
    noise = lambda x: gaussian(x.shape, rng, x.device)
    for _ in tqdm(range(DRAWS), "drawing baselines", leave=False, delay=1, disable=None):
        control = target.untrained(rng)
        drawn["control"].append(maps_of(control.compared, control.A))
        A = noise(target.A)  # for BA
        for kind, matrices in (("random", compared), ("raw_random", factors)):
            drawn[kind].append(maps_of({name: noise(x) for name, x in matrices.items()}, A))
    rows = {}
    for name in names:
        row = {"trained": mean_of_pairs(trained[name]), "raw": mean_of_pairs(raw[name])}
        for kind, many in drawn.items():
            row[kind] = mean_and_deviation([mean_of_pairs(phis[name]) for phis in many])
        row["z"] = z_score(row["trained"], row["control"])
        row["raw_z"] = z_score(row["raw"], row["raw_random"])
        row["map"] = trained[name].tolist()
        row["control_map"] = torch.stack([phis[name] for phis in drawn["control"]]).mean(0).tolist()
        rows[name] = row
    return rows


def mean_of_pairs(square):
    """Mean over pairs of different layers of an (L, L) matrix."""
    L = len(square)
    return ((square.sum() - square.trace()) / (L * (L - 1))).item()


def mean_and_deviation(values):
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item()


def z_score(value, baseline):
    mean, deviation = baseline
    # If all layers have the same W0, CondLoRA's phi is 1, and its deviation is rounding.
    return (value - mean) / deviation if deviation > 1e-9 else 0.0


def comparison(one, two, i, j):
    """{"A", "B", "C_A", "C_B": a row} of phi of one adapter and the other, mean over layers.

    "control" is (mean, sd) of untrained factors, drawn for each adapter, "random" of Gaussian ones.
    """
    rng = torch.Generator().manual_seed(2)

    def mean_phi(X, Y):  # (L, d, r) both
        return phi(singular_vectors(X, "left"), singular_vectors(Y, "left"), i, j).mean().item()

    control = {name: [] for name in one.matrices}
    for _ in range(DRAWS):
        x, y = one.untrained(rng).matrices, two.untrained(rng).matrices
        for name, phis in control.items():
            phis.append(mean_phi(x[name], y[name]))
    rows = {}
    for name, X in one.matrices.items():
        random = [mean_phi(*gaussian((2, *X.shape), rng, X.device)) for _ in range(DRAWS)]
        rows[name] = {"phi": mean_phi(X, two.matrices[name]), "random": mean_and_deviation(random),
                      "control": mean_and_deviation(control[name])}
    return rows


def amplification(target):
    """{"own", "random": one factor per layer}: ||dW|| / ||U^T W0 V|| (Hu et al. 2022, section 7.3).

    U and V are dW's own singular vectors, or random ones (then ||U^T W0 V|| is a mean). A large
    factor along its own says that dW adds what W0 has little of. The norms are Frobenius's.
    """
    rng = torch.Generator().manual_seed(1)
    U_dW, S, V_dW = thin_svd(target.scale * target.B, target.A)
    L, d_out, d_in = target.W0.shape

    def norm_along(U, V):  # (L,)
        return (U.mT @ target.W0 @ V).flatten(1).norm(dim=1)

    def random_basis(d):  # (L, d, r)
        return torch.linalg.qr(gaussian((L, d, S.shape[1]), rng, S.device))[0]

    random = sum(norm_along(random_basis(d_out), random_basis(d_in)) for _ in range(DRAWS)) / DRAWS
    return {"own": (S.norm(dim=1) / norm_along(U_dW, V_dW)).nan_to_num().tolist(),
            "random": (S.norm(dim=1) / random).nan_to_num().tolist()}


def theta_deviation(target):
    """How far C_A and C_B are from theta^T, relative to its largest entry (invertible W0)."""
    C = target.conversions
    return max(((C[name] - theta.T).abs().max() / theta.abs().max()).item()
               for name, theta in zip("AB", target.thetas))


def analyze(targets, others, i, j, side):
    """Every number that is printed, as JSON takes it: {"similarity": {"query": ...}, ...}"""
    result = {"layers": next(iter(targets.values())).numbers}
    for name, target in targets.items():
        # A singular W0's is infinity, which JSON lacks: the largest number stands for it.
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
            result.setdefault(table, {})[name] = value  # by table first, then by target
    result["verdict"] = verdict(result["similarity"], "theta" in result)
    return result


# What is shown -----------------------------------------------------------------------------------

def flat(table):
    """[("query A", row), ...] of {"query": {"A": row}}."""
    return [(f"{target} {name}", row) for target, rows in table.items()
            for name, row in rows.items()]


def verdict(table, is_condlora):
    """What training makes similar and what it does not: sentences, the finding first."""
    rows = dict(flat(table))
    more = [name for name, row in rows.items() if row["z"] > 3]
    less = [name for name, row in rows.items() if row["z"] < -3]
    raw = [name for name, row in rows.items() if row["raw_z"] > 3]
    # A CondLoRA adapter exported to PEFT is read as LoRA. It has theta^T in every layer: phi is 1.
    same = [name for name in more if rows[name]["trained"] > 0.99 and not is_condlora]
    more = [name for name in more if name not in same]
    nothing = [] if same or more else ["no similarity beyond what W0 produces"]
    raw = [] if is_condlora else raw or ["nowhere"]
    findings = {
        "All layers have the same conversion matrices, as in CondLoRA by construction": same,
        "Beyond the control by more than 3 sd": more,
        "No row exceeds its control by 3 sd": nothing,
        "Less similar than the control by more than 3 sd": less,
        "Without W0^-1, A and B exceed random by more than 3 sd": raw,
    }
    return [f"{finding}: {', '.join(names)}." for finding, names in findings.items() if names]


def print_tables(result, file, compared_file, verbose):
    for name, row in result["condition"].items():
        print(f"condition number of W0, {name}: {min(row):.1e} to {max(row):.1e}")
    inexact = [name for name, layers in result["least_squares"].items() if layers]
    if inexact:
        print(f"rectangular or singular, so by least squares: {', '.join(inexact)}")
    for name, deviation in result.get("theta", {}).items():
        if name not in inexact:
            print(f"{name}: in every layer C_A and C_B are theta^T, to {deviation:.0e}")
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
    with reading(file):  # errors name it
        if file.is_dir():
            if not init_from:
                raise ValueError("say where the encoder of PEFT's adapter is with --init_from")
            task, method = file.resolve().name, "lora"
            model = peft_format.read(file, pretrained.load(pretrained.find(init_from)))
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
        targets = {name: stacked(layers, device) for name, layers in
                   tqdm(groups.items(), "inverting W0", leave=False, delay=1, disable=None)}
        numbers = [target.numbers for target in targets.values()]
        if not numbers or len(numbers[0]) < 2 or any(other != numbers[0] for other in numbers):
            raise ValueError(f"each target must be adapted in the same layers, at least two; here "
                             f"it is {describe(targets) or 'none'}")
    return task, method, targets


def stacked(layers, device):
    """The Target of {name: adapted layer}, of one name in different layers of the encoder."""
    def stack(what, matrices):
        for name, x in zip(layers, matrices):
            if not x.isfinite().all() or not x.any():
                raise ValueError(f"the {what} of {name} is zero, as before training, or not finite")
        return torch.stack(matrices).double().to(device)

    every = list(layers.values())
    conversion, *others = {getattr(layer, "conversion", None) for layer in every}  # None in LoRA
    if others:
        raise ValueError(f"{', '.join(layers):.100} have different thetas: name them by one target")
    thetas = (conversion.theta_A, conversion.theta_B) if conversion else ()
    W0 = stack("W0", [layer.weight for layer in every])
    inverse, condition, is_exact = inverse_of(W0)
    return Target(
        numbers=[name.split(".")[1] for name in layers], W0=W0,
        A=stack("A", [layer.factors()[0] for layer in every]),
        B=stack("B", [layer.factors()[1] for layer in every]), scale=every[0].scale,
        thetas=tuple(theta.double().to(device) for theta in thetas),
        inverse=inverse, condition=condition, is_exact=is_exact)


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
    add("--init_from", help="the encoder, a folder or a name under data/models, if it has moved; "
        "needed with a PEFT folder")
    add("--device", default="cpu", choices=["cpu"] + ["cuda"] * torch.cuda.is_available(),
        help="cpu (the default) or cuda; in float64 either way")
    return parser


def main(argv=None):
    with one_line("analyze.py"), torch.no_grad():
        run(argv)


if __name__ == "__main__":
    main()
