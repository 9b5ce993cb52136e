//! Cost per I/O, throughput and latency.
