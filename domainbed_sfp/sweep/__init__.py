"""From a sweep's description to finished runs: spec, jobs, launchers."""
