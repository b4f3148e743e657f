"""Pictures as SVG, which browsers show in their own light or dark colours."""

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
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" role="img" '
            f'font-family="system-ui, sans-serif">', STYLE,
            f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>']

    def text(self, x, y, words, size=12, anchor="start"):
        self.parts.append(f'<text class="ink" x="{x:.1f}" y="{y:.1f}" font-size="{size}" '
                          f'text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x, y, width, height, fill, title=""):
        """A rectangle; a browser shows the title under the mouse."""
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                          f'height="{height:.1f}" fill="{fill}"><title>{escape(title)}</title>'
                          f"</rect>")

    def dot(self, x, y, colour, title="", filled=True):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="{colour}" '
                          f'fill="{colour if filled else "none"}"><title>{escape(title)}</title>'
                          f"</circle>")

    def line(self, points, colour=None, dashed=False, width=1):
        """A line through [(x, y), ...], in a quiet grey unless a colour is given."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        paint = f'stroke="{colour}"' if colour else 'class="line"'
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline fill="none" {paint} stroke-width="{width}"{dashes} '
                          f'points="{path}"/>')

    def legend(self, x, y, low, high, scale=VIRIDIS, length=168):
        """The scale, with words for its two ends."""
        for step in range(length // 2):
            self.box(x + 2 * step, y, 2.5, 10, colour(step, 0, length // 2 - 1, scale))
        self.text(x, y + 24, low, 11)
        self.text(x + length, y + 24, high, 11, "end")

    def __str__(self):
        return "\n".join([*self.parts, "</svg>"]) + "\n"
