"""From the records of a sweep to its tables: selection rules, statistics and formats."""
