"""Figures on disk."""

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
