"""Pictures as SVG, which browsers show in their own light or dark colours."""

import math
from html import escape

VIRIDIS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
STYLE = """<style>.paper{fill:#ffffff} .ink{fill:#1f2328} .line{stroke:#8c959f}
@media (prefers-color-scheme: dark){.paper{fill:#0d1117} .ink{fill:#e6edf3}}</style>"""


def colour(value, low, high, scale=VIRIDIS):
    """The scale's colour for a value between low and high, as #rrggbb."""
    position = (len(scale) - 1) * min(max((value - low) / (high - low), 0.0), 1.0)
    index = min(int(position), len(scale) - 2)
    share = position - index
    mixed = [round(a + share * (b - a)) for a, b in zip(scale[index], scale[index + 1])]
    return "#%02x%02x%02x" % tuple(mixed)


class Picture:
    """Collects shapes; str() is the SVG. x runs right, y down, in pixels."""

    def __init__(self, width, height):
        self.parts = [
            f'<svg id="condlora" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
            f'role="img" font-family="system-ui, sans-serif">', STYLE,
            f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>']

    def text(self, x, y, words, size=12, anchor="start"):
        self.parts.append(f'<text class="ink" x="{x:.1f}" y="{y:.1f}" font-size="{size}" '
                          f'text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x, y, width, height, fill, title=""):
        """A rectangle; a browser shows the title under the mouse."""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                          f'height="{height:.1f}" fill="{fill}"><title>{escape(title)}</title>'
                          f"</rect>")

    def __str__(self):
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def maps(headline, title, table, numbers):
    """φ of every pair of layers, a map for each matrix: trained above the diagonal, control below.

    table: {target: {matrix: {"map", "control_map": (L, L) lists, "random": (mean, deviation)}}};
    numbers: the layers'. If training adds nothing, a map looks symmetric.
    """
    L, flat = len(numbers), [(f"{target} {name}", row, rows.values())
                             for target, rows in table.items() for name, row in rows.items()]
    columns = min(4, len(flat))
    cell = max(14, 168 // L)
    size = L * cell
    drawing = Picture(max(30 + columns * (size + 60), 820),
                      90 + math.ceil(len(flat) / columns) * (size + 100))
    drawing.text(16, 28, headline, 16)
    drawing.text(16, 50, f"{title}. \u03c6 of every pair of layers: above the diagonal trained, "
                         f"below it untrained", 12)
    for n, (name, row, same_target) in enumerate(flat):
        x, y = 40 + n % columns * (size + 60), 96 + n // columns * (size + 100)
        # One scale for a target's matrices, from the random baseline up.
        low = min(other["random"][0] for other in same_target)
        high = max([low + 1e-6] + [other[kind][a][b] for other in same_target for a in range(L)
                                   for b in range(L) for kind in ("map", "control_map") if a != b])
        drawing.text(x, y - 8, name, 14)
        for a in range(L):
            drawing.text(x - 5, y + (a + 0.7) * cell, numbers[a], 9, "end")
            drawing.text(x + (a + 0.5) * cell, y + size + 12, numbers[a], 9, "middle")
            for b in set(range(L)) - {a}:
                # The control is mirrored, so that the same two layers lie opposite each other.
                kind, value = (("trained", row["map"][a][b]) if a < b else
                               ("untrained", row["control_map"][b][a]))
                drawing.box(x + b * cell, y + a * cell, cell - 1, cell - 1,
                            colour(value, low, high),
                            f"{name}, layers {numbers[min(a, b)]} and {numbers[max(a, b)]}, "
                            f"{kind}: {value:.4f}")
        for step in range(size // 2):
            drawing.box(x + 2 * step, y + size + 24, 2.5, 10, colour(step, 0, size // 2 - 1))
        drawing.text(x, y + size + 48, f"{low:.3f} (random)", 11)
        drawing.text(x + size, y + size + 48, f"{high:.3f}", 11, "end")
    return str(drawing)
