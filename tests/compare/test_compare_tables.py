"""Tables of a comparison: Markdown and LaTeX to the letter, terminal, CSV and sentences, from a made-up comparison."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedmed.compare.latex import escape, latex
from fedmed.compare.tables import csv_rows, fixed, markdown, probability, sentence, spread, text


def result(setting: str, arm: str, metric: str, values: dict[str, float | None], **changed: Any) -> dict[str, Any]:
    """One entry of `results`; mean and sd are given, as the tables take them as they are."""
    basis = {"setting": setting, "arm": arm, "metric": metric, "values": values, "sites": {}, "mean": None, "sd": None}
    return {**basis, "best": False, "tied": False, "difference": None, **changed}


def gap(mean: float | None, low: float | None = None, high: float | None = None, **changed: Any) -> dict[str, Any]:
    """A difference over two seeds."""
    basis = {"mean": mean, "sd": None, "low": low, "high": high, "seeds": 2, "missing": 0, "p": None, "p_holm": None}
    return {**basis, "pairs": 2, "per": "seed", "wins": 1, "ties": 0, "losses": 1, **changed}


AT_SITES = {"pairs": 24, "per": "seed x site", "wins": 12, "ties": 2, "losses": 10}
NOTHING = gap(None, seeds=0, missing=1, pairs=0, wins=0, losses=0)
COMPARISON: dict[str, Any] = {
    "name": "noise", "variant": "small", "description": "Two arms.", "data": "skin_1.h5", "engine": "local", "baseline": "fedavg",
    "command": "fedmed compare noise", "metrics": ["bacc", "hd95"], "seed_metrics": ["bacc"], "versions": {"fedmed": "1", "torch": "2"},
    "settings": [{"name": "easy", "title": "Easy, 5 % noise"}, {"name": "told", "title": "Told"}],
    "cells": [{"state": "done"}, {"state": "done"}, {"state": "failed"}],
    "results": [
        result("easy", "fedavg", "bacc", {"0": 0.5, "1": 0.75}, mean=0.625, sd=0.1768, tied=True),
        result("easy", "fedavg", "hd95", {"0": 11.0, "1": None}, mean=11.0, best=True),
        result("easy", "my_arm", "bacc", {"0": 0.75, "1": 0.625}, mean=0.6875, sd=0.0884, best=True,
               sites={"0": {"a": 0.5, "b": None}}, difference=gap(0.0625, -2.3199, 2.4449, p_holm=0.0004, **AT_SITES)),
        result("easy", "my_arm", "hd95", {"0": 12.5, "1": 9.0}, mean=10.75, sd=2.4749,
               difference=gap(1.5, seeds=1, missing=1, pairs=1, wins=0, losses=1)),
        result("told", "fedavg", "bacc", {"0": 0.5}, mean=0.5, best=True),
        result("told", "fedavg", "hd95", {"0": 9.0}, mean=9.0, best=True),
        result("told", "my_arm", "bacc", {"0": None}, difference=NOTHING),
        result("told", "my_arm", "hd95", {"0": None}, difference=NOTHING),
    ],
    "win_tie_loss": [
        {"arm": "my_arm", "metric": "bacc", "wins": 0, "ties": 1, "losses": 0},
        {"arm": "my_arm", "metric": "hd95", "wins": 0, "ties": 1, "losses": 0},
    ],
    "findings": [
        {"setting": "easy", "arm": "my_arm", "seed": 0, "columns": ["recall"], "cells": ["0.50"]},
        {"setting": "easy", "arm": "my_arm", "seed": 1, "columns": ["recall"], "cells": ["–"]},
    ],
}  # fmt: skip

MARKDOWN = """## noise, small

Two arms.

### Easy, 5 % noise

| arm | bacc | hd95 ↓ |
| :-- | --: | --: |
| fedavg | 0.625 ± 0.177 † | **11.00 (1 of 2)** |
| my_arm | **0.688 ± 0.088** | 10.75 ± 2.475 |

Mean ± standard deviation over seeds; bold: best mean; †: the 95 % interval of the paired difference from the best contains 0; \
↓: small values are good.

