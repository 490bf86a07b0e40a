"""Bundles with any byte and any value changed: told, never a crash."""

from __future__ import annotations

from changed_bundles import edit, edit_submission, resum, runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import layout

FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FUZZ
@given(data=st.data())
def test_flipped_bytes_never_validate(made, data):
    """In any file, whatever is flipped: no traceback, and no bundle that passes."""
    files = sorted(file for file in made.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    flipped = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3, unique=True)):
        flipped[place] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(flipped)
        assert validation.validate(made).tier is None
    finally:
        file.write_bytes(whole)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_under_new_sums_never_crash(made, data):
    """The same by one who makes the sums anew: every parser sees the damage."""
    files = sorted(file for file in made.rglob("*") if file.is_file() and file.name != layout.SUMS)
    file, sums = data.draw(st.sampled_from(files)), (made / layout.SUMS).read_bytes()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    # Digits and quotes are changed as often as anything else is: most damage shall get past the JSON parser.
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3, unique=True)):
        flipped[place] = data.draw(st.sampled_from(list(b'0123456789"{}[],:x-e.\xff')))
    try:
        file.write_bytes(flipped)
        resum(made)
        validation.text_of(validation.validate(made))
    finally:
        file.write_bytes(whole)
        (made / layout.SUMS).write_bytes(sums)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@FUZZ
@given(data=st.data())
def test_any_value_in_any_field_never_crashes(made, data):
    """Well-formed JSON with a field of any kind, in the submission or in all records of a run."""
    file = data.draw(st.sampled_from([made / "submission.json", *runs(made)]))
    whole, sums, value = file.read_bytes(), (made / layout.SUMS).read_bytes(), data.draw(JSON_VALUES)

    def place(record):
        inner = record
        while True:
            key = data.draw(st.sampled_from(sorted(inner)))
            if not isinstance(inner[key], dict) or not inner[key] or data.draw(st.booleans()):
                inner[key] = value
                return
            inner = inner[key]

    try:
        if file.suffix == ".json":
            edit_submission(made, place)
        else:
            edit(file, place, slice(data.draw(st.integers(0, 2)), 3))
        resum(made)
        validation.text_of(validation.validate(made))
    finally:
        file.write_bytes(whole)
        (made / layout.SUMS).write_bytes(sums)
