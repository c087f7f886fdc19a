"""The benchmarks: watchd and what it is compared with, under the same load in the same run."""
