"""Benchmarks: cases, peers, interleaved timing, results files and the tables made from them."""
