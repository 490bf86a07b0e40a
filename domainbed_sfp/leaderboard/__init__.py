"""From a sweep to a line of the leaderboard: bundle, validation, rerun, entries."""
