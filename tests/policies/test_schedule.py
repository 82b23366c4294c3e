import pytest

from videosparse.policies import DenseSchedule, RunStep


def modes(schedule, total, layers=4):
    """One string per step, D or S per layer."""
    return [
        "".join(
            "D" if schedule.is_dense(RunStep("cond", step, total), layer, layers) else "S" for layer in range(layers)
        )
        for step in range(total)
    ]


def test_counts_from_both_ends():
    schedule = DenseSchedule(first_steps=1, last_steps=1, first_layers=1, last_layers=1)
    assert modes(schedule, 4) == ["DDDD", "DSSD", "DSSD", "DDDD"]


@pytest.mark.parametrize(("total", "dense"), [(50, 12), (8, 2), (4, 1), (1, 0)])
def test_fractions_of_the_run_give_the_published_counts(total, dense):
    assert DenseSchedule(first_steps=0.24).dense_steps(total) == (dense, 0)


def test_average_density_is_what_the_layer_calls_add_up_to():
    schedule = DenseSchedule(first_steps=0.25, last_steps=1, first_layers=2)
    calls = "".join(modes(schedule, 20, layers=5))
    expected = (calls.count("D") + 0.3 * calls.count("S")) / len(calls)
    assert schedule.average_density(0.3, 20, 5) == pytest.approx(expected)


def test_published_wan_schedule_bounds_attention_at_2_1x():
    average = DenseSchedule(first_steps=12, first_layers=1).average_density(0.287, 50, 40)
    assert average == pytest.approx(0.47, abs=0.005)


def test_unknown_length_of_the_run():
    assert DenseSchedule(first_steps=2).is_dense(RunStep("0", 1), 0, 4)
    with pytest.raises(ValueError, match="pass num_steps="):
        DenseSchedule(first_steps=0.5).is_dense(RunStep("0", 1), 0, 4)
    with pytest.raises(ValueError, match="pass num_steps="):
        DenseSchedule(last_steps=1).is_dense(RunStep("0", 1), 0, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"first_steps": -1}, ValueError, "an int >= 0 or a fraction"),
        ({"last_steps": 1.5}, ValueError, "an int >= 0 or a fraction"),
        ({"first_layers": 0.5}, TypeError, "an int of layers"),
        ({"first_steps": "3"}, TypeError, "must be a number"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DenseSchedule(**arguments)


def test_more_dense_layers_than_layers():
    with pytest.raises(ValueError, match="asks for 5 dense layers, the model has 4"):
        DenseSchedule(first_layers=3, last_layers=2).check_layers(4)