| arm | metric | difference | 95 % interval | p (Holm) | pairs | better / equal / worse |
| :-- | --: | --: | --: | --: | --: | --: |
| my_arm | bacc | +0.062 | [-2.320, +2.445] | <0.001 | 24 seed x site | 12 / 2 / 10 |
| my_arm | hd95 ↓ | +1.500 (1 of 2) | – | – | 1 seed | 0 / 0 / 1 |

| seed | Δ bacc | recall |
| :-- | --: | --: |
| 0 | +0.250 | 0.50 |
| 1 | -0.125 | – |

### Told

| arm | bacc | hd95 ↓ |
| :-- | --: | --: |
| fedavg | **0.500** | **9.000** |
| my_arm | – | – |

Bold: best mean; ↓: small values are good.

| arm | metric | difference | 95 % interval | p (Holm) | pairs | better / equal / worse |
| :-- | --: | --: | --: | --: | --: | --: |
| my_arm | bacc | – | – | – | – | – |
| my_arm | hd95 ↓ | – | – | – | – | – |

| seed | Δ bacc |
| :-- | --: |
| 0 | – |

### Settings in which an arm is better / not shown to differ / worse than fedavg

| arm | bacc | hd95 ↓ |
| :-- | --: | --: |
| my_arm | 0 / 1 / 0 | 0 / 1 / 0 |

Differences are from fedavg, paired by seed, with the 95 % t-interval of their mean. p: Wilcoxon signed-rank test over the pairs, \
adjusted by Holm over the arms of a setting; sites of one seed share a model, so p over seed x site is too small rather than too large.

Made by `fedmed compare noise`: 2 of 3 runs; data skin_1.h5; engine local; fedmed 1, torch 2.
"""

LATEX = r"""% needs \usepackage{booktabs}

% noise: Easy, 5 % noise
% Mean ± standard deviation over seeds; bold: best mean; †: the 95 % interval of the paired difference from the best contains 0; ↓: small values are good.
% Made by fedmed compare noise: 2 of 3 runs; data skin_1.h5; engine local; fedmed 1, torch 2.
\begin{tabular}{lcc}
\toprule
arm & bacc & hd95 $\downarrow$ \\
\midrule
fedavg & 0.625 $\pm$ 0.177$^\dagger$ & \textbf{11.00 (1 of 2)} \\
my\_arm & \textbf{0.688 $\pm$ 0.088} & 10.75 $\pm$ 2.475 \\
\bottomrule
\end{tabular}

