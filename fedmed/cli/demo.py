"""`fedmed demo`: two arms on synthetic sites whose contours are wrong, compared on a clean test set, with a report.

The settings are ordinary experiments (`demo_fedavg`, `demo_feda3i`); nothing here is special to them. What the arms do
not share is found by comparing their configurations and printed, so the table says what it compares.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmed.errors import UserError

ARMS = ("demo_fedavg", "demo_feda3i")

# Settings that may differ between arms without making the comparison unfair: what is compared, and what a result does
# not depend on.
_FREE = ("name", "description", "out", "strategy", "tracking")


def differences(first: Mapping[str, Any], second: Mapping[str, Any], where: str = "") -> list[str]:
    """Give "key: a | b" for each leaf in which two nested dicts differ, in the order of the keys."""
    found: list[str] = []
    for key in dict.fromkeys([*first, *second]):
        place = f"{where}.{key}" if where else str(key)
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, place)
        elif a != b:
            found.append(f"{place}: {a} | {b}")
    return found


def unshared(configs: Mapping[str, Any]) -> list[str]:
    """What the arms do not share beyond their server rule: the local half's name is listed, the rest should be empty
    for a fair comparison.
    """
    from fedmed.config import to_tree

    trees = {arm: {k: v for k, v in to_tree(config).items() if k not in _FREE} for arm, config in configs.items()}
    base, *others = trees
    return [
        f"{base} and {other} differ in {line}" for other in others for line in differences(trees[base], trees[other])
    ]


def report_text(
    table: str, sentence: str, remarks: Sequence[str], configs: Mapping[str, Any], drawn: Sequence[Path], out: Path
) -> str:
    """Give the Markdown of the comparison; paths relative to the report's folder."""
    first = next(iter(configs.values()))
    noise = f" with `{first.data.corruption.name}`" if first.data.corruption.name else ""
    parts = [
        "# Demo: " + " against ".join(configs),
        f"Data `{first.data.path}`{noise}, {first.federation.rounds} rounds, seed {first.seed}; last round's values. "
        "Data, loss, initial weights and data order are the same in all arms unless the list below says otherwise.",
        table,
        sentence,
        "\n".join(f"- {line}" for line in remarks),
        *(f"![{p.stem}]({p.relative_to(out).as_posix()})" for p in drawn),
        "\n".join(
            f"- `{arm}`: [report]({arm}/report.md), {config.description or 'no description'}"
            for arm, config in configs.items()
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_arms(
    configs: Mapping[str, Any], folder: Path, quiet: bool, note: Callable[[str], None], again: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the arms one after the other, each in its own folder; give summaries and histories."""
    from fedmed.cli.execute import run_config
    from fedmed.files import read_history
    from fedmed.report.run_folder import RunFolder
    from fedmed.report.write import write_report

    summaries: dict[str, Any] = {}
    histories: dict[str, Any] = {}
    for arm, config in configs.items():
        summary, path = run_config(config, folder / arm, resume=False, quiet=quiet, how_to_resume=again)
        # The remark on missing figures comes once, from the comparison.
        write_report(path, summary, lambda _: None)
        summaries[arm] = summary
        histories[arm] = read_history(RunFolder(path).history)
    return summaries, histories


def run_demo(
    arms: Sequence[str],
    overrides: Sequence[str],
    *,
    out: str | None,
    quiet: bool,
    say: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Run the arms (default `ARMS`; the first is the baseline), print the comparison and write `report.md` with a
    figure.

    `say` takes the result (stdout), `note` remarks (stderr). Raises `UserError`.
    """
    from fedmed.cli.execute import resolve_config
    from fedmed.files import write_json, write_text
    from fedmed.report import figures, tables
    from fedmed.report.run_folder import default_out, prepare

    names = list(dict.fromkeys(arms or ARMS))
    configs = {Path(name).stem: resolve_config(name, overrides) for name in names}
    if len(configs) < len(names):
        raise UserError(f"--arm: {', '.join(names)} have the same file name; rename one of them")
    folder = prepare(out or default_out("demo")).path
    again = shlex.join(["fedmed", "demo", *overrides, *(w for name in arms for w in ("--arm", name))])
    summaries, histories = _run_arms(configs, folder, quiet, note, again)

    header, rows = tables.comparison_table(summaries)
    base = next(iter(summaries.values()))
    key = f"{base['judged_by']}/{base['main_metric']}" if base.get("judged_by") else None
    sentence, remarks = tables.verdict(histories, key), unshared(configs)
    drawn: list[Path] = []
    if not figures.available():
        note(figures.NO_MATPLOTLIB)
    elif key is not None:
        figure = figures.plot_comparison(histories, folder / "figures" / "comparison.png", key, title="Demo")
        drawn += [figure] if figure else []
    write_json(folder / "summary.json", {"arms": summaries, "comparison": sentence, "not_shared": remarks})
    text = report_text(tables.markdown_table(header, rows), sentence, remarks, configs, drawn, folder)
    report = write_text(folder / "report.md", text)
    say(tables.text_table(header, rows))
    say("")
    say(sentence)
    for line in remarks:
        say(f"not shared: {line}")
    say(f"report: {report}")
    commands = {
        Path(n).stem: shlex.join(["fedmed", "run", n, *overrides, "--out", str(folder / Path(n).stem)]) for n in names
    }
    sentences = [sentence, *(f"Not shared: {line}." for line in remarks)]
    page = _write_page(folder, configs, base, sentences, again, commands, note)
    if page is not None:
        say(f"page: {page}")


def _write_page(
    folder: Path,
    configs: Mapping[str, Any],
    base: Mapping[str, Any],
    sentences: Sequence[str],
    command: str,
    commands: Mapping[str, str],
    note: Callable[[str], None],
) -> Path | None:
    """Write the demo as a comparison of one setting and one seed: comparison.json and its page; None where nothing was scored.

    base: summary of the first arm. command, commands: what repeats the demo, and each of its arms alone.
    """
    from fedmed.compare import write
    from fedmed.compare.identity import config_hash
    from fedmed.compare.plan import Cell, Plan, Setting

    config, metric, judged_by = next(iter(configs.values())), base["main_metric"], base.get("judged_by")
    if metric is None or judged_by is None:
        return None
    # As the verdict: the pooled test items where the runs have some, else the sites' own.
    pooled = f"test/global/{metric}" in base["central"]["last"]
    cells = tuple(
        Cell(
            "demo",
            arm,
            c.seed,
            arm,
            (),
            c,
            config_hash(c),
            commands[arm],
        )
        for arm, c in configs.items()
    )
    plan = Plan(
        name="demo", variant="one seed", description=" ".join(sentences), task="",
        base=next(iter(configs)), data=config.data.path, engine=config.engine.name, out=folder,
        metrics=(metric if pooled else f"{judged_by.split('/')[1]}:{metric}",), seed_metrics=(), last_rounds=3,
        baseline=next(iter(configs)), findings=(), command=command, cells=cells,
        settings=(Setting("demo", "Demo", tuple(configs), (config.seed,)),),
    )  # fmt: skip
    write.write_comparison(plan, write.comparison(plan, {}, {}))
    return write.write_html(folder, note, config.data.path)
