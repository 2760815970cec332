"""Runs models outside of this process: files for other runtimes, an HTTP service, Ray clusters."""