% noise: Told
% Bold: best mean; ↓: small values are good.
% Made by fedmed compare noise: 2 of 3 runs; data skin_1.h5; engine local; fedmed 1, torch 2.
\begin{tabular}{lcc}
\toprule
arm & bacc & hd95 $\downarrow$ \\
\midrule
fedavg & \textbf{0.500} & \textbf{9.000} \\
my\_arm & -- & -- \\
\bottomrule
\end{tabular}
"""


def test_markdown_to_the_letter() -> None:
    assert markdown(COMPARISON) == MARKDOWN
    assert markdown(json.loads(json.dumps(COMPARISON))) == MARKDOWN


def test_latex_to_the_letter() -> None:
    assert latex(COMPARISON) == LATEX


def test_latex_escapes_what_it_would_read_as_commands() -> None:
    assert escape(r"a_b%c&d#e$f{g}h~i^j\k") == (
        r"a\_b\%c\&d\#e\$f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k"
    )
    row = result("easy", "50%_{x}", "a&b", {"0": -0.5, "1": -0.5}, mean=-0.5, sd=0.0)
    comparison = {
        **COMPARISON,
        "metrics": ["a&b"],
        "results": [row],
        "settings": [{"name": "easy", "title": "two\nlines"}],
    }
    written = latex(comparison)
    assert r"arm & a\&b \\" in written and r"50\%\_\{x\} & $-$0.500 $\pm$ 0.000 \\" in written
    assert "% noise: two lines\n" in written


def test_terminal_text() -> None:
    lines = text(COMPARISON).splitlines()
    first = lines.index("Easy, 5 % noise")
    assert lines[:2] == ["noise, small", ""]
    assert lines[first + 2 : first + 6] == [
        "arm                bacc            hd95 ↓",
        "------  ---------------  ----------------",
        "fedavg  0.625 ± 0.177 †  11.00 (1 of 2) *",
        "my_arm  0.688 ± 0.088 *   10.75 ± 2.475",
    ]
    assert any(line.startswith("Mean ± standard deviation over seeds; *: best mean") for line in lines)
    assert "24 seed x site" in text(COMPARISON) and "**" not in text(COMPARISON)
    assert lines[-1].startswith("Made by fedmed compare noise: 2 of 3 runs")


def test_several_arms_are_named_by_seed_and_one_setting_needs_no_sum() -> None:
    other = result("easy", "other", "bacc", {"0": 0.5, "1": 0.5}, mean=0.5, sd=0.0, difference=gap(-0.125))
    other_hd95 = result("easy", "other", "hd95", {"0": None, "1": None}, difference=NOTHING)
    comparison = {
        **COMPARISON,
        "results": [*COMPARISON["results"][:4], other, other_hd95],
        "settings": COMPARISON["settings"][:1],
    }
    del comparison["seed_metrics"]
    shown = markdown(comparison)
    assert "| arm | seed | Δ bacc | Δ hd95 ↓ | recall |" in shown
    assert "| my_arm | 0 | +0.250 | +1.500 | 0.50 |" in shown and "| other | 0 | +0.000 | – | – |" in shown
    assert "Settings in which" not in shown


def test_an_arm_alone_has_no_difference_to_explain() -> None:
    comparison = {
        **COMPARISON, "results": COMPARISON["results"][:2], "settings": COMPARISON["settings"][:1], "findings": [],
        "win_tie_loss": [], "cells": [{"state": "done"}] * 2, "versions": {},
    }  # fmt: skip
    shown = markdown(comparison)
    assert shown.count("| arm |") == 1 and "Differences are" not in shown and "best mean" not in shown
    assert "**" not in shown and r"\textbf" not in latex(comparison)  # best of whom?
    assert shown.endswith("Made by `fedmed compare noise`: 2 runs; data skin_1.h5; engine local.\n")


def test_csv_is_one_long_table() -> None:
    rows = csv_rows(COMPARISON)
    assert all(list(row) == ["setting", "arm", "metric", "seed", "site", "value"] for row in rows)
    assert len(rows) == 8 + 2 + 4  # values of the runs, in two settings, and those of two sites
    mine = [
        (r["seed"], r["site"], r["value"])
        for r in rows
        if (r["setting"], r["arm"], r["metric"]) == ("easy", "my_arm", "bacc")
    ]
    assert mine == [("0", "", 0.75), ("0", "a", 0.5), ("0", "b", None), ("1", "", 0.625)]


@pytest.mark.parametrize(
    ("metric", "difference", "expected"),
    [
        ("bacc", gap(-0.03, -0.0921, 0.0323), "mine: bacc -.030 [-.092, +.032], no difference shown over 2 seeds"),
        ("bacc", gap(0.03, 0.01, 0.05), "mine: bacc +.030 [+.010, +.050], better over 2 seeds"),
        ("hd95", gap(12.5, 1.25, 23.75), "mine: hd95 +12.50 [+1.250, +23.75], worse over 2 seeds"),
        ("gap:auc", gap(-0.03, -0.05, -0.01), "mine: gap:auc -.030 [-.050, -.010], better over 2 seeds"),
        ("bacc", gap(0.25, seeds=1), "mine: bacc +.250, one seed shows no more than a direction"),
        ("bacc", NOTHING, "mine: bacc not compared: no seed has both values"),
        ("bacc", None, "mine: bacc 0.500, the baseline"),
    ],
)  # fmt: skip
def test_sentences(metric: str, difference: dict[str, Any] | None, expected: str) -> None:
    assert sentence(result("easy", "mine", metric, {"0": 0.5}, mean=0.5, difference=difference)) == expected


def test_numbers() -> None:
    assert [fixed(v) for v in (0.5, 9.9996, 12.345, -0.25, None, float("nan"))] == [
        "0.500",
        "10.00",
        "12.35",
        "-0.250",
        "–",
        "–",
    ]
    assert fixed(0.0, signed=True) == "+0.000" and [probability(p) for p in (None, 0.0004, 0.0005, 1.0)] == [
        "–",
        "<0.001",
        "0.001",
        "1.000",
    ]
    assert spread({"mean": 0.5, "sd": None, "values": {"0": 0.5, "1": None, "2": None}}) == "0.500 (1 of 3)"
    assert spread({"mean": None, "sd": None, "values": {"0": None}}) == "–"
