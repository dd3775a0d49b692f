"""Plots of a table."""

from dataclasses import replace

import pytest

from examples.tables import execute, plots, table

Text = pytest.importorskip("matplotlib.text").Text


def evaluated(loss):
    return {"evaluations": {f"test-memory-{length}": {"loss": loss} for length in (0, 32)}}


def test_the_plot_of_memory_lengths_reads_alone(tiny):
    """Each row is named beside its line, with bars where seeds differ; names stay apart where lines end together."""
    pyplot = plots.pyplot()
    loaded = table.load(tiny)
    loaded.rows["transformer_xl"] = replace(loaded.rows["transformer_xl"], sweeps=True)
    figure = plots._memory(
        pyplot,
        execute.Plan(loaded, tiny.parent),
        {"transformer_xl": [evaluated(1.0)], "lamemo": [evaluated(0.75), evaluated(1.25)]},
    )
    (axis,) = figure.axes
    assert "bars: standard deviation of seeds" in axis.get_ylabel() and figure._suptitle.get_text()
    assert axis.get_legend() is None
    for container, spread in zip(axis.containers, (0.0, 0.3536), strict=True):
        (bars,) = container.lines[2]
        assert [top[1] - bottom[1] for bottom, top in bars.get_segments()] == pytest.approx(2 * [2 * spread], abs=1e-4)
    figure.draw_without_rendering()
    names = {text.get_text(): text for text in axis.texts}
    assert set(names) == {"Transformer-XL", "LaMemo (2 seeds)"}
    one, other = (Text.get_window_extent(text) for text in names.values())  # without the lines to the names
    assert not one.overlaps(other) and one.x0 > axis.get_window_extent().x1
    pyplot.close(figure)
