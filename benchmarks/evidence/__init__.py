"""Does HIER help, where, and with which settings? See ``python -m benchmarks.evidence --help``."""
