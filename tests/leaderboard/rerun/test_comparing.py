"""How two computations are compared."""

from __future__ import annotations

import pytest
from recomputed_bundles import told

from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.rerun.comparing import check_means, compare


def elsewhere(records, **changes):
    """Records as another machine would have made them."""
    return [{**record, "environment": {**record["environment"], "cpu": "other"}, **changes} for record in records]


def raised(records, points: float, match=lambda name: True):
    """Records whose accuracies are higher by so many points, but for the first one."""
    return [
        {
            name: min(1.0, value + points / 100) if name.endswith("_acc") and at and match(name) else value
            for name, value in record.items()
        }
        for at, record in enumerate(records)
    ]


@pytest.fixture(scope="session")
def records(made):
    """Twelve records of a run whose accuracies leave room above them."""
    (run, _) = validation.validate(made).runs
    low = [{**run.records[-1], "step": step, "commit": "ba9876543210"} for step in range(12)]
    return [{name: 0.5 if name.endswith("_acc") else value for name, value in record.items()} for record in low]


def test_the_same_records_are_identical_wherever_they_were_made(records):
    for again in (records, elsewhere(records), elsewhere(records, commit="0123456789ab", wall_time=9.0)):
        one = compare("run", records, again, 3.0, frozenset({11}))
        assert (one.agreement, one.difference, one.problems, one.signed) == ("identical", 0.0, [], {})


SAME_PLACE = {
    "loss": 0.123, "env0_in_acc": 0.5001, "sparsity": 0.51, "macs": 5, "masks": "0" * 64, "precision": "bf16",
    "final_compression": False, "bitops": 1.0, "granularity": "weight", "epoch": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name, value", SAME_PLACE.items())
@pytest.mark.parametrize("at", [0, 5, 11])
def test_at_the_same_place_every_field_of_every_record_counts(records, name, value, at):
    claimed = [dict(record) for record in records]
    claimed[at][name] = value
    (line,) = told("run", claimed, records)
    assert line.startswith(f"records/run.jsonl: line {at + 1}.{name}: expected ") and "as computed again with" in line


@pytest.mark.parametrize(
    "changes, is_told",
    [
        ({"loss": 1.1}, False),
        ({"loss": 1000.0}, True),
        ({"loss": None}, True),
        ({"env0_in_acc": 0.529}, False),
        ({"env0_in_acc": 0.531}, True),
        ({"sparsity": 0.51}, False),
        ({"sparsity": 0.6}, True),
        ({"macs": 10}, True),
        ({"surviving_parameters": 10}, True),
        ({"masks": "0" * 64}, False),
        ({"precision": "bf16"}, True),
        ({"bitops": 1.0}, True),
        ({"dense_macs": 1}, True),
        ({"hparams": {}}, False),  # versions differ in what they name; `check_hparams` holds them to the seeds' draw
        ({"standing": "reference"}, True),
        ({"final_compression": False}, True),
        ({"surprise": 1.0}, True),
        ({"wall_time": 9.0, "mem_gb": 3.0, "step_time": 1.0, "images_per_second": 2.0}, False),
    ],
)
def test_elsewhere_a_record_may_differ_by_what_training_decides(records, changes, is_told):
    claimed = [dict(record) for record in records]
    claimed[5].update(changes)
    again = elsewhere(records, loss=1.0)
    claimed = [{"loss": 1.0, **record} if at != 5 else record for at, record in enumerate(claimed)]
    claimed = [
        {**record, "loss": 1.0} if "loss" not in changes or at != 5 else record for at, record in enumerate(claimed)
    ]
    found = told("run", claimed, again)
    assert bool(found) == is_told and all(
        "line 6." in line and "on another machine or commit" in line for line in found
    )


def test_a_field_that_is_left_out_is_told(records):
    claimed = [{name: value for name, value in record.items() if name != "masks"} for record in records]
    assert all("masks: expected" in line and line.endswith("found nothing") for line in told("run", claimed, records))
    assert told("run", claimed, elsewhere(records)) and told("run", records[:-1], records)


def test_the_first_step_has_a_tolerance_of_its_own(records):
    claimed = [dict(record) for record in records]
    claimed[0]["env1_in_acc"] = 0.509
    assert not told("run", claimed, elsewhere(records))
    claimed[0]["env1_in_acc"] = 0.511
    (line,) = told("run", claimed, elsewhere(records))
    assert "line 1.env1_in_acc" in line


def test_two_samples_of_a_small_split_may_differ(records):
    """One of 31 images is more than three points."""
    claimed = [dict(record) for record in records]
    for at in (0, 5):
        claimed[at]["env1_out_acc"] = 0.5 + 2 / 31
    again = elsewhere(records)
    assert len(told("run", claimed, again)) == 2
    assert not compare("run", claimed, again, 3.0, frozenset(), {"env1_out_acc": 31}).problems
    assert len(compare("run", claimed, again, 3.0, frozenset(), {"env1_out_acc": 480}).problems) == 2


def means(claimed, again, selected=frozenset({11})):
    one = compare("run", claimed, again, 3.0, selected)
    assert not one.problems
    mean, problems = check_means([one], 3.0)
    return mean, [problem.line() for problem in problems]


def test_points_added_to_every_record_are_told_by_their_mean(records):
    """Each record lies within its tolerance; all together do not."""
    again = elsewhere(records)
    mean, found = means(raised(records, 2.0), again)
    assert mean == pytest.approx(2.0) and len(found) == 2
    unseen = next(line for line in found if "unseen environments" in line)
    assert "expected a mean within 1.00 points" in unseen and "found +2.00 points over" in unseen
    # Of the unseen environment or the validation splits alone; lower ones make others look better.
    tested = records[0]["args"]["test_envs"][0]
    assert means(raised(records, 2.0, lambda name: name.startswith(f"env{tested}_")), again)[1]
    assert means(raised(records, 2.0, lambda name: "_out_" in name and not name.startswith(f"env{tested}_")), again)[1]
    assert means(raised(records, -2.0), again)[1]
    assert not means(raised(records, 0.5), again)[1]


def test_a_difference_where_a_rule_selected_is_told_apart(records):
    claimed = [dict(record) for record in records]
    claimed[3]["env0_in_acc"] = 0.52
    claimed[11]["env0_in_acc"] = 0.51
    one = compare("run", claimed, elsewhere(records), 3.0, frozenset({11}))
    assert (one.agreement, one.problems) == ("within tolerance", [])
    assert one.difference == pytest.approx(2.0) and one.selected_difference == pytest.approx(1.0)
    # Selected records alone, in many runs: their mean has to be the better, the more there are.
    tested = records[0]["args"]["test_envs"][0]
    claimed = [dict(record) for record in records]
    claimed[11][f"env{tested}_in_acc"] = 0.525
    some = [compare("run", claimed, elsewhere(records), 3.0, frozenset({11})) for _ in range(4)]
    (problem,) = check_means(some, 3.0)[1]
    assert "selected records: expected a mean within 1.50 points" in problem.line()


def test_what_changes_were_nobody_knows(records):
    """Two checkouts with changes of their own may have the same commit."""
    again = [{**record, "commit": "0123456789ab+changes", "loss": 1.0} for record in records]
    claimed = [{**record, "loss": 1.1} for record in again]
    assert compare("run", claimed, again, 3.0, frozenset()).agreement == "within tolerance"


def test_another_version_of_an_algorithms_package(records):
    theirs, ours = ([{**record, "code": code} for record in records] for code in ("0123456789ab", "ba9876543210"))
    (line,) = told("run", theirs, ours)
    assert "install the version that made the records" in line
