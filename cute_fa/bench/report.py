"""What a run of the benchmark leaves behind: a table, JSON, CSV and plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cute_fa.bench.benchmark import Results, Row
from cute_fa.errors import MissingToolError

COLUMNS = (
    "shape",
    "group",
    "dtype",
    "head_dim",
    "causal",
    "batch",
    "seqlen",
    "heads_q",
    "heads_k",
    "flops",
    "provider",
    "served",
    "ok",
    "error",
    "allowed",
    "median_s",
    "p20_s",
    "p80_s",
    "samples",
    "tflops",
    "share_of_matmul",
    "reason",
)


def write_all(results: Results, folder: Path, *, plots: bool = True) -> list[Path]:
    """JSON, CSV and, if matplotlib is there, plots; the files written.

    Raises:
        MissingToolError: plots are asked for and matplotlib is not installed; the other files have
            been written by then.
    """
    written = write_numbers(results, folder)
    return written + (plot(results, folder) if plots else [])


def write_numbers(results: Results, folder: Path) -> list[Path]:
    """JSON and CSV, each in one step: whoever looks finds whole files. The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "bench_fwd.json", folder / "bench_fwd.csv"]
    partial = [path.with_name(f".{path.name}.partial") for path in written]
    partial[0].write_text(json.dumps(finite(results.as_dict()), indent=1, allow_nan=False) + "\n")
    with partial[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(results))
    for new, path in zip(partial, written, strict=True):
        new.replace(path)
    return written


def finite(value: Any) -> Any:
    """A document whose numbers that are not finite are spelled, as JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(each) for each in value]
    return value


def csv_rows(results: Results) -> list[dict[str, Any]]:
    """One flat row per shape and provider."""
    rows = []
    for row in results.rows:
        flat = {name: getattr(row, name) for name in COLUMNS if hasattr(row, name)}
        timing = row.seconds
        if timing is not None:
            flat |= {
                "median_s": timing.median,
                "p20_s": timing.p20,
                "p80_s": timing.p80,
                "samples": timing.count,
                "share_of_matmul": results.share_of_matmul(row),
            }
        rows.append(flat)
    return rows


def summary(results: Results) -> tuple[list[str], list[list[object]]]:
    """Header and rows of a table: a line per shape, TFLOP/s of each provider that was timed."""
    names = timed_providers(results.rows)
    rows: list[list[object]] = []
    for shape in dict.fromkeys(row.shape for row in results.rows):
        found = {row.provider: row for row in results.rows if row.shape == shape}
        cells = [_cell(found.get(name)) for name in names]
        rows.append([shape, *cells, _ours_over_best(list(found.values()))])
    return ["shape", *names, "ours / best other"], rows


def timed_providers(rows: Sequence[Row]) -> list[str]:
    """Providers that served at least one shape, in order."""
    return list(dict.fromkeys(row.provider for row in rows if row.served))


def _cell(row: Row | None) -> str:
    if row is None or not row.served:
        return "-"
    if not row.ok:
        return "FAILED" if row.error is None else "WRONG"
    assert row.tflops is not None and row.seconds is not None
    spread = (row.seconds.p80 - row.seconds.p20) / row.seconds.median / 2
    return f"{row.tflops:.0f} ±{spread:.0%}"


def _ours_over_best(rows: Sequence[Row]) -> str:
    ours, others = (
        [row.tflops for row in rows if row.tflops and row.provider.startswith("cute_fa-") is own]
        for own in (True, False)
    )
    return f"{max(ours) / max(others):.2f}" if ours and others else "-"


def plot(results: Results, folder: Path) -> list[Path]:
    """One picture per group and dtype: TFLOP/s over the sequence length, by head dim and mask.

    Raises:
        MissingToolError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingToolError(
            "matplotlib draws the plots and is not installed",
            fix="pip install 'cute-fa[bench]', or --no-plots",
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    timed = [row for row in results.rows if row.seconds is not None]
    colours = {name: f"C{index}" for index, name in enumerate(timed_providers(timed))}
    for group, dtype in dict.fromkeys((row.group, row.dtype) for row in timed):
        rows = [row for row in timed if (row.group, row.dtype) == (group, dtype)]
        dims = sorted({row.head_dim for row in rows})
        masks = sorted({row.causal for row in rows})
        figure, axes = pyplot.subplots(
            len(masks),
            len(dims),
            figsize=(max(7.0, 5 * len(dims)), 3.5 * len(masks) + 0.5),
            squeeze=False,
            layout="constrained",
        )
        for i, causal in enumerate(masks):
            for j, dim in enumerate(dims):
                panel = [row for row in rows if (row.causal, row.head_dim) == (causal, dim)]
                _draw(axes[i][j], panel, results.matmul.get(dtype), colours)
                axes[i][j].set_title(f"D {dim}{', causal' if causal else ''}")
        labels = {
            label: handle
            for panel in axes.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            labels.values(), labels.keys(), loc="outside lower center", ncols=4, fontsize="small"
        )
        figure.suptitle(f"{group}, forward, {dtype}: {results.device.get('name', 'no device')}")
        path = folder / f"bench_fwd_{group}_{dtype}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def _draw(axes: Any, rows: Sequence[Row], matmul: float | None, colours: Mapping[str, str]) -> None:
    """Medians with their 20–80 % span; lines where only the sequence length changes."""
    labels = [f"{row.seqlen}\n{row.heads_q}/{row.heads_k}" for row in rows]
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    for name in timed_providers(rows):
        own = [row for row in rows if row.provider == name and row.seconds is not None]
        x = [places[f"{row.seqlen}\n{row.heads_q}/{row.heads_k}"] for row in own]
        spans = [row.seconds for row in own if row.seconds is not None]
        speeds = [row.flops / span.median / 1e12 for row, span in zip(own, spans, strict=True)]
        below = [v * (1 - s.median / s.p80) for v, s in zip(speeds, spans, strict=True)]
        above = [v * (s.median / s.p20 - 1) for v, s in zip(speeds, spans, strict=True)]
        style = "-" if own[0].group == "papers" else "none"
        axes.errorbar(
            x,
            speeds,
            yerr=(below, above),
            color=colours[name],
            linestyle=style,
            marker="o",
            capsize=3,
            label=name,
        )
    if matmul is not None:
        axes.axhline(matmul, color="grey", linestyle="--", linewidth=1, label="matrix product")
    axes.set_xticks(list(places.values()), list(places))
    longest = "longest sequence" if rows and rows[0].group == "varlen" else "sequence length"
    axes.set_xlabel(f"{longest}, heads Q/KV")
    axes.set_ylabel("TFLOP/s")
    axes.set_ylim(bottom=0)
