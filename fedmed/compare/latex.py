"""Tables of a comparison for LaTeX: one `tabular` per setting with the lines of the package booktabs, from `comparison.json`."""

from __future__ import annotations

import re

from fedmed.compare.tables import DASH, DOWN, TIED, Comparison, arm_table, origin

# What LaTeX reads as a command, and signs that not every font encoding has.
_ESCAPED = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "±": r"$\pm$", DASH: "--", DOWN: r"$\downarrow$", TIED: r"$^\dagger$", "Δ": r"$\Delta$",
}  # fmt: skip


def escape(text: str) -> str:
    """Give text as LaTeX shows it, sign by sign."""
    return "".join(_ESCAPED.get(sign, sign) for sign in text)


def latex(comparison: Comparison) -> str:
    """One `tabular` per setting, arms by metrics: the best bold, the tied with a dagger.

    Above each stand comments for its caption: the title, what the signs mean, and what made it. Needs `\\usepackage{booktabs}`.
    """
    parts = [r"% needs \usepackage{booktabs}"]
    for setting in comparison["settings"]:
        table = arm_table(comparison, setting["name"], _mark, "bold")
        remarks = [f"{comparison['name']}: {setting['title']}", table.note, origin(comparison, "")]
        rows = [" & ".join([escape(row[0]), *row[1:]]) + r" \\" for row in table.rows]
        parts.append(
            "\n".join(
                [
                    *("% " + " ".join(remark.split()) for remark in remarks if remark),
                    rf"\begin{{tabular}}{{l{'c' * (len(table.header) - 1)}}}",
                    r"\toprule",
                    " & ".join(map(escape, table.header)) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _mark(text: str, best: bool, tied: bool) -> str:
    """A number whose minus is one, bold where it is best, with a dagger where it is tied."""
    shown = re.sub(r"(?<!-)-(?=\d)", "$-$", escape(text))
    return rf"\textbf{{{shown}}}" if best else rf"{shown}{escape(TIED)}" if tied else shown
