"""Random and damaged inputs through decoding and the HTTP service: `python -m bench.fuzz`."""
