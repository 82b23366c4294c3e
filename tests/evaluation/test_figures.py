"""Figures on disk."""

import runpy
from pathlib import Path

import pytest

from videosparse.benchmark.figures import finish


def test_a_figure_names_every_label_once_and_is_small(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    figure, panels = plt.subplots(1, 2, layout="constrained")
    for axes in panels:
        axes.plot([0, 1], [1, 0], color="#0072B2", label="ours")
    path = tmp_path / "new" / "figure.png"
    finish(figure, panels, path, columns=2)
    assert capsys.readouterr().out == f"{path}\n"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours"]
    with Image.open(path) as image:
        assert image.mode == "P", "a palette"
        assert (0, 114, 178) in [colour for _, colour in image.convert("RGB").getcolors()]
    plt.close(figure)


def test_rows_that_cannot_be_drawn_are_refused_and_no_figure_is_made(tmp_path):
    pytest.importorskip("matplotlib")
    plot = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "plot_methods.py"))
    rows, figure = tmp_path / "rows.csv", tmp_path / "figure.png"
    head = "model,setting,method,quant,frames,height,width,video_density,psnr_db,all_right\n"
    for text, said in ((head, "has no rows"), (f"{head}m,radial,radial,,many,128,128,0.4,30,1\n", "whole numbers")):
        rows.write_text(text)
        with pytest.raises(ValueError, match=said):
            plot["main"](["--rows", str(rows), "--output", str(figure)])
    with pytest.raises(ValueError, match="it is a folder"):
        plot["main"](["--rows", str(rows), "--output", str(tmp_path)])
    assert not figure.exists()
