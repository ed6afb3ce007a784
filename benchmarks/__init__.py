"""Slow measurements: quality on real data. They are run by hand, not by the tests."""
