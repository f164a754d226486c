"""The small reproduction of the paper: plan, run, report, verdicts."""
