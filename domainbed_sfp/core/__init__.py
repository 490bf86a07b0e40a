"""What everything else stands on: the process and its surroundings, locks, and the last word on what goes wrong."""
