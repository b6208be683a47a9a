"""`MC_TRUST_EXAMPLES=N` draws N random examples per test, others every time (`--hypothesis-seed=N` repeats a run)."""

import os

import hypothesis


if number := os.environ.get("MC_TRUST_EXAMPLES"):
    hypothesis.settings.register_profile(
        "trust", max_examples=int(number), derandomize=False, deadline=None, database=None, print_blob=True
    )
    hypothesis.settings.load_profile("trust")
