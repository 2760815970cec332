"""A model outside of this process: files for other runtimes, HTTP, Ray."""
